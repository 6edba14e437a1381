//! The properties of the units that the daemon starts (pure).
//!
//! Each function returns the property list of one kind of unit. Two rules decide every line: no default of systemd may
//! change a container that runc.v2 would run without that default, and `systemctl` and `journalctl` show everything that
//! they can show.

use std::os::fd::BorrowedFd;
use std::path::{Path, PathBuf};
use std::time::Duration;

use zbus::Variant;

use crate::config;
use crate::id::UnitName;

use super::annotation::Additions;
use super::{exec_flags, fd_store, name};

/// The properties of a transient unit, as `StartTransientUnit` takes them.
#[derive(Debug)]
pub struct Properties(pub(super) Vec<(&'static str, Variant<'static>)>);

#[cfg(any(test, fuzzing))]
impl Properties {
    /// All properties, in the order in which systemd gets them.
    pub fn all(&self) -> &[(&'static str, Variant<'static>)] {
        &self.0
    }
}

/// The version of systemd, and what systemd can do by it. The one place for differences between versions.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct SystemdVersion {
    number: u32,
}

impl SystemdVersion {
    /// From the manager's `Version` property: `257.13-1~deb13u1`, `252 (252.39-1)`, `v258-rc1`.
    pub fn parse(text: &str) -> Option<Self> {
        let digits: String = text
            .trim_start_matches(|c: char| !c.is_ascii_digit())
            .chars()
            .take_while(char::is_ascii_digit)
            .collect();
        Some(Self { number: digits.parse().ok()? })
    }

    /// The major version.
    pub fn number(self) -> u32 {
        self.number
    }

    /// True if this program supports the version.
    pub fn supported(self) -> bool {
        self.number >= config::OLDEST_SYSTEMD
    }

    /// True if systemd has `FileDescriptorStorePreserve=` (254).
    pub fn has_fd_store_preserve(self) -> bool {
        self.number >= 254
    }

    /// True if systemd has `RestartSteps=` and `RestartMaxDelaySec=` (254).
    pub fn has_restart_steps(self) -> bool {
        self.number >= 254
    }
}

/// syslog(3): error conditions.
const LOG_ERR: i32 = 3;

