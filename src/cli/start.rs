//! `start`: prints the daemon's address for containerd, and starts the daemon's units if nobody listens there.
//!
//! Usually this sends nothing over D-Bus and needs no async runtime: the bus and the daemon's socket accept a connection, two
//! small files are written to the bundle, and the address is printed.

use std::ffi::OsString;
use std::fs::File;
use std::io;
use std::path::Path;
use std::time::{Duration, Instant};

use nix::fcntl::Flock;
use protobuf::Message;

use crate::api::messages::{BootstrapParams, BootstrapResult};
use crate::id::TaskKey;
use crate::launch::{core_scheduling, inherited};
use crate::oci::{containerd, namespaces};
use crate::task::request::Containerd;
use crate::transport::sockets::{Leases, Socket};
use crate::unit::manager::Manager;
use crate::unit::properties;
use crate::unit::systemd::{Queries, Starts, Stops};
use crate::unit::{self, name, service_d, watch};
use crate::{cgroup, config, doctor, files, sys};

use super::arguments::Flags;
use super::serving::Question;
use super::{Failure, block_on, check_user, key_of, print, read_stdin};

/// How often a bus that does not run is looked for.
const BUS_PAUSE: Duration = Duration::from_millis(50);

pub(super) fn run(flags: &Flags) -> Result<(), Failure> {
    let here = std::env::current_dir()
        .map_err(|error| Failure(format!("can't read the working directory: {error}")))?;
    let key = key_of(flags, &here)?;
    check_user()?;
    check_host()?;
    let core_scheduling = core_scheduling::is_requested();
    if core_scheduling {
        core_scheduling::check(&here, &key.id).map_err(Failure::new)?;
    }
    let input = read_stdin()?;
    let caller = Caller::from(flags, &input);
    let namespaces = namespaces::of_caller().map_err(Failure::new)?;
    let containerd = Containerd { namespaces, core_scheduling, ..containerd(flags, &caller) };
    containerd::write_containerd(&here, &containerd).map_err(Failure::new)?;
    if let Some(options) = caller.options(&input)? {
        containerd::write_options(&here, &options).map_err(Failure::new)?;
    }
    wait_for_bus()?;
    bring_up()?;
    let address = format!("unix://{}", caller.socket(&key)?.path().display());
    wait_for_daemon()?;
    containerd::write_address(&here, &address).map_err(Failure::new)?;
    print(&caller.answer(address)?)
}

/// How the calling containerd talks to a shim; see the table of answers at [`Caller::answer`].
enum Caller {
    /// 2.3 and later: a bootstrap message on standard input.
    Bootstrap(Box<BootstrapParams>),
    /// 1.7 to 2.2: its environment names the versions that it knows.
    Json,
    /// 1.6
    Plain,
}

impl Caller {
    /// The same bytes can be both a valid bootstrap message and valid runtime options of an older containerd. They
    /// are a bootstrap message only if they repeat the values of the flags.
    fn from(flags: &Flags, input: &[u8]) -> Self {
        match BootstrapParams::parse_from_bytes(input) {
            Ok(message) if message.instance_id == flags.id && message.namespace == flags.namespace => {
                Self::Bootstrap(Box::new(message))
            }
            Ok(_) | Err(_) if std::env::var_os("MAX_SHIM_VERSION").is_some() => Self::Json,
            Ok(_) | Err(_) => Self::Plain,
        }
    }

    /// The runtime's options, as a serialized `google.protobuf.Any`; `None` if there are none. containerd also passes
    /// them to Create, but not to CreateSandbox.
    fn options(&self, input: &[u8]) -> Result<Option<Vec<u8>>, Failure> {
        let options = match self {
            Self::Bootstrap(message) => {
                let first = message.extensions.first().and_then(|extension| extension.value.as_ref());
                first.map(Message::write_to_bytes).transpose().map_err(Failure::new)?
            }
            Self::Json | Self::Plain => Some(input.to_vec()),
        };
        Ok(options.filter(|options| !options.is_empty()))
    }

    /// The socket for this caller: a leased one for a version that may not send the namespace, and for a containerd other than
    /// the usual one.
    fn socket(&self, key: &TaskKey) -> Result<Socket, Failure> {
        let TaskKey { owner, namespace, .. } = key;
        let namespace = match self {
            Self::Bootstrap(_) if owner.is_usual() => return Ok(Socket::Any),
            Self::Bootstrap(_) => None,
            Self::Json | Self::Plain => Some(namespace),
        };
        let claimed = Leases::new(config::STATE_DIR).claim(owner, namespace);
        let claimed = claimed.map_err(|error| {
            Failure(format!("can't claim a socket for {key} in {}: {error}{}", config::STATE_DIR, advice()))
        })?;
        Ok(claimed.unwrap_or(Socket::Any))
    }

