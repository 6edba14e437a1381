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
mod tests {
    use super::*;

    fn annotation(name: &str, value: &str) -> Property {
        Property { asker: Asker::Annotation, name: name.to_owned(), value: value.to_owned() }
    }

    fn named(name: &str, value: &str) -> Result<(String, String), Error> {
        let Additions(mut list) = Additions::new(None, &[annotation(name, value)])?;
        let (name, value) = list.pop().unwrap();
        Ok((name, value.to_string()))
    }

    fn refusal(name: &str, value: &str) -> String {
        named(name, value).expect_err(name).to_string()
    }

    #[test]
    fn runcs_own_examples_are_understood() {
        let set = |name: &str, value: &str| named(name, value).unwrap();
        assert_eq!(
            set("TimeoutStopUSec", "uint64 123456789"),
            ("TimeoutStopUSec".into(), "uint64 123456789".into())
        );
        let checked = check([annotation("CollectMode", "'inactive-or-failed'")]).unwrap();
        assert!(checked.properties.is_empty() && checked.left_out[0].1.contains("until it is deleted"));
    }

    #[test]
    fn seconds_become_microseconds() {
        for value in ["90", "byte 90", "int16 90", "uint16 90", "uint32 90", "int64 90", "uint64 90", "90.0"]
        {
            let property = named("TimeoutStopSec", value).unwrap();
            assert_eq!(property, ("TimeoutStopUSec".into(), "uint64 90000000".into()), "{value}");
        }
        assert_eq!(named("WatchdogSec", "0.25").unwrap().1, "uint64 250000");
        for value in ["-1", "'90s'", "true", "-0.5", "inf", "nan", "1e15", "uint64 18446744073710"] {
            let text = refusal("TimeoutStopSec", value);
            assert!(
                text.contains("org.systemd.property.TimeoutStopSec: ") && text.contains("seconds"),
                "{text}"
            );
        }
    }

    #[test]
    fn sec_stays_where_no_small_letter_stands_before_it() {
        for name in ["TimeoutStopUSec", "TimerSlackNSec", "Sec"] {
            assert_eq!(named(name, "uint64 5").unwrap(), (name.to_owned(), "uint64 5".into()));
        }
    }

    #[test]
    fn a_name_is_made_of_letters() {
        for name in ["", "Ab", "After=", "Stop_Sec", "A b c", "After1", "Äfter", "a.b.c"] {
            let text = refusal(name, "'x'");
            assert!(text.starts_with(&format!("annotation org.systemd.property.{name}: ")), "{text}");
        }
    }

    #[test]
    fn bad_text_is_told_with_name_and_place() {
        let text = refusal("After", "['x.service'");
        assert!(text.starts_with("annotation org.systemd.property.After: "), "{text}");
        assert!(text.ends_with("at character 13"), "{text}");
    }

    #[test]
    fn what_the_promises_rest_on_is_denied_with_a_reason() {
        for name in [
            "ExecStart",
            "ExecStartEx",
            "ExecStopPost",
            "Type",
            "PIDFile",
            "GuessMainPID",
            "NotifyAccess",
            "RemainAfterExit",
            "Restart",
            "RestartSec",
            "RestartUSec",
            "SuccessExitStatus",
            "AddRef",
            "Slice",
            "Delegate",
            "DelegateSubgroup",
            "KillMode",
            "User",
            "Group",
            "DynamicUser",
            "RootDirectory",
            "RootImage",
            "WorkingDirectory",
            "PrivateMounts",
            "PrivateTmp",
            "ProtectSystem",
            "MountFlags",
            "StandardOutput",
            "StandardInputFileDescriptor",
            "Environment",
            "EnvironmentFiles",
            "SystemCallFilter",
            "RefuseManualStop",
        ] {
            let text = refusal(name, "5");
            assert!(text.contains(&format!("org.systemd.property.{name}: ")), "{text}");
            assert!(text.contains("can't be set: "), "{text}");
        }
    }

    #[test]
    fn what_a_person_wants_of_a_unit_may_be_set() {
        for name in [
            "After",
            "Wants",
            "Requires",
            "BindsTo",
            "PartOf",
            "Conflicts",
            "OnFailure",
            "Description",
            "KillSignal",
            "TimeoutStartUSec",
            "RuntimeMaxUSec",
            "MemoryHigh",
            "CPUWeight",
            "TasksMax",
            "ManagedOOMMemoryPressure",
            "OOMPolicy",
            "OOMScoreAdjust",
            "DefaultDependencies",
            "LogExtraFields",
            "LogLevelMax",
            "DeviceAllow",
            "IPAddressDeny",
            "RestrictNetworkInterfaces",
        ] {
            assert_eq!(denied(name), None, "{name}");
        }
    }

    #[test]
    fn the_last_to_ask_for_a_property_gets_it() {
        let option = |name: &str, value: &str| Property {
            asker: Asker::Options,
            name: name.to_owned(),
            value: value.to_owned(),
        };
        let asked = [
            option("TimeoutStopSec", "5"),
            option("After", "['a.service']"),
            annotation("TimeoutStopUSec", "uint64 7"),
        ];
        let checked = check(asked).unwrap();
        let names: Vec<String> = checked.properties.iter().map(ToString::to_string).collect();
        assert_eq!(
            names,
            ["runtime option Properties.After", "annotation org.systemd.property.TimeoutStopUSec"]
        );
    }

    #[test]
    fn a_value_of_another_type_is_told_with_both_types() {
        let types = Types(
            [("TimeoutStopUSec", "t"), ("After", "as"), ("CoredumpFilter", "ay")]
                .map(|(name, kind)| (name.to_owned(), kind.to_owned()))
                .into(),
        );
        for (name, value) in [
            ("TimeoutStopUSec", "uint64 5"),
            ("TimeoutStopSec", "5"),
            ("After", "['x']"),
            ("After", "@as []"),
            ("CoredumpFilter", "uint64 5"),
            ("NotKnownYet", "5"),
        ] {
            types.check(&[annotation(name, value)]).unwrap();
        }
        let wrong = |name, value| types.check(&[annotation(name, value)]).unwrap_err().to_string();
        assert_eq!(
            wrong("TimeoutStopUSec", "5"),
            "annotation org.systemd.property.TimeoutStopUSec: TimeoutStopUSec is of type \"t\", but 5 is of type \
             \"i\": write @t 5"
        );
        assert!(wrong("After", "'x'").ends_with("is of type \"as\", but 'x' is of type \"s\""));
    }

    #[test]
    fn devices_stand_before_what_was_asked_for() {
        let devices = [DeviceAllow { device: "/dev/char/1:3".to_owned(), access: "rw".to_owned() }];
        let list = Additions::new(Some(&devices), &[annotation("DevicePolicy", "'auto'")]).unwrap().0;
        let shown: Vec<String> = list.iter().map(|(name, value)| format!("{name} {value}")).collect();
        assert_eq!(
            shown,
            ["DevicePolicy \"strict\"", "DeviceAllow [(\"/dev/char/1:3\", \"rw\")]", "DevicePolicy \"auto\"",]
        );
    }
}
