//! A model test of connections: random frames arrive in random pieces, and daemons that end at random moments answer them
//! in random order. The result is compared with a list: each request is served until it is answered, and answered once.

use std::collections::{BTreeMap, BTreeSet};
use std::fs::File;
use std::future::pending;
use std::io::{self, Read, Write};
use std::os::fd::{BorrowedFd, OwnedFd};
use std::os::unix::fs::MetadataExt;
use std::os::unix::net::UnixStream;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard};
use std::task::{Context, Waker};

use futures_util::FutureExt;
use futures_util::future::BoxFuture;
use protobuf::Message;
use tokio::sync::oneshot;
use ttrpc::proto::{MESSAGE_LENGTH_MAX, MESSAGE_TYPE_DATA, MESSAGE_TYPE_REQUEST};

use super::budget::{Amount, Budget};
use super::durable::{Answer, Dispatch, Unwatched};
use super::frame::{Frame, HEADER, frame};
use super::journal::Journal;
use super::weight::MOST_METADATA;
use super::{ConnectionStore, Count, StoreEntry};
use crate::suspect::{Crashes, LIMIT, Suspect};

/// Keeps nothing: the test itself holds both descriptors. Counts what the connection gives up.
#[derive(Default)]
struct Nobody {
    forgotten: AtomicUsize,
}

#[async_trait::async_trait]
impl ConnectionStore for Nobody {
    async fn keep(&self, _: &str, _: &[BorrowedFd<'_>]) -> io::Result<()> {
        Ok(())
    }

    fn forget(&self, _: &str) {
        self.forgotten.fetch_add(1, Ordering::Relaxed);
    }
}

/// Random numbers that depend only on the seed (xorshift64*).
struct Random(u64);

impl Random {
    fn below(&mut self, limit: usize) -> usize {
        self.0 ^= self.0 >> 12;
        self.0 ^= self.0 << 25;
        self.0 ^= self.0 >> 27;
        (self.0.wrapping_mul(0x2545_f491_4f6c_dd1d) >> 33) as usize % limit
    }

    fn one_in(&mut self, chances: usize) -> bool {
        self.below(chances) == 0
    }
}

fn request(payload: &[u8]) -> ttrpc::Request {
    let (service, method) = ("s".to_owned(), "Do".to_owned());
    ttrpc::Request { service, method, payload: payload.to_vec(), ..Default::default() }
}

/// Removes the whole frames from a buffer.
fn frames(buffer: &mut Vec<u8>) -> Vec<Frame> {
    let mut found = Vec::new();
    while let Some(head) = buffer.first_chunk::<HEADER>() {
        let length = HEADER + u32::from_be_bytes([head[0], head[1], head[2], head[3]]) as usize;
        if buffer.len() < length {
            break;
        }
        found.push(Frame { bytes: buffer.drain(..length).collect() });
    }
    found
}

/// Answers requests when the test says so.
#[derive(Default)]
struct Desk {
    /// It answers every third request itself, at once or a bit later.
    is_prompt: bool,
    /// The other frames that have arrived.
    arrived: Vec<Frame>,
    waiting: BTreeMap<u32, oneshot::Sender<Frame>>,
}

impl Dispatch for Mutex<Desk> {
    fn answer(&self, frame: &Frame) -> Option<Answer> {
        let (mut desk, stream) = (self.lock().unwrap(), frame.stream());
        if desk.is_prompt && stream % 3 == 0 && frame.is_request() {
            let payload = frame.request()?.payload;
            return Some(Box::pin(async move {
                for _ in 0..stream % 4 {
                    tokio::task::yield_now().await;
                }
                response(stream, &payload)
            }));
        }
        desk.arrived.push(frame.clone());
        let is_request = frame.is_request();
        let (sender, answer) = oneshot::channel();
        is_request.then(|| desk.waiting.insert(stream, sender));
        is_request.then(|| async { answer.await.unwrap() }.boxed())
    }
}

fn response(stream: u32, payload: &[u8]) -> Frame {
    let response = ttrpc::Response { payload: payload.to_vec(), ..Default::default() };
    Frame::response(stream, &response).unwrap()
}

/// The daemon's side of a connection, and what outlives the daemon.
struct Server {
    socket: OwnedFd,
    journal: OwnedFd,
    /// The task of the connection.
    task: BoxFuture<'static, ()>,
    desk: Arc<Mutex<Desk>>,
    serving: BTreeMap<u32, Vec<u8>>,
    budget: Budget,
    store: Arc<Nobody>,
}

/// A request with more metadata than is allowed.
fn complex_request() -> ttrpc::Request {
    let metadata = vec![ttrpc::proto::KeyValue::default(); MOST_METADATA + 1];
    ttrpc::Request { metadata, ..request(b"complex") }
}

impl Server {
    fn new(socket: UnixStream) -> Self {
        Self::with(socket, Budget::default(), false)
    }

