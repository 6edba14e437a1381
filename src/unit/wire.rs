//! Which messages of the bus reach zbus (pure). The format of a message: D-Bus specification, "Message Format".
//!
//! zbus ends a connection with the first message that it can't read, and is stricter than the bus: it counts the depth of nested
//! types in another way than dbus-daemon, and refuses the header fields that dbus-broker passes on although it does not know
//! them. Every user of the machine can send a signal to the daemon's unique name. So a signal for the daemon alone is
//! skipped before zbus reads it, whatever its size. The daemon needs only replies, and the signals that systemd and the bus
//! broadcast.

/// How much is read from the bus at once, in bytes: more than most messages have.
const CHUNK: usize = 4 << 10;
/// The fixed part of a header, which ends with the length of the header's fields.
const FIXED: usize = 16;
/// The largest header fields of a signal that the daemon reads, in bytes. Those of systemd have less than 300.
const MAX_FIELDS: usize = 64 << 10;

const METHOD_RETURN: u8 = 2;
const ERROR: u8 = 3;
const SIGNAL: u8 = 4;

/// The code of the header field with the name of the only client that a message is for.
const DESTINATION: u8 = 6;

/// Divides the bytes from the bus into messages, and skips those that are not for zbus.
#[derive(Debug, Default)]
pub struct Filter {
    /// What has arrived and is neither passed on nor skipped.
    arrived: Vec<u8>,
    /// How much of what follows is passed on.
    pass: u64,
    /// How much of what follows is skipped.
    skip: u64,
    /// A line of the authentication is incomplete.
    in_line: bool,
}

/// What happens to the next bytes.
#[derive(Debug, PartialEq, Eq)]
enum Next {
    Pass(u64),
    Skip(u64),
    /// More bytes decide.
    Unknown,
}

impl Filter {
    /// Where to add what arrives. There is room for [`CHUNK`] bytes.
    pub fn arrived(&mut self) -> &mut Vec<u8> {
        self.arrived.reserve(CHUNK);
        &mut self.arrived
    }

    /// Moves bytes for zbus into `buffer`. Returns how many, 0 if more have to arrive first.
    pub fn take(&mut self, buffer: &mut [u8]) -> usize {
        let (mut at, mut taken) = (0, 0);
        loop {
            let rest = &self.arrived[at..];
            if rest.is_empty() || taken == buffer.len() {
                break;
            }
            if self.skip > 0 {
                let skipped = at_most(self.skip, rest.len());
                self.skip -= skipped as u64;
                at += skipped;
            } else if self.pass > 0 {
                let passed = at_most(self.pass, rest.len().min(buffer.len() - taken));
                buffer[taken..taken + passed].copy_from_slice(&rest[..passed]);
                self.pass -= passed as u64;
                at += passed;
                taken += passed;
            } else {
                match self.next(at) {
                    Next::Pass(length) => self.pass = length,
                    Next::Skip(length) => self.skip = length,
                    Next::Unknown => break,
                }
            }
        }
        self.arrived.drain(..at);
        if self.arrived.is_empty() {
            // Frees the memory of a large header.
            self.arrived.shrink_to(2 * CHUNK);
        }
        taken
    }

    /// What reaches zbus of bytes that arrive in pieces of size `piece`, if zbus has room for `room` bytes at a time.
    #[cfg(any(test, fuzzing))]
    pub fn passed(bytes: &[u8], piece: usize, room: usize) -> Vec<u8> {
        let (mut filter, mut all, mut buffer) = (Self::default(), Vec::new(), vec![0; room]);
        for piece in bytes.chunks(piece) {
            filter.arrived().extend_from_slice(piece);
            loop {
                match filter.take(&mut buffer) {
                    0 => break,
                    taken => all.extend_from_slice(&buffer[..taken]),
                }
            }
            assert!(filter.arrived.len() <= FIXED + MAX_FIELDS, "only a header is kept");
        }
        all
    }

    /// What happens to the bytes from `at` on, where a message or a line begins.
    fn next(&mut self, at: usize) -> Next {
        let rest = &self.arrived[at..];
        let is_message = matches!(rest.first(), Some(b'l' | b'B'));
        if self.in_line || !is_message {
            let end = rest.iter().position(|byte| *byte == b'\n');
            self.in_line = end.is_none();
            return Next::Pass(end.map_or(rest.len(), |end| end + 1) as u64);
        }
        message(rest)
    }
}

fn at_most(length: u64, limit: usize) -> usize {
    usize::try_from(length).map_or(limit, |length| length.min(limit))
}

/// What happens to a message, of which `bytes` are the beginning.
fn message(bytes: &[u8]) -> Next {
    let Some(fixed) = bytes.first_chunk::<FIXED>() else { return Next::Unknown };
    let is_big_endian = fixed[0] == b'B';
    let number = |at: usize| read_u32(fixed, at, is_big_endian).unwrap_or_default();
    let (body, fields) = (u64::from(number(4)), u64::from(number(12)));
    let length = FIXED as u64 + fields.next_multiple_of(8) + body;
    match fixed[1] {
        METHOD_RETURN | ERROR => return Next::Pass(length),
        SIGNAL => {}
        _ => return Next::Skip(length),
    }
    let Some(fields) = usize::try_from(fields).ok().filter(|fields| *fields <= MAX_FIELDS) else {
        return Next::Skip(length);
    };
    match bytes.get(..FIXED + fields) {
        None => Next::Unknown,
        Some(header) if is_broadcast(header, is_big_endian) == Some(true) => Next::Pass(length),
        Some(_) => Next::Skip(length),
    }
}

