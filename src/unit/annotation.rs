//! Properties of a container's unit that a client or an administrator asks for, beside those that a
//! container needs (pure).
//!
//! The convention is runc's and crun's, whose systemd drivers read annotations `org.systemd.property.NAME`
//! with a value in GVariant text (runc, docs/systemd.md).

use std::collections::HashMap;
use std::fmt;

use zbus::Variant;

use crate::task::request::{Asker, DeviceAllow, Property};

use super::gvariant;

/// A property that can't be had.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The name can't be that of a property.
    #[error("{origin}: the name of a property has three letters or more, and nothing else")]
    Name {
        /// Where it was asked for.
        origin: String,
    },
    /// The text is no value.
    #[error("{origin}: {source}")]
    Value {
        /// Where it was asked for.
        origin: String,
        /// What is wrong with it.
        #[source]
        source: gvariant::Malformed,
    },
    /// A time in seconds is no number, or below 0, or too great.
    #[error("{origin}: {value} is no number of seconds")]
    Seconds {
        /// Where it was asked for.
        origin: String,
        /// The value.
        value: String,
    },
    /// It is not for a client to set.
    #[error("{origin}: {name} can't be set: {reason}")]
    Denied {
        /// Where it was asked for.
        origin: String,
        /// The property.
        name: String,
        /// Why not.
        reason: &'static str,
    },
    /// The value is of another type than the property.
    #[error("{origin}: {mismatch}")]
    Type {
        /// Where it was asked for.
        origin: String,
        /// Both types, and what to write.
        mismatch: String,
    },
    /// systemd does not know it, or not this value.
    #[error("systemd refused one of {}: {reason}", .origins.join(", "))]
    Refused {
        /// Where they were asked for.
        origins: Vec<String>,
        /// systemd's words.
        reason: String,
    },
}

impl fmt::Display for Property {
    /// Where it was asked for.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.asker {
            Asker::Annotation => write!(f, "annotation {PREFIX}{}", self.name),
            Asker::StopSignal => write!(f, "annotation {STOP_SIGNAL}"),
            Asker::Options => write!(f, "runtime option Properties.{}", self.name),
        }
    }
}

/// What the names of annotations that ask for a property begin with.
pub const PREFIX: &str = "org.systemd.property.";

/// The annotation that names the signal with which a container is stopped, as images do.
pub const STOP_SIGNAL: &str = "io.containerd.image.config.stop-signal";

/// Properties that are not for a client, and why. A `*` stands for any end of the name.
///
/// Everything else may be set, also what overrides one of ours: limits, timeouts, dependencies, logging.
const DENIED: [(&[&str], &str); 6] = [
    (
        &["Exec*", "Type", "PIDFile", "GuessMainPID", "NotifyAccess", "ExitType", "BusName", "PAMName"],
        "what runs in the unit is the container, as its spec says",
    ),
    (
        &["RemainAfterExit", "Restart*", "SuccessExitStatus", "AddRef"],
        "the container's exit is followed by it, and only containerd starts containers",
    ),
    (
        &[
            "Slice",
            "Delegate*",
            "KillMode",
            "SendSIGKILL",
            "RefuseManualStart",
            "RefuseManualStop",
            "StopWhenUnneeded",
        ],
        "the container is placed, stopped and removed by it; its slice is named in linux.cgroupsPath",
    ),
    (
        &[
            "User*",
            "Group",
            "SupplementaryGroups",
            "DynamicUser",
            "AmbientCapabilities",
            "CapabilityBoundingSet",
            "NoNewPrivileges",
            "SecureBits",
            "SELinuxContext",
            "AppArmorProfile",
            "SmackProcessLabel",
            "SystemCall*",
            "RestrictAddressFamilies",
            "RestrictFileSystems",
            "RestrictNamespaces",
            "RestrictRealtime",
            "RestrictSUIDSGID",
            "LockPersonality",
            "MemoryDenyWriteExecute",
            "Personality",
        ],
        "it would bind the OCI runtime; what binds the container is in its spec, in process and linux",
    ),
    (
        &[
            "Root*",
            "WorkingDirectory",
            "Private*",
            "Protect*",
            "ProcSubset",
            "Mount*",
            "BindPaths",
            "BindReadOnlyPaths",
            "BindLogSockets",
            "TemporaryFileSystem",
            "InaccessiblePaths",
            "InaccessibleDirectories",
            "NoExecPaths",
            "ReadOnlyPaths",
            "ReadOnlyDirectories",
            "ReadWritePaths",
            "ReadWriteDirectories",
            "Extension*",
            "NetworkNamespacePath",
            "IPCNamespacePath",
            "JoinsNamespaceOf",
            "LogNamespace",
            "LoadCredential*",
            "SetCredential*",
            "ImportCredential*",
        ],
        "the OCI runtime needs the host's namespaces; mounts and namespaces of the container are in its spec",
    ),
    (
        &[
            "Standard*",
            "TTY*",
            "NonBlocking",
            "OpenFile",
            "ExtraFileDescriptors",
            "FileDescriptorStore*",
            "Environment*",
            "PassEnvironment",
            "UnsetEnvironment",
        ],
        "streams and environment of the container come from its client and its spec",
    ),
];

/// Properties that have another meaning for runc's scopes: asked for, they are left out.
const LEFT_OUT: [(&str, &str); 1] =
    [("CollectMode", "the unit of a container is kept until it is deleted, for its exit code")];

/// Properties that are shown in another form than they are set in (systemd, dbus-execute.c and
/// dbus-unit.c): only systemd can check them.
const SHOWN_OTHERWISE: [&str; 3] = ["Conditions", "Asserts", "CoredumpFilter"];

