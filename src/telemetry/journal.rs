//! Writes events to the journal, with their fields and those of their spans (journald's native protocol:
//! systemd.io/JOURNAL_NATIVE_PROTOCOL).

use std::fmt::{self, Write};
use std::io;
use std::path::Path;
use std::sync::Arc;

use tracing::field::{Field, Visit};
use tracing::span::{Attributes, Id, Record};
use tracing::{Event, Level, Metadata, Subscriber};
use tracing_subscriber::layer::Context;
use tracing_subscriber::registry::LookupSpan;

use crate::text;

use super::sender::Sender;

/// journald's socket.
pub const SOCKET: &str = "/run/systemd/journal/socket";

/// journald's message about lines that it suppresses (sd-messages.h, `SD_MESSAGE_JOURNAL_DROPPED`).
pub const MESSAGE_DROPPED: &str = "a596d6fe7bfa4994828e72309e95d61e";

/// The longest value of an event's field, in bytes. Of a longer one, the journal gets the beginning and the end.
const LONGEST_VALUE: usize = 48 << 10;
/// The same where the kernel accepts no datagram of the size, and for the fields of spans.
const SHORT_VALUE: usize = 1 << 10;

/// Sends each event to journald.
pub struct Journal {
    sender: Arc<Sender>,
    /// The fields of every message, encoded.
    identifier: Vec<u8>,
}

/// The encoded fields of a span.
struct SpanFields(Vec<u8>);

impl Journal {
    /// Sends events to this socket of journald, as messages of this program.
    ///
    /// # Errors
    /// This process can't make a socket.
    pub fn new(socket: &Path, identifier: &str) -> io::Result<Self> {
        let mut encoded = Vec::new();
        push_field(&mut encoded, "SYSLOG_IDENTIFIER", identifier.as_bytes());
        let missing = encoded.clone();
        let missing = move |count: u64| missing_messages(&missing, count);
        Ok(Self { sender: Sender::new(socket, Box::new(missing))?, identifier: encoded })
    }

    fn encoded(&self, event: &Event<'_>, spans: &[u8], limit: usize) -> Vec<u8> {
        let mut datagram = spans.to_vec();
        push_field(&mut datagram, "PRIORITY", priority(*event.metadata().level()).as_bytes());
        push_metadata(&mut datagram, "", event.metadata());
        datagram.extend_from_slice(&self.identifier);
        event.record(&mut Fields { datagram: &mut datagram, limit });
        datagram
    }
}

impl<S: Subscriber + for<'a> LookupSpan<'a>> tracing_subscriber::Layer<S> for Journal {
    fn on_new_span(&self, attributes: &Attributes<'_>, id: &Id, context: Context<'_, S>) {
        let Some(span) = context.span(id) else {
            return;
        };
        let mut fields = Vec::new();
        push_field(&mut fields, "SPAN_NAME", span.name().as_bytes());
        push_metadata(&mut fields, "SPAN_", span.metadata());
        attributes.record(&mut Fields { datagram: &mut fields, limit: SHORT_VALUE });
        fields.shrink_to_fit();
        span.extensions_mut().insert(SpanFields(fields));
    }

    fn on_record(&self, id: &Id, values: &Record<'_>, context: Context<'_, S>) {
        if let Some(span) = context.span(id)
            && let Some(SpanFields(fields)) = span.extensions_mut().get_mut()
        {
            values.record(&mut Fields { datagram: fields, limit: SHORT_VALUE });
        }
    }

    fn on_event(&self, event: &Event<'_>, context: Context<'_, S>) {
        let mut spans = Vec::new();
        for span in context.event_scope(event).into_iter().flat_map(|scope| scope.from_root()) {
            if let Some(SpanFields(fields)) = span.extensions().get() {
                spans.extend_from_slice(fields);
            }
        }
        let datagram = self.encoded(event, &spans, LONGEST_VALUE);
        let fits = datagram.len() <= self.sender.longest();
        self.sender.send(if fits { datagram } else { self.encoded(event, &spans, SHORT_VALUE) });
    }
}

/// Encodes the values of fields. journald knows `message` by its name; the names of others get a prefix, as `NAMESPACE`
/// alone would be too general.
struct Fields<'a> {
    datagram: &'a mut Vec<u8>,
    limit: usize,
}

impl Fields<'_> {
    fn push(&mut self, field: &Field, value: String) {
        let name = match field.name() {
            "message" => "MESSAGE".to_owned(),
            name => format!(
                "SHIM_{}",
                name.to_ascii_uppercase().replace(|c: char| !c.is_ascii_alphanumeric(), "_")
            ),
        };
        push_field(self.datagram, &name, text::shortened(value, self.limit).as_bytes());
    }
}

impl Visit for Fields<'_> {
    fn record_str(&mut self, field: &Field, value: &str) {
        self.push(field, value.to_owned());
    }

    fn record_debug(&mut self, field: &Field, value: &dyn fmt::Debug) {
        let mut text = String::new();
        // What was written before an error counts.
        let _ = write!(text, "{value:?}");
        self.push(field, text);
    }
}

/// syslog's number of a level. A message of level info is worth a notice.
fn priority(level: Level) -> &'static str {
    match level {
        Level::ERROR => "3",
        Level::WARN => "4",
        Level::INFO => "5",
        Level::DEBUG => "6",
        Level::TRACE => "7",
    }
}

