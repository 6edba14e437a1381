//! Which messages from the bus the daemon believes, and what they report (pure).
//!
//! Match rules only select what the bus broadcasts to the daemon. Every user of the machine can also send a signal
//! directly to the daemon's unique name, with any interface, path and member. Only the sender is set by the bus. So the
//! daemon accepts a signal only if it was broadcast, if its sender is systemd's current unique name (or the bus itself, for
//! a change of that name), and if its interface and path are the expected ones.

use std::collections::HashMap;

use zbus::names::OwnedUniqueName;
use zbus::{Message, OwnedObjectPath, Variant};

use crate::id::UnitName;

use super::bus::SERVICE_INTERFACE;
use super::main_process::MainProcess;
use super::name;

/// systemd's name on the bus.
pub const SYSTEMD: &str = "org.freedesktop.systemd1";
/// The interface of systemd's manager.
pub const MANAGER_INTERFACE: &str = "org.freedesktop.systemd1.Manager";
/// The interface that announces changes of properties.
pub const PROPERTIES_INTERFACE: &str = "org.freedesktop.DBus.Properties";
/// The bus's own name, and its interface.
pub const BUS: &str = "org.freedesktop.DBus";
/// The object path of systemd's manager.
pub const MANAGER_PATH: &str = "/org/freedesktop/systemd1";
/// The object path of the bus itself.
pub const BUS_PATH: &str = "/org/freedesktop/DBus";

/// What a signal reports.
#[derive(Debug, PartialEq, Eq)]
pub enum Signal {
    /// The main process of a service may be another one now, or none.
    Service {
        /// The service.
        unit: UnitName,
        main: MainProcess,
    },
    /// A service has a main process that runs. systemd reports this several times.
    Spawned(UnitName),
    /// A job of a unit has ended.
    Job {
        unit: UnitName,
        /// The job's object.
        job: OwnedObjectPath,
        /// `done`, `failed`, …
        result: String,
    },
    /// systemd is about to read its units again. It runs its generators first, which takes tens of milliseconds.
    Reloading,
    /// systemd has reloaded its units.
    Reloaded,
    /// systemd's unique name has changed to this one; `None` while nobody owns systemd's name.
    Owner(Option<OwnedUniqueName>),
}

/// Reads a message. `None` if it is not one of the signals above, or not from the sender that may send it.
///
/// `systemd`: systemd's current unique name.
pub fn read(message: &Message, systemd: Option<&OwnedUniqueName>) -> Option<Signal> {
    let header = message.header();
    if header.message_type() != zbus::message::Type::Signal || header.destination().is_some() {
        return None;
    }
    let (sender, path) = (header.sender()?.as_str(), header.path()?.as_str());
    let is_systemd = systemd.is_some_and(|name| name.as_str() == sender);
    match (header.interface()?.as_str(), header.member()?.as_str()) {
        (PROPERTIES_INTERFACE, "PropertiesChanged") if is_systemd => service(path, message),
        (MANAGER_INTERFACE, "JobRemoved") if is_systemd && path == MANAGER_PATH => job(message),
        (MANAGER_INTERFACE, "Reloading") if is_systemd && path == MANAGER_PATH => {
            // True when the reload begins, false when it is over.
            let begins = message.body().deserialize::<bool>().ok()?;
            Some(if begins { Signal::Reloading } else { Signal::Reloaded })
        }
        (BUS, "NameOwnerChanged") if sender == BUS && path == BUS_PATH => owner(message),
        _ => None,
    }
}