/// What is asked for, checked.
#[derive(Debug, Default)]
pub struct Checked {
    /// What to set: each property once, as the last that asked for it wants it.
    pub properties: Vec<Property>,
    /// What is left out, and why.
    pub left_out: Vec<(Property, &'static str)>,
}

/// Checks what is asked for; later ones override earlier ones.
///
/// # Errors
/// The first that can't be had.
pub fn check(asked: impl IntoIterator<Item = Property>) -> Result<Checked, Error> {
    let mut checked = Checked::default();
    let mut names: Vec<String> = Vec::new();
    for property in asked {
        let (name, _) = read(&property)?;
        if let Some((_, reason)) = LEFT_OUT.iter().find(|(left_out, _)| *left_out == name) {
            checked.left_out.push((property, reason));
            continue;
        }
        if let Some(at) = names.iter().position(|known| *known == name) {
            names.remove(at);
            checked.properties.remove(at);
        }
        names.push(name);
        checked.properties.push(property);
    }
    Ok(checked)
}

/// The property's own name and value.
fn read(property: &Property) -> Result<(String, Variant<'static>), Error> {
    let origin = || property.to_string();
    let name = property.name.as_str();
    if name.len() < 3 || !name.bytes().all(|byte| byte.is_ascii_alphabetic()) {
        return Err(Error::Name { origin: origin() });
    }
    let value =
        gvariant::parse(&property.value).map_err(|source| Error::Value { origin: origin(), source })?;
    let (name, value) = match name.strip_suffix("Sec") {
        Some(stem) if stem.ends_with(|c: char| c.is_ascii_lowercase()) => {
            let usec = microseconds(&value)
                .ok_or_else(|| Error::Seconds { origin: origin(), value: property.value.clone() })?;
            (format!("{stem}USec"), usec.into())
        }
        _ => (name.to_owned(), value),
    };
    if let Some(reason) = denied(&name) {
        return Err(Error::Denied { origin: origin(), name, reason });
    }
    Ok((name, value))
}

fn denied(name: &str) -> Option<&'static str> {
    let is_meant = |pattern: &&str| match pattern.strip_suffix('*') {
        Some(begin) => name.starts_with(begin),
        None => name == *pattern,
    };
    DENIED.iter().find(|(patterns, _)| patterns.iter().any(is_meant)).map(|(_, reason)| *reason)
}

/// From seconds, as any kind of number.
fn microseconds(seconds: &Variant<'_>) -> Option<u64> {
    const USEC_PER_SEC: u64 = 1_000_000;
    let whole = match seconds {
        Variant::U8(number) => u64::from(*number),
        Variant::U16(number) => u64::from(*number),
        Variant::U32(number) => u64::from(*number),
        Variant::U64(number) => *number,
        Variant::I16(number) => u64::try_from(*number).ok()?,
        Variant::I32(number) => u64::try_from(*number).ok()?,
        Variant::I64(number) => u64::try_from(*number).ok()?,
        Variant::F64(number) => {
            let usec = number * 1e6;
            // 2^64 and more, infinity, NaN and what is below 0 are no times.
            let is_time = (0.0..18_446_744_073_709_551_616.0).contains(&usec);
            #[expect(clippy::cast_possible_truncation, clippy::cast_sign_loss, reason = "in range")]
            return is_time.then_some(usec as u64);
        }
        _ => return None,
    };
    whole.checked_mul(USEC_PER_SEC)
}

/// The end of a unit's property list.
#[derive(Debug, Default)]
pub struct Additions(pub(super) Vec<(String, Variant<'static>)>);

impl Additions {
    /// What a container's unit gets beside what every container's gets: its devices, and the properties
    /// that were asked for, which are last and so override all others.
    ///
    /// # Errors
    /// A property that can't be had.
    pub fn new(devices: Option<&[DeviceAllow]>, properties: &[Property]) -> Result<Self, Error> {
        let mut list = Vec::new();
        if let Some(devices) = devices {
            let allowed: Vec<(&str, &str)> =
                devices.iter().map(|device| (device.device.as_str(), device.access.as_str())).collect();
            list.push(("DevicePolicy".to_owned(), "strict".into()));
            list.push(("DeviceAllow".to_owned(), to_owned_pairs(&allowed).into()));
        }
        for property in properties {
            list.push(read(property)?);
        }
        Ok(Self(list))
    }
}

fn to_owned_pairs(pairs: &[(&str, &str)]) -> Vec<(String, String)> {
    pairs.iter().map(|(one, other)| ((*one).to_owned(), (*other).to_owned())).collect()
}

/// The types of a service's properties, as systemd shows them.
#[derive(Debug, Default)]
pub struct Types(pub(super) HashMap<String, String>);

impl Types {
    /// Compares values with their properties' types. systemd does not name the property when a type is
    /// wrong. A property that is not known is for systemd to judge.
    ///
    /// # Errors
    /// [`Error::Type`]
    pub fn check(&self, properties: &[Property]) -> Result<(), Error> {
        for property in properties {
            let (name, value) = read(property)?;
            let given = value.value_signature().to_string();
            let known = self.0.get(&name).filter(|_| !SHOWN_OTHERWISE.contains(&name.as_str()));
            if let Some(wanted) = known.filter(|wanted| **wanted != given) {
                let text = &property.value;
                let mut mismatch = format!("{name} is of type {wanted:?}, but {text} is of type {given:?}");
                if is_other_number(wanted, &given) {
                    mismatch.push_str(&format!(": write @{wanted} {text}"));
                }
                return Err(Error::Type { origin: property.to_string(), mismatch });
            }
        }
        Ok(())
    }
}

fn is_other_number(wanted: &str, given: &str) -> bool {
    const NUMBERS: &str = "ynqiuxtd";
    given == "i" && wanted.len() == 1 && NUMBERS.contains(wanted)
}

#[cfg(test)]
mod tests;