/// Whether a header has no destination. `None` if a field is not one that the specification has.
fn is_broadcast(header: &[u8], is_big_endian: bool) -> Option<bool> {
    let mut at = FIXED;
    while at < header.len() {
        at = at.next_multiple_of(8);
        let code = *header.get(at)?;
        if code == DESTINATION {
            return Some(false);
        }
        // A signature of one character, and its NUL.
        let [1, kind, 0] = *header.get(at + 1..at + 4)? else { return None };
        at += 4;
        at += match kind {
            b's' | b'o' => 4 + usize::try_from(read_u32(header, at, is_big_endian)?).ok()? + 1,
            b'g' => 1 + usize::from(*header.get(at)?) + 1,
            b'u' => 4,
            _ => return None,
        };
        if at > header.len() || !(1..=9).contains(&code) {
            return None;
        }
    }
    Some(true)
}

/// The number at a position that is a multiple of 4.
fn read_u32(bytes: &[u8], at: usize, is_big_endian: bool) -> Option<u32> {
    let bytes = *bytes.get(at..)?.first_chunk::<4>()?;
    Some(if is_big_endian { u32::from_be_bytes(bytes) } else { u32::from_le_bytes(bytes) })
}

#[cfg(test)]
mod tests {
    use super::*;
    use zbus::Message;

    fn signal(to: Option<&'static str>) -> Vec<u8> {
        let builder = Message::signal("/a", "b.c", "D").sender(":1.5");
        let builder = match to {
            Some(name) => builder.destination(name),
            None => builder,
        };
        builder.build(&("x".repeat(3000),)).unwrap().data().to_vec()
    }

    fn reply() -> Vec<u8> {
        let call = Message::method_call("/", "Asked").build(&()).unwrap();
        Message::method_return(&call.header()).build(&7_u32).unwrap().data().to_vec()
    }

    /// A signal for one client, with a body that dbus-daemon accepts and zbus does not.
    fn nested() -> Vec<u8> {
        let kind = format!("{}y{}", "aa(".repeat(17), ")".repeat(17));
        let mut bytes = signal(Some(":1.7"));
        let fields = bytes[12..16].try_into().map(u32::from_le_bytes).unwrap() as usize;
        let mut header = bytes[FIXED..FIXED + fields].to_vec();
        header.resize(header.len().next_multiple_of(8), 0);
        header.extend([8, 1, b'g', 0, u8::try_from(kind.len()).unwrap()]);
        header.extend(kind.bytes().chain([0]));
        bytes.truncate(FIXED);
        bytes[4..8].copy_from_slice(&4_u32.to_le_bytes());
        bytes[12..16].copy_from_slice(&u32::try_from(header.len()).unwrap().to_le_bytes());
        header.resize(header.len().next_multiple_of(8), 0);
        [bytes, header, vec![0; 4]].concat()
    }

    #[test]
    fn replies_and_broadcasts_pass_and_signals_for_one_client_do_not() {
        let login = b"OK 1234\r\nDATA\r\n".to_vec();
        let (first, broadcast, last) = (reply(), signal(None), reply());
        let unwanted = signal(Some(":1.7"));
        let all = [&login, &first, &unwanted, &broadcast, &nested(), &last, &unwanted].map(Vec::clone);
        let expected = [login, first, broadcast, last].concat();
        for (piece, buffer) in [(1, 1), (1, 64), (7, 16), (4096, 4096), (1 << 20, 1 << 20)] {
            assert!(Filter::passed(&all.concat(), piece, buffer) == expected, "{piece} {buffer}");
        }
    }

    #[test]
    fn a_header_with_a_field_that_nobody_knows_does_not_pass() {
        let mut bytes = signal(None);
        assert_eq!(message(&bytes), Next::Pass(bytes.len() as u64));
        // The code of the first field.
        bytes[FIXED] = 10;
        assert_eq!(message(&bytes), Next::Skip(bytes.len() as u64));
        bytes[FIXED] = 0;
        assert_eq!(message(&bytes), Next::Skip(bytes.len() as u64));
    }

    #[test]
    fn a_large_header_is_skipped_before_it_has_arrived() {
        let mut bytes = signal(None);
        bytes[12..16].copy_from_slice(&(1_u32 << 26).to_le_bytes());
        assert!(matches!(message(&bytes[..FIXED]), Next::Skip(length) if length > 1 << 26));
        assert_eq!(message(&bytes[..FIXED - 1]), Next::Unknown);
    }

    #[test]
    fn calls_are_skipped_in_both_byte_orders() {
        let mut call = Message::method_call("/", "Call").build(&()).unwrap().data().to_vec();
        assert_eq!(message(&call), Next::Skip(call.len() as u64));
        call[0] = b'B';
        call[4..8].reverse();
        call[12..16].reverse();
        assert_eq!(message(&call), Next::Skip(call.len() as u64));
    }
}
