//! Fuzz targets for messages from the bus. Any user of the bus can send them.

use std::collections::HashMap;

use zbus::message::Type;
use zbus::names::OwnedUniqueName;
use zbus::{Message, OwnedObjectPath, Variant};

use crate::unit::bus::SERVICE_INTERFACE;
use crate::unit::name;
use crate::unit::signals::{
    self, BUS, BUS_PATH, MANAGER_INTERFACE, MANAGER_PATH, PROPERTIES_INTERFACE, SYSTEMD, Signal,
};
use crate::unit::wire::Filter;

const OWNER: &str = ":1.5";

/// Makes a header. One byte for each field chooses one of the values that matter, or the next line of the text.
struct Bytes<'d> {
    choices: &'d [u8],
    text: std::str::Lines<'d>,
}

impl<'d> Bytes<'d> {
    fn choose(&mut self, known: &[&'d str]) -> &'d str {
        let (choice, rest) = self.choices.split_first().unwrap_or((&0, &[]));
        self.choices = rest;
        match known.get(usize::from(*choice) % (known.len() + 1)) {
            Some(known) => known,
            None => self.line(),
        }
    }

    fn number(&mut self) -> i64 {
        self.line().parse().unwrap_or_default()
    }

    fn line(&mut self) -> &'d str {
        self.text.next().unwrap_or_default()
    }
}

/// Target: bytes from the bus, in pieces of a size that the first byte chooses. What reaches zbus does not depend on the pieces,
/// and little is kept meanwhile.
pub(super) fn wire(data: &[u8]) {
    /// As much as zbus reads first, and more.
    const ROOM: usize = 64;
    let Some((piece, bytes)) = data.split_first() else { return };
    let whole = Filter::passed(bytes, bytes.len().max(1), ROOM);
    assert!(whole.len() <= bytes.len());
    assert_eq!(Filter::passed(bytes, usize::from(*piece) + 1, ROOM), whole);
}

/// Target: a message with any header and any body. The daemon believes only what systemd or the bus broadcasts, and reads
/// from it what the body contains.
pub(super) fn message(data: &[u8]) {
    let (choices, text) = data.split_at(data.len().min(8));
    let Ok(text) = std::str::from_utf8(text) else { return };
    let mut bytes = Bytes { choices, text: text.lines() };
    let kind = bytes.choose(&["signal", "call", "error"]);
    let sender = bytes.choose(&[OWNER, BUS, ":1.66", ":1.55", SYSTEMD]);
    let destination = bytes.choose(&["", ":1.77"]);
    let path = bytes.choose(&[
        "/org/freedesktop/systemd1/unit/containerd_2ddefault_2dweb_2eservice",
        "/org/freedesktop/systemd1/unit/ssh_2eservice",
        MANAGER_PATH,
        BUS_PATH,
    ]);
    let interface = bytes.choose(&[PROPERTIES_INTERFACE, MANAGER_INTERFACE, BUS, SERVICE_INTERFACE]);
    let member = bytes.choose(&["PropertiesChanged", "JobRemoved", "Reloading", "NameOwnerChanged"]);
    let mut builder = match kind {
        "call" => Message::method_call(path, member).interface(interface),
        "error" => match Message::method_call(path, member).build(&()) {
            Ok(call) => Message::error(&call.header(), "org.example.Error"),
            Err(_) => return,
        },
        _ => Message::signal(path, interface, member),
    };
    builder = builder.sender(sender);
    if !destination.is_empty() {
        builder = builder.destination(destination);
    }
    let Some(message) = body(builder, &mut bytes) else { return };
    let owner = OwnedUniqueName::try_from(OWNER).unwrap_or_else(|error| panic!("{OWNER}: {error}"));
    assert_eq!(signals::read(&message, None).filter(|signal| !matches!(signal, Signal::Owner(_))), None);
    let Some(signal) = signals::read(&message, Some(&owner)) else { return };
    let is_broadcast = message.message_type() == Type::Signal && destination.is_empty();
    assert!(is_broadcast, "{signal:?} from {message:?}");
    match signal {
        Signal::Service { unit, .. } | Signal::Spawned(unit) => {
            assert_eq!((sender, interface, member), (OWNER, PROPERTIES_INTERFACE, "PropertiesChanged"));
            assert!(unit.as_str().starts_with(name::PREFIX), "{unit}");
            assert_eq!(name::from_object_path(path), Some(unit));
        }
        Signal::Job { .. } => assert_eq!(
            (sender, path, interface, member),
            (OWNER, MANAGER_PATH, MANAGER_INTERFACE, "JobRemoved")
        ),
        Signal::Reloading | Signal::Reloaded => assert_eq!(
            (sender, path, interface, member),
            (OWNER, MANAGER_PATH, MANAGER_INTERFACE, "Reloading")
        ),
        Signal::Owner(_) => {
            assert_eq!((sender, path, interface, member), (BUS, BUS_PATH, BUS, "NameOwnerChanged"));
        }
    }
}

/// Makes a body that has the type of one of the signals, or another type.
fn body(builder: zbus::message::Builder<'_>, bytes: &mut Bytes<'_>) -> Option<Message> {
    let built = match bytes.choose(&["change", "job", "flag", "owner", "bytes"]) {
        "change" => {
            let of = bytes.choose(&[SERVICE_INTERFACE, "org.freedesktop.systemd1.Unit"]);
            let mut values: HashMap<&str, Variant<'_>> = HashMap::new();
            for name in ["MainPID", "ExecMainPID", "ExecMainCode", "ExecMainStatus", "ExecMainExitTimestamp"]
            {
                let number = bytes.number();
                let value = match (name, number % 7) {
                    (_, 6) => continue,
                    (_, 5) => Variant::from("text"),
                    ("MainPID" | "ExecMainPID", _) => Variant::from(number as u32),
                    ("ExecMainExitTimestamp", _) => Variant::from(number as u64),
                    _ => Variant::from(number as i32),
                };
                values.insert(name, value);
            }
            builder.build(&(of, values, vec![bytes.line()]))
        }
        "job" => {
            let job = OwnedObjectPath::try_from("/org/freedesktop/systemd1/job/3").ok()?;
            builder.build(&(bytes.number() as u32, job, bytes.line(), bytes.line()))
        }
        "flag" => builder.build(&(bytes.number() % 2 == 0)),
        "owner" => builder.build(&(bytes.choose(&[SYSTEMD]), bytes.line(), bytes.line())),
        text => builder.build(&text.as_bytes()),
    };
    built.ok()
}