/// journald must not read `<0>` at the beginning of a line as a priority: it would show the line on every terminal, and
/// remove the prefix from the text.
const NO_LEVEL_PREFIX: (&str, Variant<'static>) = ("SyslogLevelPrefix", Variant::Bool(false));

/// By default, systemd refuses the sixth start of a unit within 10 seconds. A container can be started as often as its client
/// likes, and no container starts without the daemon and its socket.
const NO_START_LIMIT: (&str, Variant<'static>) = ("StartLimitIntervalUSec", Variant::U64(0));

/// In an interval as short as this, no number of lines reaches journald's limit. systemd takes 0 for "not set", and journald uses
/// the limit of journald.conf then.
const NO_LOG_LIMIT: Duration = Duration::from_micros(1);

/// "No limit", for every 64-bit limit of systemd.
const INFINITY: u64 = u64::MAX;

/// What people see of a unit: its description, the fields of its journal entries, and its slice.
#[derive(Clone, Debug)]
pub struct UnitMetadata<'a> {
    /// Description=
    pub description: &'a str,
    /// SyslogIdentifier=
    pub identifier: &'a str,
    /// Fields of every journal entry of the unit.
    pub fields: &'a [(String, String)],
    /// Slice=
    pub slice: &'a UnitName,
    /// The sandbox of the container's pod: if both are stopped, the container is stopped first.
    pub sandbox: Option<&'a UnitName>,
}

/// The `Type=` of the units of containers, and of no other unit that this program makes.
pub const CONTAINER_TYPE: &str = "forking";

/// A container's unit.
///
/// `Type=forking`: the OCI runtime writes the pid of the container's init to `pid_file` and exits; systemd makes the init
/// the unit's main process. `RemainAfterExit` and `CollectMode=inactive` keep the exit code readable until the unit is
/// stopped or reset. systemd ends a start that takes longer than `start_limit`. `launched`: see [`started_once`].
pub fn container(
    shown: &UnitMetadata<'_>,
    command: &[String],
    environment: &[String],
    pid_file: &Path,
    launched: &Path,
    start_limit: Duration,
    notify: bool,
) -> Properties {
    let mut list = shown_as(shown);
    list.extend([
        ("Type", CONTAINER_TYPE.into()),
        ("PIDFile", path(pid_file)),
        ("GuessMainPID", false.into()),
        started_once(launched),
        ("ExecStart", exec_start(command, ExitCode::Counts)),
        ("Environment", environment.to_vec().into()),
        // Only containerd starts containers, even if a drop-in for all services sets `Restart=`.
        (
            "RestartPreventExitStatus",
            ((0..=255).collect::<Vec<i32>>(), (1..=64).collect::<Vec<i32>>()).into(),
        ),
        ("Delegate", true.into()),
        ("TimeoutStartUSec", usec(start_limit).into()),
        ("StandardOutput", "journal".into()),
        ("StandardError", "journal".into()),
        ("CPUAccounting", true.into()),
        ("MemoryAccounting", true.into()),
        ("TasksAccounting", true.into()),
        ("IOAccounting", true.into()),
    ]);
    if notify {
        // The daemon sends notifications as the main process (`unit/relay.rs`). A container into which the host's /run
        // is bound sends them to systemd's own socket, from any of its processes.
        list.push(("NotifyAccess", "all".into()));
    }
    list.extend(for_containers_processes());
    list.extend(bound_to_system(&AFTER_CONTAINERS));
    Properties(list)
}

/// Refuses a start of the unit once `launched` exists. Somebody may call `systemctl restart` or `start`. `launch` refuses to
/// run a second time as well, but by then systemd has forgotten how the process ended, and would report the end of `launch`.
fn started_once(launched: &Path) -> (&'static str, Variant<'static>) {
    let is_trigger = false;
    let is_negated = true;
    (
        "Asserts",
        vec![("AssertPathExists", is_trigger, is_negated, launched.to_string_lossy().into_owned())].into(),
    )
}

/// The properties that a container's unit and an exec's unit share. Most of them replace defaults of systemd that would change
/// what the processes of a container find under containerd-shim-runc-v2.
fn for_containers_processes() -> [(&'static str, Variant<'static>); 11] {
    [
        ("RemainAfterExit", true.into()),
        ("CollectMode", "inactive".into()),
        NO_START_LIMIT,
        ("KillMode", "mixed".into()),
        ("TimeoutStopUSec", usec(config::STOP_LIMIT).into()),
        ("OOMPolicy", "continue".into()),
        // `DefaultOOMScoreAdjust=` of system.conf is made for services. The spec of a container says another value.
        ("OOMScoreAdjust", 0_i32.into()),
        ("TasksMax", INFINITY.into()),
        ("IgnoreSIGPIPE", false.into()),
        ("KeyringMode", "inherit".into()),
        ("StandardInput", "null".into()),
    ]
}

impl Properties {
    /// These properties and the additions. A later property overrides an earlier one, or extends it if it is a list.
    pub(super) fn with<'a>(&self, additions: &'a Additions) -> Vec<(&'a str, Variant<'static>)> {
        let more = additions.0.iter().map(|(name, value)| (name.as_str(), value.clone()));
        self.0.iter().cloned().chain(more).collect()
    }
}