    fn with(socket: UnixStream, budget: Budget, is_prompt: bool) -> Self {
        socket.set_nonblocking(true).unwrap();
        let journal = Journal::new(&budget).unwrap();
        let (socket, kept): (OwnedFd, _) = (socket.into(), journal.fd().try_clone_to_owned().unwrap());
        let mut server = Self {
            socket,
            journal: kept,
            task: pending().boxed(),
            desk: Arc::new(Mutex::new(Desk { is_prompt, ..Desk::default() })),
            serving: BTreeMap::new(),
            budget,
            store: Arc::default(),
        };
        let connection = Unwatched::new(server.socket.try_clone().unwrap(), journal, server.entry());
        server.serve(connection.unwrap());
        server
    }

    fn entry(&self) -> StoreEntry {
        StoreEntry::new(self.store.clone(), "c0".to_owned(), &Count::default())
    }

    fn serve(&mut self, connection: Unwatched) {
        self.task = Box::new(connection.watch().unwrap()).serve(self.desk.clone()).boxed();
    }

    /// Ends the daemon, and lets the next one adopt the connection.
    fn die(&mut self, crashes: &Crashes) {
        self.task = pending().boxed();
        self.serving.clear();
        let is_prompt = self.desk().is_prompt;
        self.desk = Arc::new(Mutex::new(Desk { is_prompt, ..Desk::default() }));
        let (socket, journal) = (self.socket.try_clone().unwrap(), self.journal.try_clone().unwrap());
        let adopted = Unwatched::adopt(socket, journal, crashes, &self.budget, self.entry());
        self.serve(adopted.unwrap());
    }

    fn desk(&self) -> MutexGuard<'_, Desk> {
        self.desk.lock().unwrap()
    }

    /// Lets the connection do what it can. True at its end.
    fn is_over(&mut self) -> bool {
        self.task.as_mut().poll(&mut Context::from_waker(Waker::noop())).is_ready()
    }

    /// The frames that have arrived.
    fn read(&mut self) -> Vec<Frame> {
        assert!(!self.is_over(), "the connection has ended");
        std::mem::take(&mut self.desk().arrived)
    }

    fn respond(&mut self, stream: u32) {
        let payload = self.serving.remove(&stream).unwrap();
        let waiting = self.desk().waiting.remove(&stream).unwrap();
        waiting.send(response(stream, &payload)).unwrap();
    }

    fn memory(&self) -> u64 {
        File::from(self.journal.try_clone().unwrap()).metadata().unwrap().blocks() * 512
    }
}

/// The client's side of a connection, and the list of its requests.
struct Client {
    socket: UnixStream,
    next: u32,
    unsent: Vec<u8>,
    read: Vec<u8>,
    /// The payload of each unanswered request. `None` for a request that is too long or too complex.
    asked: BTreeMap<u32, Option<Vec<u8>>>,
    /// The daemon may have no room for a request.
    may_be_refused: bool,
    /// How many requests were refused for that reason.
    refused: usize,
    data: BTreeSet<u32>,
}

