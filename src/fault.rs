//! Points at which a test build ends the daemon, as SIGKILL does, or lets the next step fail: tests show that no task, call
//! or exit is lost at any of them, and that nothing is left over. And a switch that turns off what survives the daemon, to
//! show what it costs. A normal build has no trace of them.

/// Names every point once, for the code and for the tests that go through all of them.
macro_rules! points {
    ($($(#[$doc:meta])* $point:ident = $name:literal,)*) => {
        /// A point. Its name begins with the call that passes there.
        #[derive(Clone, Copy, Debug, PartialEq, Eq)]
        pub enum Point {
            $($(#[$doc])* $point,)*
        }

        impl Point {
            /// All of them.
            #[cfg(feature = "faults")]
            pub const ALL: &[Self] = &[$(Self::$point),*];

            /// As tests call it.
            #[cfg(feature = "faults")]
            pub fn name(self) -> &'static str {
                match self {
                    $(Self::$point => $name,)*
                }
            }
        }
    };
}

points! {
    /// A connection is accepted, and only this process has it.
    ConnectionAccepted = "connection.accepted",
    /// A connection is accepted, and systemd keeps it.
    ConnectionKept = "connection.kept",
    /// A request is journaled, and still in the socket.
    ConnectionNoted = "connection.request-noted",
    /// A request is journaled, and removed from the socket.
    ConnectionTaken = "connection.request-taken",
    /// A response is journaled, and its request still counts as unanswered.
    ConnectionAnswered = "connection.response-noted",
    /// A response is journaled, and no byte of it is sent.
    ConnectionUnsent = "connection.response-unsent",
    /// A response is sent.
    ConnectionSent = "connection.response-sent",
    /// The FIFO of a client is open, and only this process has it.
    StreamOpened = "stream.opened",
    /// The connection of the OCI runtime to a console socket is accepted, and only this process has it.
    ConsoleAccepted = "console.accepted",
    /// That connection is kept.
    ConsoleKept = "console.kept",
    /// The terminal has come, and is still in that connection.
    ConsoleReceived = "console.received",
    /// The terminal is kept, and is still in that connection.
    ConsoleStored = "console.stored",
    /// Create has written the record.
    CreateRecorded = "create.recorded",
    /// Create has opened the streams.
    CreateOpened = "create.streams-opened",
    /// systemd is asked for the container's unit.
    CreateBegun = "create.unit-begun",
    /// The container's unit is up.
    CreateUp = "create.unit-up",
    /// The copying of output has begun.
    CreatePumping = "create.pumps-started",
    /// The unit and the container have the same limits.
    CreateLimited = "create.limits-joined",
    /// The process is in the record.
    CreateAdopted = "create.adopted",
    /// A Create has failed and is rolled back, and is not answered.
    CreateUndone = "failed-create.rolled-back",
    /// A Start has failed and is rolled back, and is not answered.
    StartUndone = "failed-start.rolled-back",
    /// The record says that init is being started.
    StartRecorded = "start.recorded",
    /// The OCI runtime has started init.
    StartDone = "start.runtime-done",
    /// The record says that init runs.
    StartNoted = "start.noted",
    /// An exec has its directory, and no place in the record.
    ExecPrepared = "exec.prepared",
    /// An exec is in the record.
    ExecNoted = "exec.noted",
    /// The record says that the exec is being started.
    ExecStartRecorded = "exec-start.recorded",
    /// The exec's streams are open.
    ExecStartOpened = "exec-start.streams-opened",
    /// The exec's unit is asked for.
    ExecStartBegun = "exec-start.unit-begun",
    /// It is known what became of the start.
    ExecStartOutcome = "exec-start.outcome",
    /// The copying of its output has begun.
    ExecStartPumping = "exec-start.pumps-started",
    /// The record says that the exec runs.
    ExecStartNoted = "exec-start.noted",
    /// The signal is sent.
    KillSent = "kill.sent",
    /// systemd has frozen the unit.
    PauseDone = "pause.frozen",
    /// The record says that it is paused.
    PauseNoted = "pause.noted",
    /// systemd has thawed the unit.
    ResumeDone = "resume.thawed",
    /// The record says that it runs again.
    ResumeNoted = "resume.noted",
    /// The OCI runtime has set the limits.
    UpdateDone = "update.runtime-done",
    /// The unit has the limits too.
    UpdateShown = "update.shown",
    /// It is on disk that a checkpoint is begun.
    CheckpointRecorded = "checkpoint.recorded",
    /// A container that was paused is frozen by its own cgroup, and not by its unit.
    CheckpointThawed = "checkpoint.unit-thawed",
    /// The OCI runtime has taken the checkpoint.
    CheckpointDone = "checkpoint.runtime-done",
    /// The container is frozen by its unit again.
    CheckpointFrozen = "checkpoint.unit-frozen",
    /// The outcome is on disk.
    CheckpointNoted = "checkpoint.noted",
    /// The rootfs of a container that is to be restored is mounted.
    CreateMounted = "create-checkpoint.mounted",
    /// The record says that the container waits for its restore.
    CreatePrepared = "create-checkpoint.noted",
    /// The record says that the container is being restored.
    RestoreRecorded = "restore.recorded",
    /// The streams of a container that is restored are open.
    RestoreOpened = "restore.streams-opened",
    /// Delete of a task begins.
    DeleteBegun = "delete.begun",
    /// The OCI runtime has forgotten the container.
    DeleteRuntime = "delete.runtime-done",
    /// The container's unit was removed.
    DeleteUnit = "delete.unit-removed",
    /// The answer and the last events are kept, and the record still exists.
    DeleteKept = "delete.answer-kept",
    /// The record was removed.
    DeleteForgotten = "delete.record-removed",
    /// Delete of an exec begins.
    ExecDeleteBegun = "exec-delete.begun",
    /// The exec's unit was removed.
    ExecDeleteUnit = "exec-delete.unit-removed",
    /// The answer is kept, and the exec is in the record.
    ExecDeleteKept = "exec-delete.answer-kept",
    /// The exec is not in the record any more.
    ExecDeleteForgotten = "exec-delete.forgotten",
    /// An end has been reported, and is not in the record.
    ExitSeen = "exit.seen",
    /// An end is in the record.
    ExitNoted = "exit.noted",
    /// An event is noted for containerd, and not sent.
    PublishBegun = "publish.begun",
    /// An event is sent, and nobody has read the answer of containerd.
    PublishSent = "publish.sent",
    /// containerd has taken an event, and the record says that it is owed.
    PublishTaken = "publish.taken",
    /// An accepted event is out of the record.
    PublishNoted = "publish.noted",
    /// The file with a new version of a record is written, and the record is still the old one.
    RecordWritten = "record.written",
    /// A record is replaced, and its new file is still open.
    RecordReplaced = "record.replaced",
    /// A new daemon has taken over what is kept, and looked at nothing.
    RecoverTaken = "recover.fds-taken",
    /// A new daemon is about to recover a task.
    RecoverTask = "recover.task-begun",
    /// A new daemon has taken in the tasks, and serves nobody.
    RecoverTasks = "recover.tasks-taken-in",
}

/// How the step after a point fails.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[cfg_attr(not(feature = "faults"), allow(dead_code))] // only a test asks for a failure
pub enum Failure {
    /// A write to the store: there is no room.
    NoSpace,
    /// A write to the store: the disk fails.
    Io,
    /// Whatever needs a descriptor: there is none, until the test gives the daemon its limit back.
    NoDescriptor,
    /// A call to systemd: the bus refuses it once, because too many calls wait for their replies.
    LimitsExceeded,
    /// A call to systemd: it is not carried out, and there is no reply within the time limit.
    TimedOut,
    /// A call to systemd: it is carried out, and there is no reply within the time limit.
    ReplyLost,
    /// A call to systemd: it is not allowed.
    Denied,
    /// A command of the OCI runtime: somebody kills it.
    RuntimeKilled,
}

#[cfg(feature = "faults")]
mod asked {
    use std::fs::{self, File};

    use nix::sys::resource::{Resource, getrlimit, setrlimit};
    use nix::sys::signal::{Signal, kill};
    use nix::unistd::Pid;

    use super::{Failure, Point};

    /// A test writes here what it asks for.
    const REQUEST: &str = "/run/containerd-shim-systemd-v1.fault";
    /// The failure that is due: the daemon has passed its point. The process that removes the file, the daemon or `launch`,
    /// fails then.
    const DUE: &str = "/run/containerd-shim-systemd-v1.fault.due";

    impl Failure {
        const ALL: [Self; 8] = [
            Self::NoSpace,
            Self::Io,
            Self::NoDescriptor,
            Self::LimitsExceeded,
            Self::TimedOut,
            Self::ReplyLost,
            Self::Denied,
            Self::RuntimeKilled,
        ];

        /// As tests call it.
        fn name(self) -> &'static str {
            match self {
                Self::NoSpace => "no-space",
                Self::Io => "io",
                Self::NoDescriptor => "no-descriptor",
                Self::LimitsExceeded => "limits-exceeded",
                Self::TimedOut => "timed-out",
                Self::ReplyLost => "reply-lost",
                Self::Denied => "denied",
                Self::RuntimeKilled => "runtime-killed",
            }
        }

        fn by_name(name: &str) -> Option<Self> {
            Self::ALL.into_iter().find(|failure| failure.name() == name)
        }
    }

    /// Does what a test has asked for at this point. A request is the name of a point (the daemon ends as by SIGKILL, once);
    /// or, before that name, `crash` (the daemon crashes, each time), `hang` (the thread hangs, each time), `exhaust` (the
    /// thread allocates memory until there is no more, each time), or `fail` and the name of a failure (a step fails, once).
    pub fn point(point: Point) {
        let request = fs::read_to_string(REQUEST).unwrap_or_default();
        let words: Vec<&str> = request.split_whitespace().collect();
        if words.last() != Some(&point.name()) {
            return;
        }
        match words[..] {
            [_] if fs::remove_file(REQUEST).is_ok() => {
                // Nothing of this process runs after the signal.
                let _ = kill(Pid::this(), Signal::SIGKILL);
            }
            ["crash", _] => std::process::abort(),
            ["hang", _] => loop {
                std::thread::park();
            },
            ["exhaust", _] => loop {
                // Not touched, so the machine does not need to have it.
                std::mem::forget(std::hint::black_box(Vec::<u8>::with_capacity(64 << 20)));
            },
            ["fail", failure, _] => match Failure::by_name(failure) {
                Some(Failure::NoDescriptor) if fs::remove_file(REQUEST).is_ok() => take_descriptors(),
                Some(failure) if fs::write(DUE, failure.name()).is_ok() => {
                    // Removed last: the test then knows that the point was passed.
                    let _ = fs::remove_file(REQUEST);
                }
                _ => {}
            },
            _ => {}
        }
    }

    /// No further descriptor can be opened.
    fn take_descriptors() {
        use std::os::fd::AsRawFd;
        let limits = (File::open("/dev/null"), getrlimit(Resource::RLIMIT_NOFILE));
        if let (Ok(next), Ok((_, hard))) = limits {
            // A failure shows in the test: no step fails.
            let _ = setrlimit(Resource::RLIMIT_NOFILE, next.as_raw_fd() as u64, hard);
        }
    }

    /// The one of these failures that is due, if there is one. Afterwards it is no longer due.
    pub fn due(failures: &[Failure]) -> Option<Failure> {
        let failure = Failure::by_name(&fs::read_to_string(DUE).ok()?)?;
        (failures.contains(&failure) && fs::remove_file(DUE).is_ok()).then_some(failure)
    }
}

#[cfg(feature = "faults")]
pub use asked::{due, point};

/// Does nothing in builds without fault points.
#[cfg(not(feature = "faults"))]
#[inline(always)]
pub fn point(_: Point) {}

/// Returns no failure in builds without fault points.
#[cfg(not(feature = "faults"))]
#[inline(always)]
pub fn due(_: &[Failure]) -> Option<Failure> {
    None
}

/// Whether the daemon is to forget everything with its end: connections are plain, and systemd keeps
/// nothing. Tasks that exist when this is switched are lost.
#[cfg(feature = "faults")]
pub fn is_forgetful() -> bool {
    std::env::var_os("CONTAINERD_SHIM_SYSTEMD_FORGETFUL").is_some()
}

/// Builds without fault points keep everything.
#[cfg(not(feature = "faults"))]
#[inline(always)]
pub fn is_forgetful() -> bool {
    false
}
