//! Errors of systemd and the bus, distinguished by their D-Bus names.

use std::io;
use std::sync::Arc;

use crate::id::UnitName;

pub(super) const NO_SUCH_UNIT: &str = "org.freedesktop.systemd1.NoSuchUnit";
const UNIT_EXISTS: &str = "org.freedesktop.systemd1.UnitExists";
pub(super) const UNIT_MASKED: &str = "org.freedesktop.systemd1.UnitMasked";
/// The bus does not pass on a call, because one of its limits is reached.
pub(super) const LIMITS_EXCEEDED: &str = "org.freedesktop.DBus.Error.LimitsExceeded";
/// A unit that is needed, such as the slice, is about to be stopped, or the machine shuts down.
pub(super) const DESTRUCTIVE: &str = "org.freedesktop.systemd1.TransactionIsDestructive";

/// What can go wrong with a unit.
#[derive(Clone, Debug, thiserror::Error)]
pub enum Error {
    /// systemd can't be reached.
    #[error("systemd can't be reached over D-Bus: {source}; {}", what_to_check(source))]
    Unreachable {
        /// The error of the bus.
        #[source]
        source: zbus::Error,
    },
    /// The unit is not loaded.
    #[error("unit {unit} is not loaded")]
    NotLoaded { unit: String },
    /// A unit of that name is loaded already.
    #[error("unit {unit} already exists")]
    Exists { unit: String },
    /// An administrator has forbidden the unit.
    #[error("unit {unit} is masked: run systemctl unmask {unit}")]
    Masked { unit: String },
    /// A unit that the unit needs, such as its slice, can't be started, or is being stopped.
    #[error("unit {unit} can't be started: {reason}")]
    Dependency {
        unit: String,
        /// systemd's message, which names the other unit.
        reason: String,
    },
    /// With a setting of an administrator, the unit can't work.
    #[error(
        "{unit} was not started, because of {setting}; remove this setting, then run systemctl daemon-reload"
    )]
    Setting {
        unit: String,
        /// The setting, with its file, and what it breaks.
        setting: String,
    },
    /// systemd refused the call.
    #[error("systemd refused to {verb} {unit}: {reason} ({name})")]
    Refused {
        /// The request, as a verb.
        verb: &'static str,
        /// The unit.
        unit: String,
        /// The D-Bus error's name.
        name: String,
        /// systemd's message.
        reason: String,
    },
    /// The job failed.
    #[error("systemd's job to {verb} {unit} ended with result {result:?}; see systemctl status {unit}")]
    Job {
        /// The request, as a verb.
        verb: &'static str,
        /// The unit.
        unit: String,
        /// JobRemoved's result.
        result: String,
    },
    /// The end of a job may have been missed: the connection to the bus was lost, or systemd executed itself again.
    #[error("the connection to D-Bus was lost during systemd's job to {verb} {unit}")]
    Lost {
        /// The request, as a verb.
        verb: &'static str,
        /// The unit.
        unit: String,
    },
    /// The journal can't be read.
    #[error("journalctl: {reason}")]
    Journal {
        /// Its error message.
        reason: String,
    },
    /// systemd is older than supported, or its version can't be read.
    #[error("systemd {found} is too old: version {} or newer is needed", crate::config::OLDEST_SYSTEMD)]
    TooOld {
        /// The version that systemd reports.
        found: String,
    },
}

impl Error {
    /// systemd has not answered in time.
    pub fn no_answer() -> Self {
        let source = io::Error::new(io::ErrorKind::TimedOut, "no answer in time");
        Self::Unreachable { source: zbus::Error::InputOutput(Arc::new(source)) }
    }

    /// Why a bus that runs does not pass on a call; `None` for all other errors.
    pub fn refused_by_bus(&self) -> Option<RefusedByBus> {
        match self {
            Self::Unreachable { source } => refused_by_bus(source),
            Self::Refused { name, .. } => RefusedByBus::named(name),
            _ => None,
        }
    }

    /// True if systemd refused a property of the unit, or its value.
    pub fn is_about_a_property(&self) -> bool {
        const NAMES: [&str; 4] = ["InvalidArgs", "PropertyReadOnly", "BadUnitSetting", "OnlyByDependency"];
        // For a value of the wrong type systemd answers with an error of the system.
        let is_meant = |name: &str| {
            NAMES.contains(&name.rsplit('.').next().unwrap_or(name)) || name.starts_with("System.")
        };
        matches!(self, Self::Refused { name, .. } if is_meant(name))
    }
}

