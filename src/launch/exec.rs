//! In an exec's unit: lets the OCI runtime add the process to the container, hands the process over to systemd, and reports
//! the outcome to the daemon.

use nix::sys::prctl::set_child_subreaper;

use crate::oci::{namespaces, runtime};
use crate::task::lifecycle::Exit;

use super::contract::{EXEC_PID_FILE, Outcome, PROCESS_SPEC};
use super::error::{Error, system};
use super::handoff::Handover;
use super::process::Process;
use super::streams::Streams;
use super::{cgroup, core_scheduling, handoff, inherited, report};
use crate::sys::bounded::{self, CommandEnd};

/// If systemd does not take the process over, this process ends in the same way as the process instead of returning.
pub(super) fn run(process: &Process<'_>) -> Result<(), Error> {
    namespaces::enter_or_stay(&process.task.containerd);
    process.mark()?;
    let added = add_process(process).and_then(|pid| Ok((pid, handoff::hand_over(pid)?)));
    // Without this report, the daemon would not follow the process.
    let reported = added.and_then(|(pid, handover)| {
        report::write(&process.dir, &outcome(pid, handover))?;
        Ok((pid, handover))
    });
    match reported {
        Ok((_, Handover::Taken)) => Ok(()),
        Ok((_, Handover::Ended(ended))) => handoff::end_as(ended),
        Ok((pid, Handover::Unclear)) => match handoff::end_with(pid)? {},
        Err(error) => {
            // The OCI runtime may have left processes behind, which nothing else would ever kill.
            bounded::kill_all();
            report::write(&process.dir, &Outcome::Failed { reason: error.to_string() })?;
            Err(error)
        }
    }
}

fn outcome(pid: u32, handover: Handover) -> Outcome {
    match handover {
        Handover::Taken | Handover::Unclear => Outcome::Started { pid },
        Handover::Ended(ended) => Outcome::Ended {
            pid,
            exit: Exit {
                status: ended.exit_status(),
                at_usec: ended.at_usec.unwrap_or_else(crate::sys::now_usec),
            },
        },
    }
}

fn add_process(process: &Process<'_>) -> Result<u32, Error> {
    // The process that the runtime starts becomes a child of this process, so its exit can't be lost.
    set_child_subreaper(true).map_err(system("become a subreaper"))?;
    let (spec, pid_file) = (process.dir.join(PROCESS_SPEC), process.dir.join(EXEC_PID_FILE));
    let (cli, console) = (process.cli(), process.console.as_deref());
    cgroup::enter(process)?;
    core_scheduling::join(process.task, process.exec)?;
    inherited::set(&process.task.containerd)?;
    let limit = process.task.runtime.limit();
    let streams = Streams::open(process)?;
    let ended = process.with_runtime(|program| {
        let mut command = cli.exec(program, &spec, &pid_file, console)?;
        streams.equip(&mut command)?;
        let failed = |source| Error::Exec { verb: runtime::EXEC, binary: program.to_owned(), source };
        bounded::run(&mut command, limit).map_err(failed)
    })?;
    // From here on, only the started process has the streams.
    drop(streams);
    let status = match ended {
        CommandEnd::Exited(status) => status,
        CommandEnd::TimedOut => return Err(runtime::Error::TimedOut { verb: runtime::EXEC, limit }.into()),
        CommandEnd::Terminated => return Err(Error::Terminated),
    };
    if !status.success() {
        return Err(Error::Runtime(cli.reason(runtime::EXEC, Some(status))));
    }
    let pid = std::fs::read_to_string(&pid_file).ok().and_then(|text| text.trim().parse().ok());
    pid.ok_or_else(|| Error::Runtime("it wrote no pid file".to_owned()))
}