    /// 1.6 only accepts a bare address, 1.7 refuses a version above 2, and 2.0 to 2.2 can't be distinguished from 1.7.
    fn answer(&self, address: String) -> Result<Vec<u8>, Failure> {
        match self {
            Self::Bootstrap(_) => {
                let result = BootstrapResult {
                    version: 3,
                    address,
                    protocol: "ttrpc".to_owned(),
                    ..BootstrapResult::default()
                };
                result.write_to_bytes().map_err(Failure::new)
            }
            Self::Json => Ok(serde_json::json!({"version": 2, "address": address, "protocol": "ttrpc"})
                .to_string()
                .into()),
            Self::Plain => Ok(address.into_bytes()),
        }
    }
}

/// Whether the message that containerd writes to `start` is a bootstrap message for this task.
#[cfg(any(test, fuzzing))]
pub fn is_bootstrap(namespace: &str, id: &str, input: Vec<u8>) -> bool {
    let flags = Flags { namespace: namespace.to_owned(), id: id.to_owned(), ..Flags::default() };
    matches!(Caller::from(&flags, &input), Caller::Bootstrap(_))
}

/// What the daemon must know about the calling containerd.
fn containerd(flags: &Flags, caller: &Caller) -> Containerd {
    let variable = |name: &str| std::env::var(name).unwrap_or_default();
    let (mut ttrpc_address, mut grpc_address) = (variable("TTRPC_ADDRESS"), variable("GRPC_ADDRESS"));
    if let Caller::Bootstrap(message) = caller {
        ttrpc_address.clone_from(&message.containerd_ttrpc_address);
        grpc_address.clone_from(&message.containerd_grpc_address);
    }
    if grpc_address.is_empty() {
        grpc_address.clone_from(&flags.address);
    }
    if ttrpc_address.is_empty() {
        ttrpc_address = format!("{grpc_address}.ttrpc");
    }
    Containerd {
        ttrpc_address,
        grpc_address,
        path: variable("PATH"),
        rlimits: inherited::limits(),
        processors: inherited::processors(),
        scheduling: inherited::scheduling(),
        core_scheduling: false,
        environment: environment(),
        namespaces: None,
    }
}

/// The environment of containerd, which the OCI runtime and its hooks inherit under containerd-shim-runc-v2:
/// proxies, configuration directories, drivers' settings. A variable that is not text is left out.
fn environment() -> Vec<String> {
    let text = |(name, value): (OsString, OsString)| {
        Some(format!("{}={}", name.into_string().ok()?, value.into_string().ok()?))
    };
    std::env::vars_os().filter_map(text).collect()
}

fn check_host() -> Result<(), Failure> {
    if !Path::new("/run/systemd/system").is_dir() {
        return Err(Failure::new(
            "io.containerd.systemd.v1 needs systemd as the init system of this machine",
        ));
    }
    if !cgroup::is_unified() {
        return Err(Failure::new(
            "io.containerd.systemd.v1 needs cgroup v2 alone at /sys/fs/cgroup: boot with systemd.unified_cgroup_hierarchy=1",
        ));
    }
    Ok(())
}

/// True if somebody accepts connections to the socket: systemd, which starts the daemon. Its queue may be full of connections that
/// no daemon could accept.
fn listens() -> bool {
    match sys::connect_without_waiting(Path::new(config::SOCKET)) {
        Ok(_) => true,
        Err(error) => error.kind() == io::ErrorKind::WouldBlock,
    }
}

/// What to do when the daemon can't be reached: the reason may be anywhere on the machine.
fn advice() -> String {
    format!("; run {} doctor, which says what to do", name::DAEMON)
}

/// Starts the daemon's units if its socket does not accept connections. One of several callers does it, and the others
/// wait.
pub(super) fn bring_up() -> Result<(), Failure> {
    shield_daemon();
    if listens() {
        return Ok(());
    }
    let _lock = lock()?;
    if listens() {
        return Ok(());
    }
    start_daemon(false)?;
    if !listens() {
        start_daemon(true)?;
    }
    if listens() {
        Ok(())
    } else {
        let found = format!("{} is active, but nobody answers on {}", name::DAEMON_SOCKET, config::SOCKET);
        Err(Failure(found + &advice()))
    }
}

/// Keeps other callers from starting the units. After a time limit, the caller continues without the lock: two processes that
/// start the units at the same time do no harm, but a process that waits for ever starts no container.
fn lock() -> Result<Option<Flock<File>>, Failure> {
    files::lock(Path::new(config::START_LOCK), config::START_LIMIT)
        .map_err(|error| Failure(format!("can't lock {}: {error}", config::START_LOCK)))
}