impl Client {
    fn ask(&mut self, random: &mut Random) {
        let stream = self.next;
        self.next += 2;
        if random.one_in(40) {
            let rest = vec![7; MESSAGE_LENGTH_MAX + 1 + random.below(100_000)];
            self.unsent.extend(frame(stream, MESSAGE_TYPE_REQUEST, &rest));
            self.asked.insert(stream, None);
        } else if random.one_in(40) {
            let rest = complex_request().write_to_bytes().unwrap();
            self.unsent.extend(frame(stream, MESSAGE_TYPE_REQUEST, &rest));
            self.asked.insert(stream, None);
        } else if random.one_in(20) {
            self.unsent.extend(frame(stream, MESSAGE_TYPE_DATA, &vec![1; random.below(500)]));
            self.data.insert(stream);
        } else {
            let length = if random.one_in(8) { random.below(200_000) } else { random.below(300) };
            let mut payload = vec![stream as u8; length];
            // No field begins with this byte.
            payload.first_mut().into_iter().for_each(|first| *first = 7);
            let rest = request(&payload).write_to_bytes().unwrap();
            self.unsent.extend(frame(stream, MESSAGE_TYPE_REQUEST, &rest));
            self.asked.insert(stream, Some(payload));
        }
    }

    fn send(&mut self, random: &mut Random) {
        let length = self.unsent.len().min(1 + random.below(100_000));
        if let Ok(sent) = self.socket.write(&self.unsent[..length]) {
            self.unsent.drain(..sent);
        }
    }

    fn receive(&mut self) {
        let mut space = vec![0; 50_000];
        if let Ok(length) = self.socket.read(&mut space) {
            self.read.extend(&space[..length]);
        }
        for answer in frames(&mut self.read) {
            let stream = answer.stream();
            let asked = self.asked.remove(&stream);
            assert!(asked.is_some(), "{stream} is answered twice");
            let response = ttrpc::Response::parse_from_bytes(&answer.bytes[HEADER..]).unwrap();
            let is_refused = response.status().code == ttrpc::Code::RESOURCE_EXHAUSTED.into();
            match asked.flatten() {
                Some(_) if is_refused && self.may_be_refused => self.refused += 1,
                Some(payload) => {
                    assert!(response.payload == payload, "the answer to {stream} is another one")
                }
                None => assert!(is_refused, "{stream} is served"),
            }
        }
    }
}

/// Returns how many requests were refused because there was no room for them. `tight`: there is little room.
async fn lives(seed: u64, deaths: usize, tight: bool) -> usize {
    let budget = if tight { Budget::of(Amount { count: 4, weight: 100_000 }) } else { Budget::default() };
    let random = &mut Random(seed);
    let (near, far) = UnixStream::pair().unwrap();
    near.set_nonblocking(true).unwrap();
    let mut server = Server::with(far, budget, seed.is_multiple_of(2));
    let mut client = Client {
        socket: near,
        next: 1,
        unsent: Vec::new(),
        read: Vec::new(),
        asked: BTreeMap::new(),
        data: BTreeSet::new(),
        may_be_refused: tight,
        refused: 0,
    };
    let mut steps = 0;
    while client.next < 400 || !client.asked.is_empty() {
        steps += 1;
        assert!(steps < 400_000, "seed {seed}: {} requests are never answered", client.asked.len());
        match random.below(if deaths > 0 { 5 } else { 4 }) {
            0 if client.next < 400 && client.unsent.len() < 1 << 20 => client.ask(random),
            0 | 1 => client.send(random),
            2 => client.receive(),
            3 => {
                for found in server.read() {
                    let stream = found.stream();
                    if !found.is_request() {
                        assert!(client.data.contains(&stream), "seed {seed}: {stream} was never sent");
                        continue;
                    }
                    let payload = found.request().unwrap().payload;
                    let asked = client.asked.get(&stream);
                    // A response may be on its way to the client. Its request is not served again.
                    assert!(asked == Some(&Some(payload.clone())), "seed {seed}: {stream} is served again");
                    server.serving.insert(stream, payload);
                }
                if let Some(stream) = server.serving.keys().nth(random.below(4)).copied() {
                    server.respond(stream);
                }
            }
            _ if random.one_in(200 / deaths) => server.die(&Crashes::default()),
            _ => {}
        }
        // Lets tokio's driver poll the sockets.
        tokio::task::yield_now().await;
        if steps % 100 == 0 {
            assert!(server.memory() < 12 << 20, "seed {seed}: {} bytes are kept", server.memory());
        }
        if client.next >= 400 && random.one_in(3) {
            // Answers all remaining requests.
            if let Some(stream) = server.serving.keys().next().copied() {
                server.respond(stream);
            }
        }
    }
    assert!(server.memory() < 1 << 20, "seed {seed}: {} bytes are kept for nothing", server.memory());
    client.refused
}