/// An exec's unit.
///
/// `launch` runs the OCI runtime, which starts the process and exits. `launch` then hands the process over to systemd as
/// the unit's main process. The process is in the container's cgroup; the unit's own cgroup is empty.
///
/// `Type=oneshot` keeps the unit `activating` while the process runs. Only in this state does systemd always wait for
/// the exit code. In the state `running` it checks whether the main process is alive as soon as the unit's cgroup is
/// empty or `READY=1` arrives. If the process has just ended, systemd drops the process and its code, as the process was
/// not started by systemd (service.c, 252 to 262).
///
/// No exit code of the process makes the unit fail.
///
/// systemd logs two messages about each such process (that it is not its child, and how it ended). Health probes would
/// fill the journal with them, so only errors are logged.
///
/// `launched`: see [`started_once`].
///
/// The unit is ordered after that of its container alone, which is ordered after the services that it needs: at shutdown
/// systemd stops the exec first. Each unit in `After=` costs two signals about that unit.
pub fn exec(
    description: &str,
    container: &UnitName,
    command: &[String],
    environment: &[String],
    launched: &Path,
) -> Properties {
    let mut list: Vec<(&'static str, Variant<'static>)> = vec![
        ("Description", description.to_owned().into()),
        ("Slice", name::DAEMON_SLICE.into()),
        ("Type", "oneshot".into()),
        started_once(launched),
        ("NotifyAccess", "main".into()),
        // With a descriptor store, systemd makes `NotifyAccess=none` of a drop-in for all services `main` (service.c, 252
        // to 262), and `launch` can hand the process over. Nothing is ever stored.
        ("FileDescriptorStoreMax", 1_u32.into()),
        ("ExecStart", exec_start(command, ExitCode::Ignored)),
        ("Environment", environment.to_vec().into()),
        ("TimeoutStartUSec", INFINITY.into()),
        ("StandardOutput", "null".into()),
        ("StandardError", "null".into()),
        ("LogLevelMax", LOG_ERR.into()),
        NO_LEVEL_PREFIX,
    ];
    list.extend(for_containers_processes());
    list.extend(bound_to_system(&[container.as_str()]));
    Properties(list)
}

/// The unit of a `binary://` logger.
///
/// A logger that ends while its process still writes is started again. Until then output waits in the pipes, and the
/// process waits once they are full.
pub fn logger(shown: &UnitMetadata<'_>, command: &[String]) -> Properties {
    let mut list = shown_as(shown);
    let nothing_to_log: Variant<'static> =
        (vec![i32::from(config::NOTHING_TO_LOG)], Vec::<i32>::new()).into();
    list.extend([
        ("Type", "exec".into()),
        ("ExecStart", exec_start(command, ExitCode::Counts)),
        ("CollectMode", "inactive-or-failed".into()),
        ("Restart", "always".into()),
        ("RestartUSec", usec(config::LOGGER_PAUSE).into()),
        NO_START_LIMIT,
        ("RestartPreventExitStatus", nothing_to_log.clone()),
        ("SuccessExitStatus", nothing_to_log),
        ("TimeoutStopUSec", usec(config::LOGGER_STOP_LIMIT).into()),
        ("StandardInput", "null".into()),
    ]);
    list.extend(bound_to_system(&AFTER_CONTAINERS));
    Properties(list)
}

/// The unit that waits for a call while the daemon is stopped. It ends once its standard input, `wake_fd`, is readable.
/// systemd starts it once the daemon has ended. It is not in the daemon's slice: while an administrator stops that slice, systemd
/// starts nothing in it.
///
/// # Errors
/// The descriptor can't be duplicated.
pub fn wake(command: &[String], wake_fd: BorrowedFd<'_>) -> Result<Properties, std::io::Error> {
    let mut list: Vec<(&'static str, Variant<'static>)> = vec![
        ("Description", "Starts the containerd shim at the next call".into()),
        ("Type", "exec".into()),
        ("ExecStart", exec_start(command, ExitCode::Counts)),
        ("CollectMode", "inactive-or-failed".into()),
        NO_START_LIMIT,
        ("StandardInputFileDescriptor", Variant::from(zbus::Fd::from(wake_fd.try_clone_to_owned()?))),
    ];
    list.extend(bound_to_system(&[name::DAEMON_SERVICE]));
    Ok(Properties(list))
}

