//! D-Bus, and the limits in its configuration.

use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use crate::unit::annotation::Types;
use crate::unit::error::RefusedByBus;
use crate::unit::manager::Manager;
use crate::unit::systemd::Details;
use crate::unit::{self, bus_config};

use super::Check;

/// How long systemd may take to answer over the bus.
const LIMIT: Duration = Duration::from_secs(10);

/// Limits of the system bus, and the smallest values with which the daemon works: the daemon has up to 100 calls
/// under way, some match rules, and up to 16 descriptors in a message.
const NEEDED: [(&str, u64); 4] = [
    ("max_replies_per_connection", 128),
    ("max_match_rules_per_connection", 64),
    ("max_message_unix_fds", 16),
    ("max_message_size", 1 << 20),
];

/// The facts about D-Bus.
#[derive(Debug)]
pub struct Facts {
    /// systemd's version, read over the bus.
    pub version: Result<String, String>,
    /// Why the bus runs and does not pass on the question.
    pub refused: Option<RefusedByBus>,
    /// Limits that files of the bus's configuration set.
    pub limits: Vec<(PathBuf, String, u64)>,
    /// The types of the properties of a service, if systemd shows them.
    pub types: Option<Arc<Types>>,
}

pub(super) async fn collect() -> Facts {
    let asking = async {
        let manager = Manager::connected().await?;
        let version = manager.version().await?;
        Ok::<_, unit::error::Error>((version, manager.property_types().await.ok()))
    };
    let (version, refused, types) = match tokio::time::timeout(LIMIT, asking).await {
        Ok(Ok((version, types))) => (Ok(version), None, types),
        Ok(Err(error)) => (Err(error.to_string()), error.refused_by_bus(), None),
        Err(_) => {
            (Err(format!("systemd does not answer over D-Bus within {} s", LIMIT.as_secs())), None, None)
        }
    };
    Facts { version, refused, limits: bus_config::limits(), types }
}

pub(super) fn checks(facts: &Facts) -> Vec<Check> {
    let answer = match &facts.version {
        Ok(_) => Check::ok("dbus", "systemd answers over D-Bus"),
        Err(reason) => Check::error("dbus", reason.clone(), advice(facts.refused)),
    };
    let needed = |name: &str| NEEDED.iter().find(|(needed, _)| *needed == name).map(|(_, least)| *least);
    let low = facts.limits.iter().filter_map(|(path, name, value)| {
        let least = needed(name).filter(|least| value < least)?;
        let found = format!("{} sets {name} to {value}", path.display());
        Some(Check::warning(
            "dbus-limits",
            found,
            format!("set it to {least} or more, then restart the machine"),
        ))
    });
    let low: Vec<Check> = low.collect();
    let limits = if low.is_empty() { vec![Check::ok("dbus-limits", "no limit is too low")] } else { low };
    [vec![answer], limits].concat()
}

fn advice(refused: Option<RefusedByBus>) -> &'static str {
    match refused {
        None => "look at systemctl status dbus.socket dbus.service, and start them",
        Some(RefusedByBus::Policy) => {
            "look for a <deny> that concerns org.freedesktop.systemd1 in /etc/dbus-1/system.d and \
             /usr/share/dbus-1/system.d, remove it, then systemctl reload dbus; SELinux or AppArmor can deny calls, too: \
             see journalctl -b _TRANSPORT=audit"
        }
        Some(RefusedByBus::Limit) => {
            "find the program that has too many connections (runuser -u nobody busctl list) and end it, or raise the <limit> in \
             /etc/dbus-1/system.d, then systemctl kill --signal=HUP --kill-whom=main dbus, so that dbus reads its files again"
        }
    }
}

#[cfg(test)]
mod tests {
    use super::super::Status;
    use super::*;

    fn healthy() -> Facts {
        Facts { version: Ok("257".to_owned()), refused: None, limits: vec![], types: None }
    }

    #[test]
    fn a_bus_that_answers_is_ok() {
        assert!(checks(&healthy()).iter().all(|check| check.status == Status::Ok));
    }

    #[test]
    fn a_bus_that_does_not_run_is_an_error() {
        let facts = Facts {
            version: Err("systemd can't be reached over D-Bus: No such file".to_owned()),
            ..healthy()
        };
        let check = &checks(&facts)[0];
        assert_eq!((check.name, check.status), ("dbus", Status::Error));
        assert!(check.advice.contains("dbus.socket"));
    }

    #[test]
    fn a_bus_that_runs_and_refuses_calls_gets_other_advice() {
        for (refused, word) in [(RefusedByBus::Policy, "<deny>"), (RefusedByBus::Limit, "<limit>")] {
            let version = Err("systemd can't be reached over D-Bus: refused".to_owned());
            let check = &checks(&Facts { version, refused: Some(refused), ..healthy() })[0];
            assert_eq!(check.status, Status::Error);
            assert!(check.advice.contains(word) && !check.advice.contains("start them"), "{check:?}");
        }
    }

    #[test]
    fn limits_that_are_too_low_are_named_with_their_file() {
        let text = "<busconfig><!-- <limit name=\"max_replies_per_connection\">1</limit> -->\n\
                    <limit name='max_replies_per_connection'> 20 </limit><limit name=\"auth_timeout\">5</limit>";
        let limits = bus_config::limits_in(text);
        assert_eq!(limits, [("max_replies_per_connection".to_owned(), 20), ("auth_timeout".to_owned(), 5)]);
        let limits =
            limits.into_iter().map(|(name, value)| (PathBuf::from("/etc/x.conf"), name, value)).collect();
        let found = checks(&Facts { limits, ..healthy() });
        assert_eq!((found.len(), found[1].status), (2, Status::Warning));
        assert!(found[1].found.contains("/etc/x.conf") && found[1].found.contains("20"));
    }
}
