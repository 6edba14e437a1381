//! Properties of a container's unit that a client or an administrator requests, in addition to those that every container
//! needs (pure).
//!
//! Follows the convention of the systemd drivers of runc and crun: an annotation `org.systemd.property.NAME` has the value
//! of a property in GVariant text (runc, docs/systemd.md).

use std::collections::HashMap;
use std::fmt;

use zbus::{Signature, Variant};

use crate::task::request::{DeviceAllow, Property, PropertySource};

use super::gvariant;
use crate::text;

mod allowed;

/// Why a requested property is refused.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The name is not a valid property name.
    #[error("{setting}: not a valid property name (letters only, at least three)")]
    Name {
        /// The annotation or option that requests the property.
        setting: String,
    },
    /// The text is not a value.
    #[error("{setting}: {source}")]
    Value {
        /// The annotation or option that requests the property.
        setting: String,
        /// The mistake.
        #[source]
        source: gvariant::InvalidText,
    },
    /// A time in seconds is not a number, is negative, or is too large.
    #[error("{setting}: {value} is not a number of seconds")]
    Seconds {
        /// The annotation or option that requests the property.
        setting: String,
        value: String,
    },
    /// The client may not set the property.
    #[error("{setting}: {name} can't be set: {reason}")]
    Denied {
        /// The annotation or option that requests the property.
        setting: String,
        /// The property.
        name: String,
        /// The error.
        reason: &'static str,
    },
    /// A string in the value can't be written to a unit's file.
    #[error("{setting}: {flaw}")]
    Text {
        /// The annotation or option that requests the property.
        setting: String,
        /// The mistake.
        flaw: String,
    },
    /// This systemd has no such property.
    #[error("{setting}: this systemd has no property {name}")]
    Unknown {
        /// The annotation or option that requests the property.
        setting: String,
        /// The property.
        name: String,
    },
    /// The value has another type than the property.
    #[error("{setting}: {mismatch}")]
    Type {
        /// The annotation or option that requests the property.
        setting: String,
        /// Both types, and the correct notation.
        mismatch: String,
    },
    /// systemd refused the property or its value.
    #[error("systemd refused one of the properties {}: {reason}", .origins.join(", "))]
    Refused {
        /// The annotations or options that request the properties.
        origins: Vec<String>,
        /// systemd's message.
        reason: String,
    },
}

impl fmt::Display for Property {
    /// Names the place of the request.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.source {
            PropertySource::Annotation => write!(f, "annotation {PREFIX}{}", self.name),
            PropertySource::StopSignal => write!(f, "annotation {STOP_SIGNAL}"),
            PropertySource::Options => write!(f, "runtime option Properties.{}", self.name),
        }
    }
}

/// The prefix of annotations that request a property.
pub const PREFIX: &str = "org.systemd.property.";

/// The annotation that names the signal with which a container is stopped, as images do.
pub const STOP_SIGNAL: &str = "io.containerd.image.config.stop-signal";