#[tokio::test]
async fn every_request_is_answered_once_wherever_the_daemon_ends() {
    for seed in 1..=6 {
        for deaths in [0, 1, 10] {
            lives(seed, deaths, false).await;
        }
    }
}

#[tokio::test]
async fn every_request_is_answered_once_with_little_room_for_requests() {
    let mut refused = 0;
    for seed in 1..=6 {
        for deaths in [0, 1, 10] {
            refused += lives(seed, deaths, true).await;
        }
    }
    assert!(refused > 100, "{refused}");
}

#[tokio::test]
async fn a_request_that_crashes_two_daemons_is_answered_by_the_third_and_others_are_served() {
    let (mut near, far) = UnixStream::pair().unwrap();
    let mut server = Server::new(far);
    for (stream, payload) in [(1, b"poison".as_slice()), (3, b"innocent")] {
        let rest = request(payload).write_to_bytes().unwrap();
        near.write_all(&frame(stream, MESSAGE_TYPE_REQUEST, &rest)).unwrap();
    }
    let scratch = tempfile::tempdir().unwrap();
    let path = scratch.path().join("crashes");
    let poison = Suspect::request(1, "s", "Do", b"poison");
    for life in 0..=LIMIT {
        let mut streams = Vec::new();
        while streams.last() != Some(&3) {
            let found = server.read();
            assert!(found.iter().all(|frame| frame.is_replayed() == (life > 0)));
            streams.extend(found.iter().map(Frame::stream));
            tokio::task::yield_now().await;
        }
        let expected: &[u32] = if life < LIMIT { &[1, 3] } else { &[3] };
        assert_eq!(streams, expected, "in life {life}");
        if life < LIMIT {
            Crashes::note_for_tests(&path, poison);
            server.die(&Crashes::read(&path).unwrap());
        }
    }
    let answer = answer(&mut server, &mut near).await;
    assert_eq!(answer.stream(), 1);
    assert!(
        answer.reason().contains("crashed or blocked the runtime's daemon 2 times"),
        "{}",
        answer.reason()
    );
}

/// Every refusal is some five times as long as the request.
#[tokio::test]
async fn a_client_that_reads_no_answer_is_not_read_from_once_many_wait_for_it() {
    const SENT: u32 = 60_000;
    let (mut near, far) = UnixStream::pair().unwrap();
    near.set_nonblocking(true).unwrap();
    let mut server = Server::new(far);
    let mut unsent: Vec<u8> =
        (0..SENT).flat_map(|number| frame(2 * number + 1, MESSAGE_TYPE_REQUEST, b"")).collect();
    let (mut served, mut is_read) = (0, true);
    while is_read {
        is_read = false;
        for _ in 0..50 {
            if let Ok(sent) = near.write(&unsent) {
                unsent.drain(..sent);
                is_read |= sent > 0;
            }
            let found = server.read().len();
            (served, is_read) = (served + found, is_read || found > 0);
            tokio::task::yield_now().await;
        }
    }
    assert!(!unsent.is_empty() && server.memory() < 3 << 20, "{} bytes are kept", server.memory());
    let (mut received, mut buffer, mut space) = (0, Vec::new(), vec![0; 1 << 20]);
    while received + served < SENT as usize {
        if let Ok(sent) = near.write(&unsent) {
            unsent.drain(..sent);
        }
        if let Ok(length) = near.read(&mut space) {
            buffer.extend(&space[..length]);
            received += frames(&mut buffer).len();
        }
        served += server.read().len();
        tokio::task::yield_now().await;
    }
    assert_eq!((unsent.len(), received + served), (0, SENT as usize));
}

