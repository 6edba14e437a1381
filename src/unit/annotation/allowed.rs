//! What an annotation may set: properties with which a container can harm nobody but itself (pure).
//!
//! The author of a pod is not the administrator, so this is a list of what is allowed: whatever a systemd of next year
//! brings is not on it. The administrator adds to it with the option `AnnotationProperties`. Not on it, though they look
//! harmless, are
//! - what takes from others: MemoryMin, MemoryLow, and weights above the default;
//! - lists and masks that systemd merges with those of a drop-in or a slice, which would loosen what the administrator has
//!   set there: IPAddressAllow, RestrictNetworkInterfaces, AllowedCPUs, AllowedMemoryNodes, DeviceAllow, and limits of single
//!   devices under another of their names;
//! - Before: a container that never finishes starting would keep the unit that it is before from starting;
//! - what starts or stops other units, and what changes whose lines the journal shows.

use zbus::{Signature, Variant};

/// What the value of an allowed property has to be. A value of a wrong type is refused elsewhere.
#[derive(Clone, Copy)]
enum Rule {
    /// Any value concerns the container only.
    Any,
    /// At most systemd's default weight.
    Weight,
    /// A time that is over before a shutdown of the machine is held up.
    StopTime,
    /// A signal that ends a process.
    Signal,
    /// Names of units, not many.
    Units,
    /// Text that systemd would read with specifiers in it: `%H` is the name of the host.
    Addresses,
}

/// The list. MemoryZSwapMax came with systemd 253, all others are older than 252.
const ALLOWED: [(&str, Rule); 17] = [
    ("After", Rule::Units),
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
    ("TimeoutStopUSec", Rule::StopTime),
];

/// systemd's and the kernel's default weight, of processors and of disks.
const DEFAULT_WEIGHT: u64 = 100;
/// The weight that stands for "not set".
const NO_WEIGHT: u64 = u64::MAX;
/// The longest time for which one container may hold up the shutdown of the machine, in microseconds.
const MAX_STOP_USEC: u64 = 300 * 1_000_000;
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
            Rule::Weight => "a weight above 100, the default, would take from others",
            Rule::StopTime => {
                "it has to be more than 0 and at most 300 s: the shutdown of the machine waits for it"
            }
            Rule::Signal => "this signal does not end a process",
            Rule::Units => "it has to be names of services, targets, sockets and mounts",
            Rule::Addresses => "systemd would replace what follows a \"%\"",
            Rule::Any => "this value is not allowed",
        });
    }
    match words(value) {
        Some(words) if words.len() > MAX_NAMES => Err("it has more than 32 entries"),
        _ => Ok(()),
    }
}

/// The elements of a list of strings; nothing for another type.
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

/// Signals that end a process which does not catch them, and SIGWINCH, which web servers take for the order to end. After
/// the others a container would run on until the time for its stop is over.
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
