//! The only table from errors to status codes.
//!
//! An illegal transition is FAILED_PRECONDITION (UNKNOWN in containerd-shim-runc-v2). Clients of Kill understand this
//! code as "nothing to kill", so Kill returns it only for an exec that was not started.

use std::io;

use nix::errno::Errno;
use protobuf::Enum as _;
use ttrpc::Code;

use crate::services::Error;
use crate::sys;
use crate::{oci, text, unit};

/// The code of an error. RESOURCE_EXHAUSTED if the kernel had too little room: the same call can succeed once there is
/// more.
pub fn code(error: &Error) -> Code {
    match code_of_kind(error) {
        Code::UNKNOWN if is_exhausted(error) => Code::RESOURCE_EXHAUSTED,
        code => code,
    }
}

/// The number of that code, for a response that outlives the daemon.
pub fn number(error: &Error) -> i32 {
    code(error).value()
}

/// True if the system lacked descriptors, memory, disk space, processes or threads.
fn is_exhausted(error: &Error) -> bool {
    let mut source = Some(error as &dyn std::error::Error);
    while let Some(error) = source {
        let io = error.downcast_ref::<io::Error>().and_then(io::Error::raw_os_error).map(Errno::from_raw);
        if let Some(errno) = io.or_else(|| error.downcast_ref::<Errno>().copied()) {
            // In an error of a call, EAGAIN comes from clone(2): the daemon waits for a descriptor that is not ready.
            return errno == Errno::EAGAIN || sys::is_exhausted(errno);
        }
        source = error.source();
    }
    false
}

fn code_of_kind(error: &Error) -> Code {
    match error {
        Error::UnknownTask { .. } | Error::UnknownExec { .. } | Error::Finished => Code::NOT_FOUND,
        Error::Exists { .. }
        | Error::Unmanaged { .. }
        | Error::InRuntime { .. }
        | Error::ExecExists { .. }
        | Error::ExecNamedAsTask { .. } => Code::ALREADY_EXISTS,
        Error::Refused(_)
        | Error::NotDeletable { .. }
        | Error::Leftover { .. }
        | Error::CgroupInUse { .. }
        | Error::NoExecIn { .. }
        | Error::FrozenSlice { .. }
        | Error::NotRun { .. }
        | Error::StoppedMeanwhile { .. }
        | Error::InitGone { .. }
        | Error::NotStarted
        | Error::Resources(oci::resources::Error::NoController { .. })
        | Error::Profile(oci::profiles::Error::NotLoaded { .. })
        | Error::Unit(unit::error::Error::Dependency { .. } | unit::error::Error::Setting { .. })
        | Error::ResizeStopped => Code::FAILED_PRECONDITION,
        Error::Earlier { code, .. } => Code::from_i32(*code).unwrap_or(Code::UNKNOWN),
        Error::NotImplemented(_)
        | Error::Criu(oci::criu::Problem::Missing { .. } | oci::criu::Problem::NoSupport { .. }) => {
            Code::UNIMPLEMENTED
        }
        Error::JournalSocket { .. } | Error::Criu(_) => Code::FAILED_PRECONDITION,
        Error::Bundle(oci::bundle::Error::Busy(_)) | Error::Options(oci::options::Error::Busy(_)) => {
            Code::RESOURCE_EXHAUSTED
        }
        Error::Signal(_)
        | Error::Checkpoint(_)
        | Error::BundlePath(_)
        | Error::Notify { .. }
        | Error::Bundle(oci::bundle::Error::Io { .. })
        | Error::Bundle(oci::bundle::Error::TooLarge { .. })
        | Error::Bundle(oci::bundle::Error::Malformed { .. })
        | Error::Resources(oci::resources::Error::Malformed(_) | oci::resources::Error::Invalid { .. })
        | Error::Property(_)
        | Error::Options(_)
        | Error::Stdio(_)
        | Error::Process(oci::process::Error::Malformed(_) | oci::process::Error::NoArgs)
        | Error::CgroupsPath(_)
        | Error::Profile(_)
        | Error::Name(_) => Code::INVALID_ARGUMENT,
        Error::NotEnding { .. }
        | Error::NotFreezing { .. }
        | Error::CreateTimedOut { .. }
        | Error::StartTimedOut { .. }
        | Error::FilesDoNotAnswer { .. }
        | Error::TerminalDoesNotAnswer { .. }
        | Error::Runtime(oci::runtime::Error::TimedOut { .. } | oci::runtime::Error::Busy { .. }) => {
            Code::DEADLINE_EXCEEDED
        }
        Error::Cgroup(error) if error.is_timeout() => Code::DEADLINE_EXCEEDED,
        Error::GivenUp { .. } | Error::Interrupted { .. } => Code::CANCELLED,
        Error::ClientGone { .. } => Code::DEADLINE_EXCEEDED,
        // Not UNAVAILABLE: containerd takes this code for the success of a StopSandbox.
        Error::FdStore(_)
        | Error::ExecShare(_)
        | Error::NoThread(_)
        | Error::ManyWait { .. }
        | Error::FilesBusy { .. } => Code::RESOURCE_EXHAUSTED,
        Error::Stopping
        | Error::Unit(unit::error::Error::Unreachable { .. } | unit::error::Error::Lost { .. }) => {
            Code::UNAVAILABLE
        }
        Error::NoUnitName { .. }
        | Error::WithLog { .. }
        | Error::Kill { .. }
        | Error::NotRemoved { .. }
        | Error::Stream(_)
        | Error::Session(_)
        | Error::Watch(_)
        | Error::Process(oci::process::Error::Io { .. })
        | Error::Launch(_)
        | Error::Runtime(
            oci::runtime::Error::Spawn { .. }
            | oci::runtime::Error::Directory { .. }
            | oci::runtime::Error::Environment { .. }
            | oci::runtime::Error::Failed { .. }
            | oci::runtime::Error::Killed { .. }
            | oci::runtime::Error::Orphan { .. },
        )
        | Error::Mount(_)
        | Error::PodFiles(_)
        | Error::Cgroup(_)
        | Error::Store(_)
        | Error::Logger { .. }
        | Error::Unit(
            unit::error::Error::NotLoaded { .. }
            | unit::error::Error::Exists { .. }
            | unit::error::Error::Masked { .. }
            | unit::error::Error::Refused { .. }
            | unit::error::Error::Job { .. }
            | unit::error::Error::Journal { .. }
            | unit::error::Error::TooOld { .. },
        ) => Code::UNKNOWN,
    }
}

