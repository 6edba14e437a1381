//! Errors of systemd and the bus, distinguished by their D-Bus names.

use std::io;
use std::sync::Arc;

use crate::id::UnitName;

pub(super) const NO_SUCH_UNIT: &str = "org.freedesktop.systemd1.NoSuchUnit";
const UNIT_EXISTS: &str = "org.freedesktop.systemd1.UnitExists";
pub(super) const UNIT_MASKED: &str = "org.freedesktop.systemd1.UnitMasked";
/// A unit that is needed, such as the slice, is about to be stopped, or the machine shuts down.
pub(super) const DESTRUCTIVE: &str = "org.freedesktop.systemd1.TransactionIsDestructive";

/// What can go wrong with a unit.
#[derive(Clone, Debug, thiserror::Error)]
pub enum Error {
    /// systemd can't be reached.
    #[error("systemd can't be reached over D-Bus: {source}; check that dbus runs")]
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

    fn reported(name: &str) -> Error {
        let call = zbus::Message::method_call("/", "M").build(&()).unwrap();
        let reply = zbus::Message::error(&call.header(), name).build(&"why").unwrap();
        call_error("start", &UnitName::new("a.service").unwrap(), zbus::Error::from(reply))
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