/// Properties that nobody may set, and why. A `*` stands for any end of the name.
///
/// Options may set all other properties, including those that this program sets: limits, timeouts, dependencies, logging.
const DENIED: [(&[&str], &str); 6] = [
    (
        &["Exec*", "Type", "PIDFile", "GuessMainPID", "NotifyAccess", "ExitType", "BusName", "PAMName"],
        "the spec of the container determines what runs in the unit",
    ),
    (
        &["RemainAfterExit", "Restart*", "SuccessExitStatus", "AddRef"],
        "it determines how the exit of the container is observed, and only containerd starts containers",
    ),
    (
        &[
            "Slice",
            "InSlice",
            "Delegate*",
            "KillMode",
            "SendSIGKILL",
            "RefuseManualStart",
            "RefuseManualStop",
            "StopWhenUnneeded",
        ],
        "it determines how the container is placed, stopped and removed; the slice is set in linux.cgroupsPath",
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
        "it would apply to the OCI runtime; set process and linux in the spec for the container",
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

/// Properties that have another meaning for runc's scopes. Requests for them are ignored.
const LEFT_OUT: [(&str, &str); 1] =
    [("CollectMode", "the unit of a container is kept until it is deleted, for its exit code")];

/// Properties that systemd shows in another form than they are set in (systemd, dbus-execute.c and dbus-unit.c). Only
/// systemd can check their types.
const SHOWN_OTHERWISE: [&str; 3] = ["Conditions", "Asserts", "CoredumpFilter"];

/// The suffix and the type of limits that are fractions of the whole. systemd shows them as plain limits.
const SCALE: (&str, &str) = ("Scale", "u");

/// The requested properties after checking.
#[derive(Debug, Default)]
pub struct Checked {
    /// The properties to set. Each occurs once, with the value of the last request.
    pub properties: Vec<Property>,
    /// The properties that are ignored, and why.
    pub left_out: Vec<(Property, &'static str)>,
}

/// Additional properties that annotations may set, even if an option sets them as well.
#[derive(Debug, Default)]
pub struct Extension(Vec<String>);

impl Extension {
    /// Reads the runtime option `AnnotationProperties`.
    ///
    /// # Errors
    /// A name is not a valid property name, or nobody may set the property.
    pub fn new(names: &[String]) -> Result<Self, Error> {
        let own = names.iter().map(|name| {
            let setting = || format!("runtime option AnnotationProperties, {name:?}");
            if !is_name(name) {
                return Err(Error::Name { setting: setting() });
            }
            let name = in_microseconds(name).unwrap_or_else(|| name.clone());
            match denied(&name) {
                Some(reason) => Err(Error::Denied { setting: setting(), name, reason }),
                None => Ok(name),
            }
        });
        own.collect::<Result<_, _>>().map(Self)
    }

    fn has(&self, name: &str) -> bool {
        self.0.iter().any(|known| known == name)
    }

    /// The names that are no property of this systemd: probably spelling mistakes.
    pub fn unknown<'a>(&'a self, types: &'a Types) -> impl Iterator<Item = &'a str> {
        self.0.iter().map(String::as_str).filter(|name| !types.has(name))
    }
}

/// Checks the requested properties. Later ones override earlier ones, but an annotation does not override an option.
///
/// # Errors
/// The first property that is refused.
pub fn check(asked: impl IntoIterator<Item = Property>, extension: &Extension) -> Result<Checked, Error> {
    let mut checked = Checked::default();
    let mut named: Vec<(String, Variant<'static>)> = Vec::new();
    for property in asked {
        let (name, value) = read(&property)?;
        let earlier = named.iter().position(|(known, _)| *known == name);
        let is_option =
            |at: usize| checked.properties.get(at).is_some_and(|set| set.source == PropertySource::Options);
        let may_override = property.source == PropertySource::Options || extension.has(&name);
        let left_out = match property.source {
            _ if LEFT_OUT.iter().any(|(left_out, _)| *left_out == name) => {
                LEFT_OUT.iter().find(|(left_out, _)| *left_out == name).map(|(_, reason)| *reason)
            }
            PropertySource::Annotation if !extension.has(&name) => {
                allowed::check(&name, &value).map_err(|reason| Error::Denied {
                    setting: property.to_string(),
                    name: name.clone(),
                    reason,
                })?;
                None
            }
            PropertySource::StopSignal if !matches!(value, Variant::I32(number) if allowed::ends(number)) => {
                Some("this signal does not end a process")
            }
            PropertySource::Annotation | PropertySource::StopSignal | PropertySource::Options => None,
        };
        let overrides_option = !may_override && earlier.is_some_and(is_option);
        let left_out = left_out.or(overrides_option.then_some(SET_BY_OPTION));
        if let Some(reason) = left_out {
            checked.left_out.push((property, reason));
            continue;
        }
        if let Some(at) = earlier {
            named.remove(at);
            checked.properties.remove(at);
        }
        named.push((name, value));
        checked.properties.push(property);
    }
    check_order(&checked.properties, &named, extension)?;
    Ok(checked)
}

/// Checks that a container which is ordered after other units stops soon: systemd starts none of these units while it stops the
/// container. `named`: the properties with their names on D-Bus and their values.
fn check_order(
    properties: &[Property],
    named: &[(String, Variant<'_>)],
    extension: &Extension,
) -> Result<(), Error> {
    let own = |wanted: &str| {
        let mut all = properties.iter().zip(named);
        all.find(|(property, (name, _))| {
            property.source == PropertySource::Annotation && name == wanted && !extension.has(name)
        })
    };
    match (own(allowed::ORDER), own(allowed::STOP_TIME)) {
        (Some(_), Some((property, (name, value)))) => allowed::check_stop(value)
            .map_err(|reason| Error::Denied { setting: property.to_string(), name: name.clone(), reason }),
        _ => Ok(()),
    }
}

const SET_BY_OPTION: &str = "a runtime option sets it, and AnnotationProperties does not contain it";

/// The name and the value of a property.
fn read(property: &Property) -> Result<(String, Variant<'static>), Error> {
    let setting = || property.to_string();
    let name = property.name.as_str();
    if !is_name(name) {
        return Err(Error::Name { setting: setting() });
    }
    let value =
        gvariant::parse(&property.value).map_err(|source| Error::Value { setting: setting(), source })?;
    let (name, value) = match in_microseconds(name) {
        Some(name) => {
            let usec = microseconds(&value)
                .ok_or_else(|| Error::Seconds { setting: setting(), value: property.value.clone() })?;
            (name, usec.into())
        }
        None => (name.to_owned(), value),
    };
    if let Some(reason) = denied(&name) {
        return Err(Error::Denied { setting: setting(), name, reason });
    }
    if let Some(flaw) = flaw(&value, is_binary(&name)) {
        return Err(Error::Text { setting: setting(), flaw });
    }
    Ok((name, value))
}

fn is_name(name: &str) -> bool {
    const MAX_NAME: usize = 64;
    (3..=MAX_NAME).contains(&name.len()) && name.bytes().all(|byte| byte.is_ascii_alphabetic())
}

/// The name of the property in microseconds for a property in seconds.
fn in_microseconds(name: &str) -> Option<String> {
    let stem = name.strip_suffix("Sec").filter(|stem| stem.ends_with(|c: char| c.is_ascii_lowercase()));
    stem.map(|stem| format!("{stem}USec"))
}

/// True for properties whose bytes are numbers: masks and addresses. In all others, bytes are text.
fn is_binary(name: &str) -> bool {
    name.contains("Allowed") || name.starts_with("IPAddress") || ["CPUAffinity", "NUMAMask"].contains(&name)
}

/// Why a value can't be written to a unit's file.
fn flaw(value: &Variant<'_>, is_binary: bool) -> Option<String> {
    match value {
        Variant::Str(text) => text::flaw(text.as_str()),
        Variant::Array(array) if *array.element_signature() == Signature::U8 => {
            let bytes = array.iter().filter_map(|byte| u8::try_from(byte).ok()).collect();
            match String::from_utf8(bytes) {
                _ if is_binary => None,
                Ok(text) => text::flaw(&text),
                Err(_) => Some("its bytes are not UTF-8 text".to_owned()),
            }
        }
        Variant::Array(array) => array.iter().find_map(|element| flaw(element, is_binary)),
        Variant::Structure(structure) => structure.fields().iter().find_map(|field| flaw(field, is_binary)),
        _ => None,
    }
}

/// Why nobody may set the property for a container. `None` for another one.
pub(super) fn denied(name: &str) -> Option<&'static str> {
    let is_meant = |pattern: &&str| matches(pattern, name);
    DENIED.iter().find(|(patterns, _)| patterns.iter().any(is_meant)).map(|(_, reason)| *reason)
}

/// True for a name that the pattern means. A `*` at its end stands for any end of the name.
pub(super) fn matches(pattern: &str, name: &str) -> bool {
    pattern.strip_suffix('*').map_or(name == pattern, |begin| name.starts_with(begin))
}

/// Converts seconds, a number of any type.
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
            // Refuses 2^64 and more, infinity, NaN and negative numbers.
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
    /// The additional properties of a container's unit: its devices, and the requested properties, which come last and
    /// override all others.
    ///
    /// # Errors
    /// A property is refused.
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

#[cfg(any(test, fuzzing))]
impl Additions {
    /// The properties as they arrive in a message, and the length of its body. Panics if D-Bus can't carry them.
    #[allow(clippy::panic)]
    pub fn sent(&self) -> (Vec<(String, zbus::OwnedVariant)>, usize) {
        let message = zbus::Message::method_call("/o", "M").build(&self.0);
        let message = message.unwrap_or_else(|error| panic!("D-Bus can't carry {:?}: {error}", self.0));
        let body = message.body();
        let list = body.deserialize();
        (list.unwrap_or_else(|error| panic!("{:?} can't be read again: {error}", self.0)), body.len())
    }
}

fn to_owned_pairs(pairs: &[(&str, &str)]) -> Vec<(String, String)> {
    pairs.iter().map(|(one, other)| ((*one).to_owned(), (*other).to_owned())).collect()
}

/// The types of a service's properties in this version of systemd.
#[derive(Debug, Default)]
pub struct Types(pub(crate) HashMap<String, String>);

impl Types {
    /// Compares values with the types of their properties: systemd does not name the property if a type is wrong.
    ///
    /// # Errors
    /// [`Error::Unknown`], [`Error::Type`]
    pub fn check(&self, properties: &[Property]) -> Result<(), Error> {
        for property in properties {
            let (name, value) = read(property)?;
            let given = value.value_signature().to_string();
            if SHOWN_OTHERWISE.contains(&name.as_str()) {
                continue;
            }
            let Some(wanted) = self.of(&name) else {
                return Err(Error::Unknown { setting: property.to_string(), name });
            };
            if wanted != given {
                let mismatch = mismatch(&name, wanted, value.value_signature(), &property.value);
                return Err(Error::Type { setting: property.to_string(), mismatch });
            }
        }
        Ok(())
    }

    fn has(&self, name: &str) -> bool {
        SHOWN_OTHERWISE.contains(&name) || self.of(name).is_some()
    }

    fn of(&self, name: &str) -> Option<&str> {
        let is_scale = name.strip_suffix(SCALE.0).is_some_and(|stem| self.0.contains_key(stem));
        self.0.get(name).map(String::as_str).or(is_scale.then_some(SCALE.1))
    }
}

/// That a property has another type than its value, and how to write a value of its type.
fn mismatch(name: &str, wanted: &str, given: &Signature, text: &str) -> String {
    let given = gvariant::in_words(given);
    // The types of this systemd's properties come from systemd.
    let Ok(wanted) = Signature::try_from(wanted) else {
        return format!("{name} is of the D-Bus type {wanted}, but {text} is {given}");
    };
    let example = gvariant::example(&wanted, text).map(|example| format!(": write {example}"));
    let wanted = gvariant::in_words(&wanted);
    format!("{name} is {wanted}, but {text} is {given}{}", example.unwrap_or_default())
}

#[cfg(test)]
mod tests;