/// A pod's slice. It has to be up before the first unit in it, so it can't be `StopWhenUnneeded=`: systemd would stop it
/// at once, and refuse the unit meanwhile. The daemon stops it when it is empty.
pub fn pod_slice(description: &str) -> Properties {
    Properties(vec![("Description", description.to_owned().into()), ("DefaultDependencies", false.into())])
}

/// The slice that keeps the order of stops at shutdown: systemd stops it after the containers, which are ordered after it, and
/// before the daemon and the services of the host that containers need until they have ended. containerd must learn of their exits.
///
/// Containers are not ordered after those services themselves: systemd would delay the start of each container for as long as
/// one of the services has a job. A service that runs a container in its own `ExecStartPost=` would wait for itself.
///
/// The slice contains no unit. Of the units that do nothing, only slices can be transient. It is not ordered after Docker's daemon,
/// which stops its containers itself at the same time.
///
/// The daemon's service names the slice, and not the other way round: the slice would keep the service loaded, and an installed or a
/// masked unit could not take the place of a transient one that is stopped.
pub fn order_slice() -> Properties {
    let mut list = vec![("Description", "Order of stops at shutdown: containers, then containerd".into())];
    list.extend(bound_to_system(&["network.target", "dbus.service", "containerd.service"]));
    Properties(list)
}

/// The daemon's socket if no packaged unit is installed. Same as
/// `units/containerd-shim-systemd-v1.socket`.
pub fn daemon_socket(paths: impl Iterator<Item = PathBuf>) -> Properties {
    let listen: Vec<(&str, String)> =
        paths.map(|path| ("Stream", path.to_string_lossy().into_owned())).collect();
    Properties(vec![
        ("Description", "Socket of the containerd shim for systemd units".into()),
        ("Listen", listen.into()),
        ("SocketMode", 0o600_u32.into()),
        ("RemoveOnStop", true.into()),
        ("Backlog", 4096_u32.into()),
        NO_START_LIMIT,
        ("DefaultDependencies", false.into()),
        ("IgnoreOnIsolate", true.into()),
        ("Conflicts", vec!["shutdown.target"].into()),
        ("Before", vec!["shutdown.target"].into()),
    ])
}

/// The daemon's service if no packaged unit is installed. Same as
/// `units/containerd-shim-systemd-v1.service`.
pub fn daemon_service(systemd: SystemdVersion, command: &[String]) -> Properties {
    let mut list: Vec<(&'static str, Variant<'static>)> = vec![
        ("Description", "containerd shim for systemd units".into()),
        ("Type", "notify".into()),
        ("NotifyAccess", "main".into()),
        ("ExecStart", exec_start(command, ExitCode::Counts)),
        ("Slice", name::DAEMON_SLICE.into()),
        ("Restart", "always".into()),
        // The pause keeps a daemon that crashes at every start from using a whole processor.
        ("RestartUSec", usec(Duration::from_millis(20)).into()),
        NO_START_LIMIT,
        // The exit code of a daemon that was started without its socket: another start would not help.
        ("RestartPreventExitStatus", (vec![2_i32], Vec::<i32>::new()).into()),
        ("WatchdogUSec", usec(Duration::from_secs(10)).into()),
        // Recovery may take long. The watchdog ends a daemon that hangs.
        ("TimeoutStartUSec", INFINITY.into()),
        ("TimeoutStopUSec", usec(Duration::from_secs(10)).into()),
        // A command of the OCI runtime that an earlier version of the daemon started in this cgroup may finish: its
        // container could die with it. This version starts no commands here.
        ("KillMode", "process".into()),
        ("FileDescriptorStoreMax", fd_store::STORE_LIMIT.into()),
        // journald counts the lines of containers that the daemon copies to the journal as the daemon's own.
        ("LogRateLimitIntervalUSec", usec(NO_LOG_LIMIT).into()),
        ("OOMScoreAdjust", (-999_i32).into()),
        ("OOMPolicy", "continue".into()),
        ("TasksMax", INFINITY.into()),
        ("LimitNOFILE", 1_048_576_u64.into()),
        ("DefaultDependencies", false.into()),
        ("IgnoreOnIsolate", true.into()),
        ("Conflicts", vec!["shutdown.target"].into()),
        ("Before", vec!["shutdown.target", name::ORDER_SLICE].into()),
        // The service starts its socket, and keeps the socket loaded.
        ("Wants", vec![name::DAEMON_SOCKET].into()),
        ("After", vec!["dbus.socket", "dbus.service", "systemd-journald.socket", name::DAEMON_SOCKET].into()),
    ];
    if systemd.has_fd_store_preserve() {
        list.push(("FileDescriptorStorePreserve", "yes".into()));
    }
    if systemd.has_restart_steps() {
        list.push(("RestartSteps", 20_u32.into()));
        list.push(("RestartMaxDelayUSec", usec(Duration::from_millis(100)).into()));
    }
    // As the packaged service (`ExecStart=+`), which may meet drop-ins for all services later.
    Properties(exec_flags::unrestricted(&list))
}

