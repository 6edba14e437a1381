//! Checked names: what containerd calls things, and what systemd calls units.
//!
//! A value of one of these types has been checked and is never checked again. Deserialising goes
//! through the same check, so a name from a file on disk is as good as one from a request.

use std::fmt;

use serde::{Deserialize, Serialize};

/// Longest identifier containerd accepts (`pkg/identifiers`, containerd 1.6 to 2.4).
pub const MAX_IDENTIFIER: usize = 76;

/// Longest unit name systemd accepts, suffix included (`UNIT_NAME_MAX` minus the NUL).
pub const MAX_UNIT_NAME: usize = 255;

/// Why a name was refused. The offending text is quoted and shortened.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
pub enum InvalidName {
    /// The text is empty.
    #[error("{what} is empty")]
    Empty {
        /// The kind of name, e.g. "container id".
        what: &'static str,
    },
    /// The text is longer than the kind of name allows.
    #[error("{what} {text:?} is longer than {max} bytes")]
    TooLong {
        /// The kind of name.
        what: &'static str,
        /// The refused text.
        text: String,
        /// The longest text allowed, in bytes.
        max: usize,
    },
    /// A character, or its place, is not allowed.
    #[error("{what} {text:?} is not valid: {rule}")]
    Malformed {
        /// The kind of name.
        what: &'static str,
        /// The refused text.
        text: String,
        /// The rule that the text breaks.
        rule: &'static str,
    },
}

/// Cuts a refused text down to what is useful in a message.
fn excerpt(text: &str) -> String {
    const SHOWN: usize = 80;
    if text.chars().count() <= SHOWN {
        return text.to_owned();
    }
    text.chars().take(SHOWN).chain("…".chars()).collect()
}

/// containerd's rule for names: runs of letters and digits, joined by single `.`, `_` or `-`.
fn check_identifier(what: &'static str, text: &str) -> Result<(), InvalidName> {
    if text.is_empty() {
        return Err(InvalidName::Empty { what });
    }
    if text.len() > MAX_IDENTIFIER {
        return Err(InvalidName::TooLong { what, text: excerpt(text), max: MAX_IDENTIFIER });
    }
    let joined_runs = text
        .split(['.', '_', '-'])
        .all(|run| !run.is_empty() && run.bytes().all(|b| b.is_ascii_alphanumeric()));
    if !joined_runs {
        return Err(InvalidName::Malformed {
            what,
            text: excerpt(text),
            rule: "use letters and digits, joined by single '.', '_' or '-'",
        });
    }
    Ok(())
}

/// systemd's rule for unit names: a type suffix and only characters that need no escape.
fn check_unit_name(what: &'static str, text: &str) -> Result<(), InvalidName> {
    if text.is_empty() {
        return Err(InvalidName::Empty { what });
    }
    if text.len() > MAX_UNIT_NAME {
        return Err(InvalidName::TooLong { what, text: excerpt(text), max: MAX_UNIT_NAME });
    }
    let known_suffix = [".service", ".slice", ".socket"]
        .iter()
        .any(|suffix| text.len() > suffix.len() && text.ends_with(suffix));
    let plain = text.bytes().all(|b| b.is_ascii_alphanumeric() || b":-_.\\".contains(&b));
    if !known_suffix || !plain {
        return Err(InvalidName::Malformed {
            what,
            text: excerpt(text),
            rule: "use letters, digits and \":-_.\\\", with a unit type as suffix",
        });
    }
    Ok(())
}