/// Why a bus that runs does not pass on a call, or does not accept a connection.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum RefusedByBus {
    /// A rule in its configuration.
    Policy,
    /// One of its limits.
    Limit,
}

impl RefusedByBus {
    fn named(error: &str) -> Option<Self> {
        match error {
            "org.freedesktop.DBus.Error.AccessDenied" => Some(Self::Policy),
            LIMITS_EXCEEDED => Some(Self::Limit),
            _ => None,
        }
    }
}

fn refused_by_bus(error: &zbus::Error) -> Option<RefusedByBus> {
    match error {
        zbus::Error::MethodError(name, ..) => RefusedByBus::named(name.as_str()),
        zbus::Error::FDO(error) => match **error {
            zbus::fdo::Error::AccessDenied(_) => Some(RefusedByBus::Policy),
            zbus::fdo::Error::LimitsExceeded(_) => Some(RefusedByBus::Limit),
            _ => None,
        },
        _ => None,
    }
}

fn what_to_check(error: &zbus::Error) -> &'static str {
    match refused_by_bus(error) {
        Some(RefusedByBus::Policy) => "a policy of the bus denies it",
        Some(RefusedByBus::Limit) => "a limit of the bus is reached",
        None => "check that dbus runs",
    }
}

pub(super) fn unreachable(source: zbus::Error) -> Error {
    Error::Unreachable { source }
}

/// The error of a failed call. Errors are distinguished by name, never by text.
pub(super) fn call_error(verb: &'static str, unit: &UnitName, error: zbus::Error) -> Error {
    let unit = unit.to_string();
    match error {
        zbus::Error::MethodError(name, reason, _) => match name.as_str() {
            NO_SUCH_UNIT => Error::NotLoaded { unit },
            UNIT_MASKED => Error::Masked { unit },
            UNIT_EXISTS => Error::Exists { unit },
            other => {
                Error::Refused { verb, unit, name: other.to_owned(), reason: reason.unwrap_or_default() }
            }
        },
        zbus::Error::FDO(error) => match *error {
            zbus::fdo::Error::InvalidArgs(reason) => {
                Error::Refused { verb, unit, name: "InvalidArgs".to_owned(), reason }
            }
            zbus::fdo::Error::PropertyReadOnly(reason) => {
                Error::Refused { verb, unit, name: "PropertyReadOnly".to_owned(), reason }
            }
            other => unreachable(other.into()),
        },
        other => unreachable(other),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn answered(name: &str) -> zbus::Error {
        let call = zbus::Message::method_call("/", "M").build(&()).unwrap();
        zbus::Error::from(zbus::Message::error(&call.header(), name).build(&"why").unwrap())
    }

    fn reported(name: &str) -> Error {
        call_error("start", &UnitName::new("a.service").unwrap(), answered(name))
    }

    #[test]
    fn a_bus_that_refuses_a_call_is_told_from_one_that_does_not_run() {
        let denied = zbus::Error::from(zbus::fdo::Error::AccessDenied("why".to_owned()));
        let limited = zbus::Error::from(zbus::fdo::Error::LimitsExceeded("why".to_owned()));
        for (source, refused, hint) in [
            (denied, Some(RefusedByBus::Policy), "policy"),
            (answered("org.freedesktop.DBus.Error.AccessDenied"), Some(RefusedByBus::Policy), "policy"),
            (limited, Some(RefusedByBus::Limit), "limit"),
            (answered(LIMITS_EXCEEDED), Some(RefusedByBus::Limit), "limit"),
            (answered("org.freedesktop.DBus.Error.NoReply"), None, "check that dbus runs"),
        ] {
            let error = unreachable(source);
            assert_eq!(error.refused_by_bus(), refused, "{error}");
            assert!(error.to_string().contains(hint), "{error}");
        }
        assert_eq!(reported(LIMITS_EXCEEDED).refused_by_bus(), Some(RefusedByBus::Limit));
    }

    #[test]
    fn errors_of_systemd_are_distinguished_by_their_names() {
        assert!(matches!(reported(NO_SUCH_UNIT), Error::NotLoaded { .. }));
        assert!(matches!(reported(UNIT_EXISTS), Error::Exists { .. }));
        assert!(matches!(reported(UNIT_MASKED), Error::Masked { .. }));
        let setting = reported("org.freedesktop.systemd1.BadUnitSetting");
        assert!(setting.is_about_a_property());
        assert!(matches!(setting, Error::Refused { reason, .. } if reason == "why"));
        assert!(!reported("org.freedesktop.DBus.Error.AccessDenied").is_about_a_property());
    }
}