fn shown_as(shown: &UnitMetadata<'_>) -> Vec<(&'static str, Variant<'static>)> {
    let fields: Vec<Vec<u8>> =
        shown.fields.iter().map(|(name, value)| format!("{name}={value}").into_bytes()).collect();
    let mut list = vec![
        ("Description", shown.description.to_owned().into()),
        ("SyslogIdentifier", shown.identifier.to_owned().into()),
        ("LogExtraFields", fields.into()),
        ("Slice", shown.slice.to_string().into()),
        NO_LEVEL_PREFIX,
    ];
    // Units are stopped in the reverse order.
    list.extend(shown.sandbox.map(|sandbox| ("After", vec![sandbox.as_str().to_owned()].into())));
    list
}

/// The unit that systemd stops after the containers. Not the daemon's service: systemd would not start the daemon again while one
/// container stops, which can take minutes (`job_compare`, 252 to 262: of two units, the stop of the later one comes first).
const AFTER_CONTAINERS: [&str; 1] = [name::ORDER_SLICE];

/// Dependencies in place of the default ones, which order a unit after `sysinit.target` and cost three signals per start.
/// At shutdown systemd stops the unit before those in `after`.
fn bound_to_system(after: &[&str]) -> Vec<(&'static str, Variant<'static>)> {
    vec![
        ("DefaultDependencies", false.into()),
        ("IgnoreOnIsolate", true.into()),
        ("Conflicts", vec!["shutdown.target"].into()),
        ("Before", vec!["shutdown.target"].into()),
        ("After", after.iter().map(|unit| (*unit).to_owned()).collect::<Vec<_>>().into()),
    ]
}

/// Whether the unit fails if its command fails.
#[derive(Clone, Copy, PartialEq, Eq)]
enum ExitCode {
    Counts,
    Ignored,
}

/// A command. systemd expands `$VAR` in it, but its arguments are only names and ids, which contain no `$`.
///
/// `ExecStartEx` could turn the expansion off, but not every version of systemd can read it again ([`exec_flags`]).
fn exec_start(command: &[String], exit_code: ExitCode) -> Variant<'static> {
    let binary = command.first().cloned().unwrap_or_default();
    vec![(binary, command.to_vec(), exit_code == ExitCode::Ignored)].into()
}

fn path(path: &Path) -> Variant<'static> {
    path.to_string_lossy().into_owned().into()
}

fn usec(duration: Duration) -> u64 {
    u64::try_from(duration.as_micros()).unwrap_or(INFINITY)
}

#[cfg(test)]
impl Properties {
    /// Names and values as text.
    fn as_text(&self) -> std::collections::BTreeMap<&'static str, String> {
        self.0.iter().map(|(name, value)| (*name, value.to_string())).collect()
    }
}

#[cfg(test)]
mod tests;
