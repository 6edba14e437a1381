//! The main process of a service, in systemd's terms and in containerd's (pure).

use zbus::Variant;

/// The main process of a service, as systemd sees it.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct MainProcess {
    /// The pid of the running process. `None` if no process runs.
    pub pid: Option<u32>,
    /// The pid of the last process. `None` if there was none.
    pub last_pid: Option<u32>,
    /// How the last process ended. `None` if it did not end.
    pub ended: Option<WaitStatus>,
}

/// How a main process ended, in systemd's terms.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct WaitStatus {
    /// `si_code` of `SIGCHLD`: 1 exited, 2 killed, 3 dumped core.
    pub code: i32,
    /// The exit code, or the signal.
    pub status: i32,
    /// The time of the exit, in microseconds since 1970. `None` if systemd does not know it.
    pub at_usec: Option<u64>,
}

impl WaitStatus {
    /// Killed by SIGKILL.
    pub fn killed_at(at_usec: u64) -> Self {
        const CLD_KILLED: i32 = 2;
        Self { code: CLD_KILLED, status: nix::libc::SIGKILL, at_usec: Some(at_usec) }
    }

    /// The exit status as containerd wants it: 0 to 255, or 128 + the signal.
    pub fn exit_status(self) -> u32 {
        let status = u32::try_from(self.status).unwrap_or(255);
        if self.signal().is_none() { status } else { 128 + status }
    }

    /// The signal that ended the process.
    pub fn signal(self) -> Option<i32> {
        const CLD_EXITED: i32 = 1;
        (self.code != CLD_EXITED).then_some(self.status)
    }
}

/// The value of a service's property `ExecStart` for one command: path, arguments, whether a failure is ignored, the times
/// of start and exit (realtime and monotonic, microseconds each), pid, `si_code` and status.
pub(super) type Command = (String, Vec<String>, bool, u64, u64, u64, u64, u32, i32, i32);

impl MainProcess {
    /// The main process that a command has become, if systemd says how it ended. systemd copies the exit of a main process
    /// to the command that started it (service.c, `service_sigchld_event`, 252 to 262), and forgets it there when it
    /// reloads its units.
    pub(super) fn ended_command(command: &Command) -> Option<Self> {
        let (.., at_usec, _, pid, code, status) = *command;
        let ended = WaitStatus { code, status, at_usec: unless_zero(at_usec) };
        (code != 0).then_some(Self { pid: None, last_pid: unless_zero(pid), ended: Some(ended) })
    }

    /// This process, updated by the values that a signal or a reply contains.
    pub(super) fn updated<'v>(mut self, value: impl Fn(&str) -> Option<&'v Variant<'v>>) -> Self {
        let u32_of = |name| value(name).and_then(|v| u32::try_from(v).ok());
        let i32_of = |name| value(name).and_then(|v| i32::try_from(v).ok());
        self.pid = u32_of("MainPID").map_or(self.pid, unless_zero);
        self.last_pid = u32_of("ExecMainPID").map_or(self.last_pid, unless_zero);
        if let (Some(code), Some(status)) = (i32_of("ExecMainCode"), i32_of("ExecMainStatus")) {
            let at_usec = value("ExecMainExitTimestamp").and_then(|v| u64::try_from(v).ok());
            let at_usec = at_usec.and_then(unless_zero);
            self.ended = (code != 0).then_some(WaitStatus { code, status, at_usec });
        }
        self
    }
}

/// The value of a property in which systemd writes 0 for "none".
fn unless_zero<N: Default + PartialEq>(value: N) -> Option<N> {
    (value != N::default()).then_some(value)
}

#[cfg(test)]
mod tests {
    use std::collections::HashMap;

    use super::*;

    #[test]
    fn exit_statuses_are_those_of_containerd() {
        let ended = |code, status| WaitStatus { code, status, at_usec: None }.exit_status();
        assert_eq!(ended(1, 0), 0);
        assert_eq!(ended(1, 255), 255);
        assert_eq!(ended(2, 9), 137);
        assert_eq!(ended(3, 11), 139);
    }

    #[test]
    fn a_command_has_ended_only_if_systemd_says_how() {
        let command = |code| (String::new(), Vec::new(), true, 1, 2, 77, 4, 7, code, 3);
        assert_eq!(MainProcess::ended_command(&command(0)), None);
        let ended = Some(WaitStatus { code: 2, status: 3, at_usec: Some(77) });
        let expected = MainProcess { pid: None, last_pid: Some(7), ended };
        assert_eq!(MainProcess::ended_command(&command(2)), Some(expected));
    }

    #[test]
    fn a_main_process_has_ended_only_if_systemd_says_how() {
        let values = |code: i32| {
            HashMap::from([
                ("MainPID", Variant::from(0_u32)),
                ("ExecMainCode", Variant::from(code)),
                ("ExecMainStatus", Variant::from(3_i32)),
                ("ExecMainExitTimestamp", Variant::from(77_u64)),
            ])
        };
        let not_yet = values(0);
        assert_eq!(MainProcess::default().updated(|n| not_yet.get(n)).ended, None);
        let ended = values(1);
        let process = MainProcess::default().updated(|n| ended.get(n));
        assert_eq!(process.ended, Some(WaitStatus { code: 1, status: 3, at_usec: Some(77) }));
        assert_eq!(process.pid, None);
    }

    #[test]
    fn a_value_of_zero_means_none_and_a_missing_value_changes_nothing() {
        let before = MainProcess { pid: Some(7), last_pid: Some(7), ended: None };
        assert_eq!(before.updated(|_| None), before);
        let values = HashMap::from([
            ("MainPID", Variant::from(0_u32)),
            ("ExecMainPID", Variant::from(0_u32)),
            ("ExecMainCode", Variant::from(1_i32)),
            ("ExecMainStatus", Variant::from(3_i32)),
            ("ExecMainExitTimestamp", Variant::from(0_u64)),
        ]);
        let ended = Some(WaitStatus { code: 1, status: 3, at_usec: None });
        assert_eq!(before.updated(|n| values.get(n)), MainProcess { pid: None, last_pid: None, ended });
    }
}