/// Starts the units of the daemon ([`start_units`]). An error names the reason, if `doctor` finds it.
fn start_daemon(again: bool) -> Result<(), Failure> {
    let program = std::env::current_exe()
        .map_err(|error| Failure(format!("can't find the path of this program: {error}")))?;
    block_on(start_units(&program, again))?.map_err(|error| {
        use unit::error::Error::{Dependency, Job, Masked, Refused, Setting};
        let is_of_systemd = matches!(error, Job { .. } | Refused { .. } | Dependency { .. });
        let reason = is_of_systemd.then(doctor::fault_of_daemon).flatten();
        // The error or the reason may say already what to do.
        let rest = match (reason, &error) {
            (Some(reason), _) => format!("; {reason}"),
            (None, Masked { .. } | Setting { .. }) => String::new(),
            (None, _) => advice(),
        };
        Failure(format!("can't start the runtime's daemon: {error}{rest}"))
    })
}

/// What keeps systemd from starting the daemon by itself.
#[derive(Clone, Copy, PartialEq)]
enum Obstacle {
    /// systemd has lost the settings of the daemon's units, and the daemon has ended. systemd has closed the daemon's sockets, and
    /// only the guard of the daemon still has them.
    LostUnits,
    /// systemd has lost the job with which it was about to restart the daemon.
    LostRestart,
}

/// Starts the daemon if systemd does not do so by itself. True if there was such an obstacle.
fn overcome_obstacle() -> Result<bool, Failure> {
    // If systemd can't be reached, it can't start units either.
    let look = || -> Result<Option<Obstacle>, Failure> {
        let look = block_on(async { tokio::time::timeout(config::LOST_LIMIT, obstacle()).await })?;
        Ok(look.ok().and_then(Result::ok).flatten())
    };
    if look()?.is_none() {
        return Ok(false);
    }
    let _lock = lock()?;
    // Another caller may have started it meanwhile.
    match look()? {
        Some(Obstacle::LostUnits) => start_daemon(false)?,
        Some(Obstacle::LostRestart) => request_start()?,
        None => {}
    }
    Ok(true)
}

/// The obstacle, if there is one.
async fn obstacle() -> Result<Option<Obstacle>, unit::error::Error> {
    let manager = Manager::connected().await?;
    let (socket, service) = (name::daemon_socket(), name::daemon_service());
    let state = match manager.lost_state(&service).await? {
        None if manager.lost_state(&socket).await?.is_none() => {
            return Ok(manager.has_lost_restart(&service).await?.then_some(Obstacle::LostRestart));
        }
        None => manager.active_state(&service).await?,
        lost => lost,
    };
    let has_ended = matches!(state.as_deref(), None | Some("inactive" | "failed"));
    Ok(has_ended.then_some(Obstacle::LostUnits))
}

/// Asks systemd for a start of the daemon. Whether it succeeds, [`wait_for_daemon`] finds out.
fn request_start() -> Result<(), Failure> {
    let service = name::daemon_service();
    let request = async { Manager::connected().await?.start_without_waiting(&service).await };
    let limited = async { tokio::time::timeout(config::START_LIMIT, request).await };
    let requested = block_on(limited)?.unwrap_or_else(|_| Err(unit::error::Error::no_answer()));
    requested.map_err(|error| Failure(format!("can't start the runtime's daemon: {error}{}", advice())))
}

/// Waits until the daemon serves calls. The call that follows `start` would wait without a limit for a daemon that can't start.
fn wait_for_daemon() -> Result<(), Failure> {
    let begun = Instant::now();
    let mut question = Question::new(Path::new(config::SERVING), Path::new(config::SOCKET));
    if !matches!(question.is_answered(config::LOST_LIMIT), Ok(true)) && overcome_obstacle()? {
        // The first one may wait in the queue of a socket that nobody reads any more.
        question = Question::new(Path::new(config::SERVING), Path::new(config::SOCKET));
    }
    let mut limit = config::REASON_LIMIT;
    loop {
        let (problem, is_last) = match question.is_answered(limit.saturating_sub(begun.elapsed())) {
            Ok(true) => return Ok(()),
            Ok(false) => {
                (format!("has not answered for {} s", limit.as_secs()), limit == config::SERVING_LIMIT)
            }
            Err(error) => (format!("can't be reached at {}: {error}", config::SOCKET), true),
        };
        let reason = doctor::fault_of_daemon();
        if reason.is_none() && !is_last {
            limit = config::SERVING_LIMIT;
            continue;
        }
        // A reason that was found says what to do.
        let reason =
            reason.unwrap_or_else(|| format!("see systemctl status {}{}", name::DAEMON_SERVICE, advice()));
        return Err(Failure(format!("the runtime's daemon {problem}: {reason}")));
    }
}

