//! In an exec's unit: lets the OCI runtime add the process to the container, hands the process over to systemd, and reports
//! the outcome to the daemon.

use std::process::Stdio;
use std::time::Duration;

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
use crate::sys::bounded_file::Messages;

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
        let reason = cli.reason(runtime::EXEC, status, "");
        let defect = if cli.logged(runtime::EXEC).is_none() { defect(&cli, limit) } else { None };
        return Err(Error::Runtime(match defect {
            Some(defect) => format!("{reason}; {defect}"),
            None => reason,
        }));
    }
    let pid = std::fs::read_to_string(&pid_file).ok().and_then(|text| text.trim().parse().ok());
    pid.ok_or_else(|| Error::Runtime("it wrote no pid file".to_owned()))
}

/// Why the OCI runtime can't even print its version. What it said instead of starting the process is in the stream of the
/// process. `None` if it can.
fn defect(cli: &runtime::Cli<'_>, limit: Duration) -> Option<runtime::Error> {
    let verb = runtime::VERSION;
    let mut command = match cli.version() {
        Ok(command) => command,
        Err(error) => return Some(error),
    };
    let messages = Messages::new();
    let stderr = messages.file().map_or_else(Stdio::null, Stdio::from);
    command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(stderr);
    match bounded::run(&mut command, limit) {
        Ok(CommandEnd::Exited(status)) if status.success() => None,
        Ok(CommandEnd::Exited(status)) => {
            Some(runtime::Error::Failed { verb, reason: cli.reason(verb, status, &messages.text()) })
        }
        Ok(CommandEnd::TimedOut) => Some(runtime::Error::TimedOut { verb, limit }),
        Ok(CommandEnd::Terminated) => None,
        Err(source) => Some(runtime::Error::Spawn { verb, binary: cli.runtime.binary.clone(), source }),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::id::TaskId;
    use crate::task::request::{Containerd, Runtime};

    #[test]
    fn a_runtime_that_can_not_run_says_why() {
        let dir = tempfile::tempdir().unwrap();
        let binary = dir.path().join("runc");
        let (id, containerd) = (TaskId::new("web").unwrap(), Containerd::default());
        let runtime = Runtime { binary: binary.clone(), ..Runtime::default() };
        let path = dir.path();
        let cli =
            runtime::Cli { runtime: &runtime, id: &id, containerd: &containerd, bundle: path, dir: path };
        let limit = Duration::from_secs(60);
        assert!(matches!(defect(&cli, limit), Some(runtime::Error::Spawn { .. })));
        crate::oci::write_script(&binary, "[ \"$*\" = --version ] && exit 0; exit 1");
        assert!(defect(&cli, limit).is_none());
        crate::oci::write_script(&binary, "echo no libfoo.so.2 >&2; exit 127");
        let text = defect(&cli, limit).unwrap().to_string();
        assert!(text.ends_with("runc ended with code 127 and the message: no libfoo.so.2"), "{text}");
    }
}