/// The error for containerd, with code and text.
pub fn status(error: &Error) -> ttrpc::Error {
    rpc(code(error), error)
}

/// The error for a request that can't be parsed.
pub fn invalid(reason: impl ToString) -> ttrpc::Error {
    rpc(Code::INVALID_ARGUMENT, &reason)
}

/// The error for a request whose caller can't be determined now. The caller may repeat the request.
pub fn unavailable(reason: impl ToString) -> ttrpc::Error {
    rpc(Code::UNAVAILABLE, &reason)
}

/// The longest text of an error, in bytes. An error names what a client has sent, which can be as long as a request, and a
/// response that is longer than ttrpc allows would end the connection.
const MAX_TEXT: usize = 8192;

/// The text of an error, for a client that prints the text to a terminal: an error names what a container or a checkpoint
/// contains, and the terminal must not obey that.
pub(super) fn text(error: &impl ToString) -> String {
    let text = error.to_string().replace(|c| c != '\n' && text::is_unfit(c), "\u{fffd}");
    text::shortened(text, MAX_TEXT)
}

/// An error of ttrpc with a status. ttrpc would send any other kind of error as UNKNOWN with its debug text.
fn rpc(code: Code, error: &impl ToString) -> ttrpc::Error {
    ttrpc::Error::RpcStatus(ttrpc::get_status(code, text(error)))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::task::lifecycle::Event;
    use crate::task::phase::{Phase, transition};

    #[test]
    fn an_illegal_transition_is_a_failed_precondition() {
        let refusal = transition(&Phase::Creating { exit: None }, Event::StartBegun).unwrap_err();
        assert_eq!(code(&Error::Refused(refusal)), Code::FAILED_PRECONDITION);
    }

    #[test]
    fn a_limit_is_an_invalid_argument_and_a_missing_controller_a_failed_precondition() {
        let wrong = oci::resources::Resources::parse(b"{").unwrap_err();
        assert_eq!(code(&Error::Resources(wrong)), Code::INVALID_ARGUMENT);
        let resources = oci::resources::Resources::parse(br#"{"pids":{"limit":7}}"#).unwrap();
        let missing = resources.check_controllers("cpu").unwrap_err();
        assert_eq!(code(&Error::Resources(missing)), Code::FAILED_PRECONDITION);
    }

    #[test]
    fn a_property_that_cant_be_set_is_an_invalid_argument_and_a_masked_slice_a_failed_precondition() {
        let refused = unit::annotation::Error::Refused { origins: Vec::new(), reason: String::new() };
        assert_eq!(code(&Error::Property(refused)), Code::INVALID_ARGUMENT);
        let masked = unit::error::Error::Dependency { unit: String::new(), reason: String::new() };
        assert_eq!(code(&Error::Unit(masked)), Code::FAILED_PRECONDITION);
    }

    #[test]
    fn a_call_that_failed_because_the_system_has_no_room_may_be_repeated() {
        let spawn = |errno: Errno| {
            let binary = "/usr/bin/runc".into();
            Error::Runtime(oci::runtime::Error::Spawn { verb: "start", binary, source: errno.into() })
        };
        for errno in [Errno::EAGAIN, Errno::ENOMEM, Errno::EMFILE, Errno::ENOSPC] {
            assert_eq!(code(&spawn(errno)), Code::RESOURCE_EXHAUSTED, "{errno}");
        }
        assert_eq!(code(&spawn(Errno::ENOENT)), Code::UNKNOWN);
        assert_eq!(code(&Error::NoThread(Errno::EAGAIN.into())), Code::RESOURCE_EXHAUSTED);
    }

    #[test]
    fn an_error_about_a_long_text_fits_into_a_response() {
        let bundle = std::path::PathBuf::from("x".repeat(4 << 20));
        for error in [status(&Error::BundlePath(bundle.clone())), invalid(bundle.display())] {
            let ttrpc::Error::RpcStatus(status) = error else { unreachable!("{error:?}") };
            assert!(status.message.len() < 2 * MAX_TEXT, "{} bytes", status.message.len());
        }
    }

    #[test]
    fn an_error_says_nothing_that_a_terminal_obeys() {
        let ttrpc::Error::RpcStatus(status) = invalid("criu: \u{1b}]0;x\u{7}\u{202e}y\nsecond line") else {
            unreachable!()
        };
        assert_eq!(status.message, "criu: \u{fffd}]0;x\u{fffd}\u{fffd}y\nsecond line");
    }

    #[test]
    fn a_finished_process_is_not_found_for_kill() {
        assert_eq!(code(&Error::Finished), Code::NOT_FOUND);
        assert_eq!(Error::Finished.to_string(), "process already finished: not found");
    }
}