/// Waits until the bus accepts connections. A daemon that is starting serves no call before it is connected to the bus, so the
/// call that follows `start` would wait without a limit.
fn wait_for_bus() -> Result<(), Failure> {
    if unit::bus::check().is_ok() {
        return Ok(());
    }
    let failed = |error: unit::error::Error| Failure(error.to_string() + &advice());
    let begun = Instant::now();
    block_on(async {
        while let Err(error) = unit::bus::check() {
            if begun.elapsed() >= config::BUS_LIMIT {
                return Err(failed(error));
            }
            // No event announces that the bus is back.
            tokio::time::sleep(BUS_PAUSE).await;
        }
        Ok(())
    })?
}

/// Protects the daemon from drop-ins for all services with which the daemon could not start. An error is not printed:
/// the daemon may run in spite of it, and containerd would read the printed text as the answer.
fn shield_daemon() {
    if service_d::shield(name::DAEMON_SERVICE).unwrap_or(false) {
        let _ = block_on(async {
            tokio::time::timeout(config::START_LIMIT, Manager::connect_and_reload()).await
        });
    }
}

/// Starts the units of the daemon. With `again`, the socket's unit is active, and somebody has removed its file: systemd makes a
/// new file if the socket is started again.
async fn start_units(program: &Path, again: bool) -> Result<(), unit::error::Error> {
    let manager = std::sync::Arc::new(Manager::default());
    let (listening, first) = tokio::sync::oneshot::channel();
    let watching = tokio::spawn(watch::run(manager.clone(), listening));
    let up = async {
        first.await.map_err(|_| unit::error::Error::no_answer())?;
        let systemd = manager.supported_version().await?;
        let (socket, service) = (name::daemon_socket(), name::daemon_service());
        for unit in [&socket, &service] {
            if manager.lost_state(unit).await?.is_some() {
                manager.forget_lost(unit).await?;
            }
        }
        // An older systemd closes the connections of clients when the service is stopped, which this needs.
        if again && systemd.has_fd_store_preserve() {
            manager.stop(&socket).await?;
        }
        match manager.start(&socket).await {
            Err(unit::error::Error::NotLoaded { .. }) => {}
            Err(unit::error::Error::Job { .. }) => {
                // systemd starts no socket while its service runs, which happens if only the socket was stopped.
                manager.stop(&service).await?;
                return manager.start(&socket).await;
            }
            installed => return installed,
        }
        let command = [program.to_string_lossy().into_owned(), "serve".to_owned()];
        let daemon = properties::daemon_service(systemd, &command);
        let aux = Some((&service, &daemon));
        let listening = properties::daemon_socket(Socket::all().map(Socket::path));
        match manager.start_transient_with(&socket, &listening, aux).await {
            // The service is loaded: it was stopped, but other units reference it.
            Err(unit::error::Error::Exists { .. }) => manager.start_transient(&socket, &listening).await,
            started => started,
        }
    };
    let result = tokio::time::timeout(config::START_LIMIT, up).await;
    watching.abort();
    result.map_err(|_: tokio::time::error::Elapsed| unit::error::Error::no_answer())?
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::api::messages::GenericOptions;

    fn flags() -> Flags {
        Flags { namespace: "default".to_owned(), id: "web".to_owned(), ..Flags::default() }
    }

    #[test]
    fn a_bootstrap_message_gets_a_bootstrap_answer() {
        let message = BootstrapParams {
            instance_id: "web".to_owned(),
            namespace: "default".to_owned(),
            containerd_ttrpc_address: "/run/t.sock".to_owned(),
            ..BootstrapParams::default()
        };
        let caller = Caller::from(&flags(), &message.write_to_bytes().unwrap());
        assert_eq!(containerd(&flags(), &caller).ttrpc_address, "/run/t.sock");
        let answer = caller.answer("unix:///x".to_owned()).unwrap();
        let answer = BootstrapResult::parse_from_bytes(&answer).unwrap();
        assert_eq!(
            (answer.version, answer.address.as_str(), answer.protocol.as_str()),
            (3, "unix:///x", "ttrpc")
        );
    }

    #[test]
    fn options_that_also_parse_as_a_bootstrap_message_stay_options() {
        let options = GenericOptions {
            type_url: "x".to_owned(),
            config_path: "/etc/x.toml".to_owned(),
            ..GenericOptions::default()
        };
        let caller = Caller::from(&flags(), &options.write_to_bytes().unwrap());
        assert!(!matches!(caller, Caller::Bootstrap(_)));
    }

    #[test]
    fn the_oldest_containerd_gets_a_bare_address() {
        assert_eq!(Caller::Plain.answer("unix:///x".to_owned()).unwrap(), b"unix:///x");
        let json = Caller::Json.answer("unix:///x".to_owned()).unwrap();
        let json: serde_json::Value = serde_json::from_slice(&json).unwrap();
        assert_eq!(json, serde_json::json!({"version": 2, "address": "unix:///x", "protocol": "ttrpc"}));
    }
}
