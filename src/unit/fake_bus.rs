//! A bus for tests. It answers every call: with an error or a content that the test has chosen, or with a reply without content.

use std::collections::VecDeque;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::UnixStream;
use zbus::Connection;

use super::socket;

/// Nobody answers.
pub const NO_REPLY: &str = "org.freedesktop.DBus.Error.NoReply";
/// The call is not allowed.
pub const DENIED: &str = "org.freedesktop.DBus.Error.AccessDenied";

/// The longest message of a test, in bytes.
const MAX_MESSAGE: usize = 4096;

/// The other side of a connection.
pub struct FakeBus(Mutex<State>);

struct State {
    /// The methods whose next call fails, and the names of their errors.
    errors: VecDeque<(&'static str, &'static str)>,
    /// The contents of the next replies to a method.
    answers: VecDeque<(&'static str, Content)>,
    /// The methods that were called, in this order.
    calls: Vec<String>,
}

/// The content of a reply: its signature, and its bytes.
type Content = (String, Vec<u8>);

/// A message as the D-Bus specification describes it.
struct Call {
    serial: u32,
    member: String,
}

impl FakeBus {
    /// A bus with one client, whose calls fail as stated: each entry is for one call of a method.
    pub async fn start<const N: usize>(errors: [(&'static str, &'static str); N]) -> (Arc<Self>, Connection) {
        let (client, server) = UnixStream::pair().unwrap();
        let bus = Arc::new(Self(Mutex::new(State {
            errors: errors.into(),
            answers: VecDeque::new(),
            calls: Vec::new(),
        })));
        tokio::spawn(bus.clone().serve(server));
        (bus, socket::client(client).build().await.unwrap())
    }

    /// Determines the content of a reply to a method: the first one that was not given yet. The last one is given again and
    /// again.
    pub fn answer<B: serde::Serialize + zbus::Type>(&self, member: &'static str, content: &B) {
        let message = zbus::Message::method_call("/", "Answer").build(content).unwrap();
        let body = message.body();
        self.state().answers.push_back((member, (body.signature().to_string(), body.data().to_vec())));
    }

    /// How often a method was called.
    pub fn calls(&self, member: &str) -> usize {
        self.state().calls.iter().filter(|called| *called == member).count()
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    async fn serve(self: Arc<Self>, mut client: UnixStream) {
        client.write_all(format!("OK {}\r\n", "0".repeat(32)).as_bytes()).await.unwrap();
        let mut handshake = Vec::new();
        while !handshake.ends_with(b"BEGIN\r\n") {
            handshake.push(client.read_u8().await.unwrap());
        }
        while let Some(call) = Call::read(&mut client).await {
            let reply = {
                let mut state = self.state();
                let at = state.errors.iter().position(|(member, _)| *member == call.member);
                state.calls.push(call.member.clone());
                let error = at.and_then(|at| state.errors.remove(at)).map(|(_, error)| error);
                call.reply(error, state.content(&call.member))
            };
            if client.write_all(&reply).await.is_err() {
                return;
            }
        }
    }
}

impl State {
    fn content(&mut self, member: &str) -> Option<Content> {
        let mut all = (0..self.answers.len()).filter(|at| self.answers[*at].0 == member);
        match (all.next(), all.next()) {
            (Some(last), None) => Some(self.answers[last].1.clone()),
            (Some(next), Some(_)) => self.answers.remove(next).map(|(_, content)| content),
            (None, _) => None,
        }
    }
}

impl Call {
    /// The next call. `None` once the client has gone.
    async fn read(client: &mut UnixStream) -> Option<Self> {
        let mut message = vec![0; 16];
        client.read_exact(&mut message).await.ok()?;
        let [body, serial, fields] = [4, 8, 12].map(|at| number(&message, at));
        let length = 16 + (fields as usize).next_multiple_of(8) + body as usize;
        assert!(length <= MAX_MESSAGE, "{length}");
        message.resize(length, 0);
        client.read_exact(&mut message[16..]).await.ok()?;
        let (mut at, mut member) = (16, String::new());
        while at < 16 + fields as usize {
            let (code, kind) = (message[at], message[at + 2]);
            at += 4;
            let text = at + 4..at + 4 + number(&message, at) as usize;
            at = match kind {
                b'g' => at + 2 + usize::from(message[at]),
                b's' | b'o' => text.end + 1,
                _ => at + 4,
            };
            const MEMBER: u8 = 3;
            if code == MEMBER {
                member = String::from_utf8(message[text].to_vec()).unwrap();
            }
            at = at.next_multiple_of(8);
        }
        Some(Self { serial, member })
    }

    /// The answer to this call: a method return, or an error.
    fn reply(&self, error: Option<&str>, content: Option<Content>) -> Vec<u8> {
        let mut fields = vec![5, 1, b'u', 0];
        fields.extend(self.serial.to_le_bytes());
        if let Some(name) = error {
            fields.extend([4, 1, b's', 0]);
            fields.extend(text(name));
        }
        let content = content.filter(|_| error.is_none());
        let hello = || (self.member == "Hello").then(|| ("s".to_owned(), text(":1.1")));
        let (signature, body) = content.or_else(hello).unwrap_or_default();
        if !signature.is_empty() {
            fields.resize(fields.len().next_multiple_of(8), 0);
            fields.extend([8, 1, b'g', 0, signature.len() as u8]);
            fields.extend(signature.as_bytes());
            fields.push(0);
        }
        let mut message = vec![b'l', if error.is_some() { 3 } else { 2 }, 1, 1];
        for number in [body.len() as u32, 1, fields.len() as u32] {
            message.extend(number.to_le_bytes());
        }
        message.extend(fields);
        message.resize(message.len().next_multiple_of(8), 0);
        message.extend(body);
        message
    }
}

fn number(message: &[u8], at: usize) -> u32 {
    let bytes = message.get(at..at + 4).unwrap_or_default();
    bytes.try_into().map_or(0, u32::from_le_bytes)
}

fn text(text: &str) -> Vec<u8> {
    let mut bytes = (text.len() as u32).to_le_bytes().to_vec();
    bytes.extend(text.as_bytes());
    bytes.push(0);
    bytes
}
