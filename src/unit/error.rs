//! What systemd and the bus answer when they can't do what they are asked: told by the errors' names.

use std::io;
use std::sync::Arc;

use crate::id::UnitName;

pub(super) const NO_SUCH_UNIT: &str = "org.freedesktop.systemd1.NoSuchUnit";
const UNIT_EXISTS: &str = "org.freedesktop.systemd1.UnitExists";

/// What can go wrong with a unit.
#[derive(Clone, Debug, thiserror::Error)]
pub enum Error {
    /// systemd can't be reached.
    #[error("systemd can't be reached over D-Bus: {source}; check that dbus runs")]
    Unreachable {
        /// What the bus said.
        #[source]
        source: zbus::Error,
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
    /// systemd has not answered in time.
    pub fn no_answer() -> Self {
        let source = io::Error::new(io::ErrorKind::TimedOut, "no answer in time");
        Self::Unreachable { source: zbus::Error::InputOutput(Arc::new(source)) }
    }

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

pub(super) fn unreachable(source: zbus::Error) -> Error {
    Error::Unreachable { source }
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
            other => unreachable(other.into()),
        },
        other => unreachable(other),
    }
}