macro_rules! name {
    ($(#[$doc:meta])* $name:ident, $what:literal, $check:ident) => {
        $(#[$doc])*
        #[derive(Clone, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
        #[serde(try_from = "String", into = "String")]
        pub struct $name(Box<str>);

        impl $name {
            /// Checks the text.
            ///
            /// # Errors
            /// The rule that was broken, with the text.
            pub fn new(text: impl AsRef<str>) -> Result<Self, InvalidName> {
                let text = text.as_ref();
                $check($what, text)?;
                Ok(Self(text.into()))
            }

            /// The name as text.
            pub fn as_str(&self) -> &str {
                &self.0
            }
        }

        impl TryFrom<String> for $name {
            type Error = InvalidName;
            fn try_from(text: String) -> Result<Self, InvalidName> {
                Self::new(text)
            }
        }

        impl From<$name> for String {
            fn from(name: $name) -> String {
                name.0.into()
            }
        }

        impl fmt::Display for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str(&self.0)
            }
        }
    };
}

name!(
    /// A containerd namespace.
    Namespace, "namespace", check_identifier
);
name!(
    /// A container's id, unique within its namespace.
    TaskId, "container id", check_identifier
);
name!(
    /// An exec's id, unique within its container.
    ExecId, "exec id", check_identifier
);
name!(
    /// The name of a unit that exists or may exist: a service, slice or socket.
    UnitName, "unit name", check_unit_name
);

/// What names a task on this node: ids are unique per namespace only.
#[derive(Clone, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
pub struct TaskKey {
    /// The namespace.
    pub namespace: Namespace,
    /// The container's id.
    pub id: TaskId,
}

impl fmt::Display for TaskKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/{}", self.namespace, self.id)
    }
}

/// What names a process on this node: a task's init, or one of its execs.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct ProcessKey {
    /// The task.
    pub task: TaskKey,
    /// The exec; nothing for init.
    pub exec: Option<ExecId>,
}

impl ProcessKey {
    /// The id under which a client knows the process: the exec's, or the container's.
    pub fn id(&self) -> &str {
        self.exec.as_ref().map_or(self.task.id.as_str(), ExecId::as_str)
    }
}

impl fmt::Display for ProcessKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match &self.exec {
            None => self.task.fmt(f),
            Some(exec) => write!(f, "{} exec {exec}", self.task),
        }
    }
}

/// Digits of a hexadecimal id that people know it by (`docker ps`, `crictl ps`).
pub const SHORT_ID: usize = 12;

/// True for the 64 lower-case hexadecimal digits that Docker, Kubernetes and nerdctl use as ids.
pub fn is_long_hex(id: &str) -> bool {
    id.len() == 64 && id.bytes().all(|b| matches!(b, b'0'..=b'9' | b'a'..=b'f'))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_that_containerd_accepts_are_accepted() {
        for id in ["a", "web", "my-app.v1_2", "0123456789abcdef", &"x".repeat(76)] {
            assert_eq!(TaskId::new(id).map(|id| id.to_string()), Ok(id.to_owned()));
        }
    }

    #[test]
    fn names_that_containerd_refuses_are_refused() {
        for id in ["", "/", "..", "a/b", "a\0b", "-a", "a-", "a--b", "a.-b", "ä", &"x".repeat(77)] {
            assert!(TaskId::new(id).is_err(), "{id:?}");
        }
    }

    #[test]
    fn a_name_from_disk_is_checked_too() {
        assert!(serde_json::from_str::<TaskId>("\"../x\"").is_err());
        assert!(serde_json::from_str::<UnitName>("\"a b.service\"").is_err());
    }

    #[test]
    fn unit_names_need_a_type_and_plain_characters() {
        assert!(UnitName::new(r"containerd-a\x2db-c:d.service").is_ok());
        for name in
            ["", "x", ".service", "a/b.service", "a b.service", &format!("{}.service", "x".repeat(248))]
        {
            assert!(UnitName::new(name).is_err(), "{name:?}");
        }
    }

    #[test]
    fn a_refusal_quotes_only_the_beginning_of_a_long_text() {
        let message = TaskId::new("y".repeat(300)).map_err(|e| e.to_string());
        assert!(message.is_err_and(|m| m.len() < 200 && m.contains("yyy")));
    }
}
