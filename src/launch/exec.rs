//! In an exec's unit: the OCI runtime adds the process to the container, systemd gets it as main process, and the daemon
//! learns the outcome.

use nix::sys::prctl::set_child_subreaper;

use crate::oci::{namespaces, runtime};
use crate::task::phase::Exit;

use super::contract::{EXEC_PID_FILE, Outcome, PROCESS_SPEC};
use super::error::{Error, system};
use super::process::Process;
use super::streams::Streams;
use super::{cgroup, handoff, inherited, report};
use crate::sys::bounded::{self, End};

/// If the process ended before systemd had it, this process ends in the same way instead of returning.
pub(super) fn run(process: &Process<'_>) -> Result<(), Error> {
    namespaces::enter_or_stay(&process.task.containerd);
    process.mark()?;
    let (pid, ended) = match add_process(process).and_then(|pid| Ok((pid, handoff::hand_over(pid)?))) {
        Ok(added) => added,
        Err(error) => {
            // The OCI runtime may have left a process, or what was to become one: nobody would know of it.
            bounded::kill_all();
            report::write(&process.dir, &Outcome::Failed { reason: error.to_string() })?;
            return Err(error);
        }
    };
    let outcome = match ended {
        None => Outcome::Started { pid },
        Some(ended) => {
            Outcome::Ended { pid, exit: Exit { status: ended.exit_status(), at_usec: ended.at_usec } }
        }
    };
    report::write(&process.dir, &outcome)?;
    match ended {
        None => Ok(()),
        Some(ended) => handoff::end_as(ended),
    }
}

fn add_process(process: &Process<'_>) -> Result<u32, Error> {
    // What the runtime leaves behind becomes a child of this process: its exit can't be lost.
    set_child_subreaper(true).map_err(system("become a subreaper"))?;
    let (spec, pid_file) = (process.dir.join(PROCESS_SPEC), process.dir.join(EXEC_PID_FILE));
    let (cli, console) = (process.cli(), process.console.as_deref());
    cgroup::enter(process.task, true)?;
    inherited::set(&process.task.containerd)?;
    let limit = process.task.runtime.limit();
    let streams = Streams::open(process)?;
    let ended = process.with_runtime(|program| {
        let mut command = cli.exec(program, &spec, &pid_file, console);
        streams.equip(&mut command)?;
        let failed = |source| Error::Exec { verb: runtime::EXEC, binary: program.to_owned(), source };
        bounded::run(&mut command, limit).map_err(failed)
    })?;
    // From here on the process alone has them.
    drop(streams);
    let status = match ended {
        End::Exited(status) => status,
        End::TimedOut => return Err(runtime::Error::TimedOut { verb: runtime::EXEC, limit }.into()),
        End::Terminated => return Err(Error::Terminated),
    };
    if !status.success() {
        return Err(Error::Runtime(cli.reason(runtime::EXEC, Some(status))));
    }
    let pid = std::fs::read_to_string(&pid_file).ok().and_then(|text| text.trim().parse().ok());
    pid.ok_or_else(|| Error::Runtime("it left no pid file".to_owned()))
}