#[tokio::test]
async fn nothing_is_read_from_a_client_that_does_not_read_its_answers() {
    const ASKED: u32 = 20;
    let (mut near, far) = UnixStream::pair().unwrap();
    let mut server = Server::new(far);
    let rest = request(b"x").write_to_bytes().unwrap();
    for number in 0..ASKED {
        near.write_all(&frame(2 * number + 1, MESSAGE_TYPE_REQUEST, &rest)).unwrap();
    }
    while server.serving.len() < ASKED as usize {
        let found = server.read();
        server.serving.extend(found.iter().map(|frame| (frame.stream(), vec![7; 1 << 20])));
        tokio::task::yield_now().await;
    }
    for number in 0..ASKED {
        server.respond(2 * number + 1);
    }
    let stream = 101;
    near.write_all(&frame(stream, MESSAGE_TYPE_REQUEST, &rest)).unwrap();
    for _ in 0..10 {
        assert!(server.read().is_empty());
        tokio::task::yield_now().await;
    }
    near.set_nonblocking(true).unwrap();
    let (mut found, mut space) = (Vec::new(), vec![0; 1 << 20]);
    while found.is_empty() {
        let _ = near.read(&mut space);
        found = server.read();
        tokio::task::yield_now().await;
    }
    assert_eq!(found[0].stream(), stream);
}

#[tokio::test]
async fn a_connection_is_kept_until_its_client_closes_it() {
    let (mut near, far) = UnixStream::pair().unwrap();
    let mut server = Server::new(far);
    server.die(&Crashes::default());
    near.write_all(&frame(1, MESSAGE_TYPE_REQUEST, b"")[..5]).unwrap();
    for _ in 0..3 {
        // Lets tokio's driver poll the socket.
        tokio::task::yield_now().await;
        assert!(server.read().is_empty(), "a part of a request is passed on");
    }
    server.die(&Crashes::default());
    assert_eq!(server.store.forgotten.load(Ordering::Relaxed), 0);
    drop(near);
    while !server.is_over() {
        tokio::task::yield_now().await;
    }
    assert_eq!(server.store.forgotten.load(Ordering::Relaxed), 1);
}

/// The next answer that a client gets.
async fn answer(server: &mut Server, near: &mut UnixStream) -> Frame {
    near.set_nonblocking(true).unwrap();
    let mut space = [0; 4096];
    loop {
        assert!(server.read().is_empty(), "the desk has another request");
        match near.read(&mut space) {
            Ok(length) => return frames(&mut space[..length].to_vec()).remove(0),
            Err(error) => assert_eq!(error.kind(), io::ErrorKind::WouldBlock),
        }
        tokio::task::yield_now().await;
    }
}

#[tokio::test]
async fn answers_are_sent_whether_the_daemon_that_gives_them_has_read_the_request_or_an_earlier_one() {
    let (mut near, far) = UnixStream::pair().unwrap();
    let mut server = Server::new(far);
    let rest = request(b"x").write_to_bytes().unwrap();
    near.write_all(&frame(9, MESSAGE_TYPE_REQUEST, &rest)).unwrap();
    while server.read().is_empty() {
        tokio::task::yield_now().await;
    }
    server.desk().is_prompt = true;
    server.die(&Crashes::default());
    assert_eq!(answer(&mut server, &mut near).await.stream(), 9);
    for stream in [3, 15, 21] {
        near.write_all(&frame(stream, MESSAGE_TYPE_REQUEST, &rest)).unwrap();
        assert_eq!(answer(&mut server, &mut near).await.stream(), stream);
    }
}
