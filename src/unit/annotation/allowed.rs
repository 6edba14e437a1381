//! What an annotation may set: properties with which a container can harm nobody but itself (pure).
//!
//! The author of a pod is not the administrator. So this is a list of what is allowed, and a property that a later systemd
//! adds is not on it. The administrator adds to the list with the option `AnnotationProperties`. These properties look
//! harmless, but are not on the list:
//! - properties that take resources from other units: MemoryMin, MemoryLow, and weights above the default;
//! - lists and masks that systemd merges with those of a drop-in or a slice, which would loosen what the administrator
//!   has set there: IPAddressAllow, RestrictNetworkInterfaces, AllowedCPUs, AllowedMemoryNodes, DeviceAllow, and limits of
//!   single devices under another of their names;
//! - Before: the named unit would not start while the container is starting, which may take forever;
//! - properties that start or stop other units, and properties that change which unit or program a line in the journal
//!   appears to come from.

use zbus::{Signature, Variant};

/// Which values of an allowed property are allowed. [`super::Types`] refuses values of a wrong type.
#[derive(Clone, Copy)]
enum Rule {
    /// Any value concerns the container only.
    Any,
    /// At most systemd's default weight.
    Weight,
    /// A time that does not delay a shutdown of the machine for long.
    StopTime,
    /// A signal that ends a process.
    Signal,
    /// A limited number of names of units.
    Units,
    /// Addresses without `%`: systemd replaces specifiers in them, such as `%H` by the name of the host.
    Addresses,
}

/// The list. MemoryZSwapMax came with systemd 253, all others are older than 252.
const ALLOWED: [(&str, Rule); 17] = [
    (ORDER, Rule::Units),
    ("CPUQuotaPerSecUSec", Rule::Any),
    ("CPUQuotaPeriodUSec", Rule::Any),
    ("CPUWeight", Rule::Weight),
    ("Description", Rule::Any),
    ("Documentation", Rule::Addresses),
    ("IOWeight", Rule::Weight),
    ("IPAddressDeny", Rule::Any),
    ("KillSignal", Rule::Signal),
    ("MemoryHigh", Rule::Any),
    ("MemoryMax", Rule::Any),
    ("MemorySwapMax", Rule::Any),
    ("MemoryZSwapMax", Rule::Any),
    ("OOMPolicy", Rule::Any),
    ("RuntimeMaxUSec", Rule::Any),
    ("TasksMax", Rule::Any),
    (STOP_TIME, Rule::StopTime),
];

/// The property with the units that systemd stops after the container.
pub(super) const ORDER: &str = "After";
/// The property with the time that the container has to stop.
pub(super) const STOP_TIME: &str = "TimeoutStopUSec";

/// systemd's and the kernel's default weight, of processors and of disks.
const DEFAULT_WEIGHT: u64 = 100;
/// The weight that stands for "not set".
const NO_WEIGHT: u64 = u64::MAX;
/// The longest time for which one container may hold up the shutdown of the machine, in microseconds.
const MAX_STOP_USEC: u64 = 300 * 1_000_000;
/// The same for a container that is ordered after other units: systemd starts none of them while it stops the container
/// (job.c, `job_compare`).
const MAX_ORDERED_STOP_USEC: u64 = 60 * 1_000_000;
/// The most names or addresses in a list.
const MAX_NAMES: usize = 32;
/// systemd loads a unit for each name that it gets.
const UNIT_TYPES: [&str; 4] = [".service", ".target", ".socket", ".mount"];

/// Checks that an annotation may set a property to this value without permission of the administrator.
///
/// # Errors
/// The reason, if it may not.
pub(super) fn check(name: &str, value: &Variant<'_>) -> Result<(), &'static str> {
    let Some((_, rule)) = ALLOWED.iter().find(|(allowed, _)| *allowed == name) else {
        return Err(
            "it is not one of those that an annotation may set; the administrator can allow it with the \
                    runtime option AnnotationProperties",
        );
    };
    let is_fit = match (rule, value) {
        (Rule::Weight, Variant::U64(weight)) => *weight <= DEFAULT_WEIGHT || *weight == NO_WEIGHT,
        // systemd takes 0 for no limit.
        (Rule::StopTime, Variant::U64(usec)) => (1..=MAX_STOP_USEC).contains(usec),
        (Rule::Signal, Variant::I32(number)) => ends(*number),
        (Rule::Units, _) => words(value).is_none_or(|words| words.iter().all(|word| is_unit(word))),
        (Rule::Addresses, _) => words(value).is_none_or(|words| words.iter().all(|word| !word.contains('%'))),
        _ => true,
    };
    if !is_fit {
        return Err(match rule {
            Rule::Weight => "a weight above 100, the default, would take resources from other units",
            Rule::StopTime => {
                "the time must be more than 0 and at most 300 s: the shutdown of the machine waits for it"
            }
            Rule::Signal => "this signal does not end a process",
            Rule::Units => "only names of services, targets, sockets and mounts are allowed",
            Rule::Addresses => "\"%\" is not allowed: systemd would replace it and the letter after it",
            Rule::Any => "this value is not allowed",
        });
    }
    match words(value) {
        Some(words) if words.len() > MAX_NAMES => Err("the list has more than 32 entries"),
        _ => Ok(()),
    }
}

/// Checks the time that a container with [`ORDER`] has to stop.
///
/// # Errors
/// The reason, if the time is too long.
pub(super) fn check_stop(value: &Variant<'_>) -> Result<(), &'static str> {
    match value {
        Variant::U64(usec) if *usec > MAX_ORDERED_STOP_USEC => Err(
            "with After, the time must be at most 60 s: systemd does not start the units in After while it stops the container",
        ),
        _ => Ok(()),
    }
}

/// The elements of a list of strings; `None` for a value of another type.
fn words<'v>(value: &'v Variant<'_>) -> Option<Vec<&'v str>> {
    let Variant::Array(array) = value else {
        return None;
    };
    if *array.element_signature() != Signature::Str {
        return None;
    }
    array
        .iter()
        .map(|word| match word {
            Variant::Str(word) => Some(word.as_str()),
            _ => None,
        })
        .collect()
}

fn is_unit(name: &str) -> bool {
    const MAX_NAME: usize = 255;
    let is_letter = |c: char| c.is_ascii_alphanumeric() || ":-_.@\\".contains(c);
    name.len() <= MAX_NAME
        && name.chars().all(is_letter)
        && UNIT_TYPES.iter().any(|kind| name.ends_with(kind))
}

/// True for signals that end a process which does not catch them, and for SIGWINCH, on which web servers end. After any
/// other signal, a container would continue until the time limit of its stop.
pub(super) fn ends(signal: i32) -> bool {
    use nix::libc::{SIGCHLD, SIGCONT, SIGRTMAX, SIGSTOP, SIGTSTP, SIGTTIN, SIGTTOU, SIGURG};
    const NOT: [i32; 7] = [SIGCHLD, SIGCONT, SIGSTOP, SIGTSTP, SIGTTIN, SIGTTOU, SIGURG];
    (1..=SIGRTMAX()).contains(&signal) && !NOT.contains(&signal)
}

/// The names on the list.
#[cfg(test)]
pub(super) fn names() -> impl Iterator<Item = &'static str> {
    ALLOWED.iter().map(|(name, _)| *name)
}
