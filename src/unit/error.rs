//! What systemd and the bus answer when they can't do what they are asked: told by the errors' names.

use crate::id::UnitName;

use super::proxy::START;

const NO_SUCH_UNIT: &str = "org.freedesktop.systemd1.NoSuchUnit";
const UNIT_EXISTS: &str = "org.freedesktop.systemd1.UnitExists";
const UNIT_MASKED: &str = "org.freedesktop.systemd1.UnitMasked";

/// What can go wrong with a unit.
#[derive(Clone, Debug, thiserror::Error)]
pub enum Error {
    /// systemd can't be reached.
    #[error("systemd can't be reached over D-Bus: {reason}; check that dbus runs")]
    Unreachable {
        /// What the bus said.
        reason: String,
    },
    /// The unit is not loaded.
    #[error("unit {unit} is not loaded")]
    NotLoaded {
        /// The unit.
        unit: String,
    },
    /// A unit of that name is loaded already.
    #[error("unit {unit} exists already")]
    Exists {
        /// The unit.
        unit: String,
    },
    /// Another unit that it needs, its slice for one, can't be started.
    #[error("unit {unit} can't be started: {reason}")]
    Dependency {
        /// The unit.
        unit: String,
        /// systemd's words, which name the other one.
        reason: String,
    },
    /// systemd refused the call.
    #[error("systemd refused to {verb} {unit}: {reason} ({name})")]
    Refused {
        /// What was asked.
        verb: &'static str,
        /// Of which unit.
        unit: String,
        /// The D-Bus error's name.
        name: String,
        /// systemd's words.
        reason: String,
    },
    /// The job did not end well.
    #[error("systemd's job to {verb} {unit} ended with result {result:?}; see systemctl status {unit}")]
    Job {
        /// What was asked.
        verb: &'static str,
        /// Of which unit.
        unit: String,
        /// JobRemoved's result.
        result: String,
    },
    /// The connection was lost while a job was under way: it may have ended in any way.
    #[error("the connection to D-Bus was lost during systemd's job to {verb} {unit}")]
    Lost {
        /// What was asked.
        verb: &'static str,
        /// Of which unit.
        unit: String,
    },
    /// The journal can't be read.
    #[error("journalctl: {reason}")]
    Journal {
        /// What it said.
        reason: String,
    },
    /// systemd is older than supported, or says no version.
    #[error("systemd {found} is too old: version {} or newer is needed", crate::config::OLDEST_SYSTEMD)]
    TooOld {
        /// What it calls itself.
        found: String,
    },
}

impl Error {
    /// systemd does not take a property of the unit, or its value.
    pub fn is_about_a_property(&self) -> bool {
        const NAMES: [&str; 4] = ["InvalidArgs", "PropertyReadOnly", "BadUnitSetting", "OnlyByDependency"];
        // The rest are errors of the system, for a value of the wrong type.
        let is_meant = |name: &str| {
            NAMES.contains(&name.rsplit('.').next().unwrap_or(name)) || name.starts_with("System.")
        };
        matches!(self, Self::Refused { name, .. } if is_meant(name))
    }
}

pub(super) fn unreachable(error: zbus::Error) -> Error {
    Error::Unreachable { reason: error.to_string() }
}

/// What a failed call says. Errors are told apart by name, never by text.
pub(super) fn call_error(verb: &'static str, unit: &UnitName, error: zbus::Error) -> Error {
    let unit = unit.to_string();
    match error {
        zbus::Error::MethodError(name, reason, _) => match name.as_str() {
            NO_SUCH_UNIT => Error::NotLoaded { unit },
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
            other => Error::Unreachable { reason: other.to_string() },
        },
        other => unreachable(other),
    }
}

/// What a failed call to start a new unit says: any other one that it tells of is one that this needs.
pub(super) fn start_error(unit: &UnitName, error: zbus::Error) -> Error {
    match error {
        zbus::Error::MethodError(name, Some(reason), _)
            if [NO_SUCH_UNIT, UNIT_MASKED].contains(&name.as_str()) =>
        {
            Error::Dependency { unit: unit.to_string(), reason }
        }
        error => call_error(START, unit, error),
    }
}

/// The bus has refused to pass a call on: too many wait for their answers.
pub(super) fn is_over_limit(error: &zbus::Error) -> bool {
    const LIMITS_EXCEEDED: &str = "org.freedesktop.DBus.Error.LimitsExceeded";
    match error {
        zbus::Error::MethodError(name, ..) => name.as_str() == LIMITS_EXCEEDED,
        zbus::Error::FDO(error) => matches!(**error, zbus::fdo::Error::LimitsExceeded(_)),
        _ => false,
    }
}

/// Nobody has answered, as nobody was there to.
pub(super) fn is_gone(error: &zbus::Error) -> bool {
    const GONE: [&str; 3] = [
        "org.freedesktop.DBus.Error.NoReply",
        "org.freedesktop.DBus.Error.ServiceUnknown",
        "org.freedesktop.DBus.Error.NameHasNoOwner",
    ];
    match error {
        zbus::Error::MethodError(name, ..) => GONE.contains(&name.as_str()),
        // The bus itself is gone.
        zbus::Error::InputOutput(_) => true,
        zbus::Error::FDO(error) => matches!(
            **error,
            zbus::fdo::Error::NoReply(_)
                | zbus::fdo::Error::ServiceUnknown(_)
                | zbus::fdo::Error::NameHasNoOwner(_)
        ),
        _ => false,
    }
}