/// What a change of a service's properties reports.
fn service(path: &str, message: &Message) -> Option<Signal> {
    let unit = name::from_object_path(path).filter(|unit| unit.as_str().starts_with(name::PREFIX))?;
    let body = message.body();
    let (interface, values, _): (&str, HashMap<&str, Variant<'_>>, Vec<&str>) = body.deserialize().ok()?;
    if interface != SERVICE_INTERFACE {
        return None;
    }
    let main = MainProcess::default().updated(|name| values.get(name));
    let runs = main.pid.is_some() && main.ended.is_none();
    Some(if runs { Signal::Spawned(unit) } else { Signal::Service { unit, main } })
}

fn job(message: &Message) -> Option<Signal> {
    let body = message.body();
    let (_, job, unit, result) = body.deserialize::<(u32, OwnedObjectPath, &str, &str)>().ok()?;
    let unit = UnitName::new(unit).ok()?;
    Some(Signal::Job { unit, job, result: result.to_owned() })
}

fn owner(message: &Message) -> Option<Signal> {
    let body = message.body();
    let (name, _, new) = body.deserialize::<(&str, &str, &str)>().ok()?;
    // An empty string stands for no owner.
    (name == SYSTEMD).then(|| Signal::Owner(OwnedUniqueName::try_from(new).ok()))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::unit::main_process::WaitStatus;

    const OWNER: &str = ":1.5";
    const WEB: &str = "/org/freedesktop/systemd1/unit/containerd_2ddefault_2dweb_2eservice";

    /// The header of a signal.
    #[derive(Clone, Copy)]
    struct From {
        sender: &'static str,
        destination: Option<&'static str>,
        path: &'static str,
        interface: &'static str,
        member: &'static str,
    }

    const CHANGED: From = From {
        sender: OWNER,
        destination: None,
        path: WEB,
        interface: PROPERTIES_INTERFACE,
        member: "PropertiesChanged",
    };
    const REMOVED: From =
        From { path: MANAGER_PATH, interface: MANAGER_INTERFACE, member: "JobRemoved", ..CHANGED };
    const RELOADING: From = From { member: "Reloading", ..REMOVED };
    const OWNED: From =
        From { sender: BUS, path: BUS_PATH, interface: BUS, member: "NameOwnerChanged", ..CHANGED };

    fn send<B: serde::Serialize + zbus::Type>(from: From, body: &B) -> Option<Signal> {
        let message = Message::signal(from.path, from.interface, from.member).sender(from.sender);
        let message = match from.destination {
            Some(name) => message.destination(name),
            None => message,
        };
        let owner = OwnedUniqueName::try_from(OWNER).unwrap();
        read(&message.build(body).unwrap(), Some(&owner))
    }

    type Change = (&'static str, HashMap<&'static str, Variant<'static>>, Vec<&'static str>);

    fn exit() -> Change {
        let values = [
            ("MainPID", 0_u32.into()),
            ("ExecMainPID", 7_u32.into()),
            ("ExecMainCode", 1_i32.into()),
            ("ExecMainStatus", 42_i32.into()),
        ];
        (SERVICE_INTERFACE, values.into(), vec![])
    }

    fn job_end() -> (u32, OwnedObjectPath, &'static str, &'static str) {
        (
            3,
            OwnedObjectPath::try_from("/org/freedesktop/systemd1/job/3").unwrap(),
            "containerd-a-b.service",
            "done",
        )
    }

    #[test]
    fn systemds_broadcasts_are_read() {
        let main = MainProcess {
            pid: None,
            last_pid: Some(7),
            ended: Some(WaitStatus { code: 1, status: 42, at_usec: None }),
        };
        let unit = UnitName::new("containerd-default-web.service").unwrap();
        assert_eq!(send(CHANGED, &exit()), Some(Signal::Service { unit, main }));
        assert!(matches!(send(REMOVED, &job_end()), Some(Signal::Job { result, .. }) if result == "done"));
        assert_eq!(send(RELOADING, &false), Some(Signal::Reloaded));
        assert_eq!(send(RELOADING, &true), Some(Signal::Reloading));
        let owner = OwnedUniqueName::try_from(":1.9").unwrap();
        assert_eq!(send(OWNED, &(SYSTEMD, "", ":1.9")), Some(Signal::Owner(Some(owner))));
        assert_eq!(send(OWNED, &(SYSTEMD, ":1.9", "")), Some(Signal::Owner(None)));
    }

    /// Checks that all four signals are ignored if their header is changed in this way.
    fn none_is_believed(what: &str, change: impl Fn(From) -> From) {
        assert_eq!(send(change(CHANGED), &exit()), None, "PropertiesChanged {what}");
        assert_eq!(send(change(REMOVED), &job_end()), None, "JobRemoved {what}");
        assert_eq!(send(change(RELOADING), &false), None, "Reloading {what}");
        assert_eq!(send(change(OWNED), &(SYSTEMD, ":1.5", ":1.66")), None, "NameOwnerChanged {what}");
    }

    #[test]
    fn a_signal_to_the_daemon_alone_is_not_believed_whoever_sends_it() {
        none_is_believed("with a destination", |from| From { destination: Some(":1.77"), ..from });
    }

    #[test]
    fn a_signal_of_anybody_else_is_not_believed() {
        none_is_believed("of a stranger", |from| From { sender: ":1.66", ..from });
        none_is_believed("of a name that begins alike", |from| From { sender: ":1.55", ..from });
        // The bus may not report for systemd, and systemd not for the bus.
        none_is_believed("with the senders swapped", |from| From {
            sender: if from.sender == BUS { OWNER } else { BUS },
            ..from
        });
    }

    #[test]
    fn a_signal_with_another_interface_path_or_member_is_not_believed() {
        none_is_believed("of another interface", |from| From { interface: "org.example.Other", ..from });
        none_is_believed("of another path", |from| From { path: "/org/example", ..from });
        none_is_believed("of another member", |from| From { member: "Changed", ..from });
    }

    #[test]
    fn a_signal_of_another_type_is_not_believed() {
        let numbers = vec![1_u8; 100];
        for from in [CHANGED, REMOVED, RELOADING, OWNED] {
            assert_eq!(send(from, &numbers), None, "{}", from.member);
        }
        let mut of_unit = exit();
        of_unit.0 = "org.freedesktop.systemd1.Unit";
        assert_eq!(send(CHANGED, &of_unit), None);
        assert_eq!(send(OWNED, &("org.example.Name", "", ":1.9")), None);
    }

    #[test]
    fn a_service_that_runs_is_only_reported_as_spawned_and_units_of_others_are_ignored() {
        let running: HashMap<_, Variant<'static>> =
            [("MainPID", 7_u32.into()), ("ExecMainPID", 7_u32.into()), ("ExecMainCode", 0_i32.into())].into();
        let spawned = Signal::Spawned(UnitName::new("containerd-default-web.service").unwrap());
        assert_eq!(send(CHANGED, &(SERVICE_INTERFACE, running, Vec::<&str>::new())), Some(spawned));
        let other = From { path: "/org/freedesktop/systemd1/unit/ssh_2eservice", ..CHANGED };
        assert_eq!(send(other, &exit()), None);
    }

    #[test]
    fn no_signal_is_believed_while_systemd_has_no_bus_name() {
        let message = Message::signal(WEB, PROPERTIES_INTERFACE, "PropertiesChanged");
        let message = message.sender(OWNER).build(&exit()).unwrap();
        assert_eq!(read(&message, None), None);
    }
}