fn push_metadata(datagram: &mut Vec<u8>, prefix: &str, metadata: &Metadata<'_>) {
    let mut push =
        |name: &str, value: &str| push_field(datagram, &format!("{prefix}{name}"), value.as_bytes());
    push("TARGET", metadata.target());
    if let (Some(file), Some(line)) = (metadata.file(), metadata.line()) {
        push("CODE_FILE", file);
        push("CODE_LINE", &line.to_string());
    }
}

/// The message that some messages were dropped.
fn missing_messages(identifier: &[u8], count: u64) -> Vec<u8> {
    let text = format!("{count} messages are missing here: the journal could not be reached");
    let mut datagram = identifier.to_vec();
    push_field(&mut datagram, "PRIORITY", priority(Level::WARN).as_bytes());
    push_field(&mut datagram, "MESSAGE_ID", MESSAGE_DROPPED.as_bytes());
    push_field(&mut datagram, "N_DROPPED", count.to_string().as_bytes());
    push_field(&mut datagram, "MESSAGE", text.as_bytes());
    datagram
}

/// Adds a field with any value to a message for journald.
pub fn push_field(datagram: &mut Vec<u8>, name: &str, value: &[u8]) {
    datagram.extend_from_slice(name.as_bytes());
    datagram.push(b'\n');
    datagram.extend_from_slice(&(value.len() as u64).to_le_bytes());
    datagram.extend_from_slice(value);
    datagram.push(b'\n');
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::collections::BTreeMap;
    use std::os::unix::net::UnixDatagram;
    use tracing_subscriber::layer::SubscriberExt;

    /// The fields of the only message that journald gets. Each field comes once.
    fn logged(log: impl FnOnce()) -> BTreeMap<String, String> {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("socket");
        let journald = UnixDatagram::bind(&path).unwrap();
        let journal = Journal::new(&path, "shim").unwrap();
        tracing::subscriber::with_default(tracing_subscriber::registry().with(journal), log);
        let mut message = vec![0; 1 << 20];
        journald.set_nonblocking(true).unwrap();
        let length = journald.recv(&mut message).unwrap();
        let (mut rest, mut fields) = (&message[..length], BTreeMap::new());
        while let Some(end) = memchr::memchr(b'\n', rest) {
            let (name, after) = (String::from_utf8(rest[..end].to_vec()).unwrap(), &rest[end + 1..]);
            let length = u64::from_le_bytes(after[..8].try_into().unwrap()) as usize;
            let value = String::from_utf8(after[8..8 + length].to_vec()).unwrap();
            rest = after[8 + length..].strip_prefix(b"\n").unwrap();
            assert!(fields.insert(name.clone(), value).is_none(), "{name} comes twice");
        }
        assert!(rest.is_empty());
        fields
    }

    #[test]
    fn an_event_has_its_own_fields_and_those_of_its_spans() {
        let fields = logged(|| {
            let outer = tracing::info_span!("call", verb = "create", exec_id = tracing::field::Empty);
            outer.record("exec_id", "e1");
            let _outer = outer.enter();
            let error = io::Error::other("line\nPRIORITY=0");
            tracing::warn!(%error, task = ?("a", 1), uid = 7, "create failed: {error}");
        });
        let line = fields["CODE_LINE"].parse::<u32>().unwrap();
        assert!(fields["SPAN_CODE_LINE"].parse::<u32>().unwrap() < line);
        let [file, target] = [file!(), module_path!()];
        let expected = [
            ("CODE_FILE", file),
            ("CODE_LINE", &line.to_string()),
            ("MESSAGE", "create failed: line\nPRIORITY=0"),
            ("PRIORITY", "4"),
            ("SHIM_ERROR", "line\nPRIORITY=0"),
            ("SHIM_EXEC_ID", "e1"),
            ("SHIM_TASK", "(\"a\", 1)"),
            ("SHIM_UID", "7"),
            ("SHIM_VERB", "create"),
            ("SPAN_CODE_FILE", file),
            ("SPAN_CODE_LINE", &fields["SPAN_CODE_LINE"]),
            ("SPAN_NAME", "call"),
            ("SPAN_TARGET", target),
            ("SYSLOG_IDENTIFIER", "shim"),
            ("TARGET", target),
        ];
        let found: Vec<_> = fields.iter().map(|(name, value)| (name.as_str(), value.as_str())).collect();
        assert_eq!(found, expected);
    }

    #[test]
    fn each_level_has_a_priority() {
        let priorities = [
            logged(|| tracing::error!("x")),
            logged(|| tracing::warn!("x")),
            logged(|| tracing::info!("x")),
            logged(|| tracing::debug!("x")),
            logged(|| tracing::trace!("x")),
        ];
        assert_eq!(priorities.map(|fields| fields["PRIORITY"].clone()), ["3", "4", "5", "6", "7"]);
    }

    #[test]
    fn long_values_keep_their_beginning_and_their_end() {
        let long = format!("begin{}end", "x".repeat(1 << 20));
        let is_shortened = |value: &str, limit: usize| {
            let length = (limit - 10..limit + 10).contains(&value.len());
            length && value.starts_with("begin") && value.ends_with("end")
        };
        let fields = logged(|| tracing::info!(error = long, "{long}"));
        assert!(is_shortened(&fields["MESSAGE"], LONGEST_VALUE));
        assert!(is_shortened(&fields["SHIM_ERROR"], LONGEST_VALUE));
        // More than a datagram can have.
        let fields =
            logged(|| tracing::info!(a = long, b = long, c = long, d = long, e = long, f = long, "{long}"));
        assert!(is_shortened(&fields["MESSAGE"], SHORT_VALUE));
        assert_eq!(fields["SHIM_F"], fields["MESSAGE"]);
    }
}
