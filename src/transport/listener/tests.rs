use std::collections::BTreeMap;
use std::io::Write;
use std::path::Path;
use std::sync::{Mutex, PoisonError};

use async_trait::async_trait;
use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use ttrpc::proto::MESSAGE_TYPE_REQUEST;

use super::*;
use crate::transport::durable::{Answer, Dispatch};
use crate::transport::frame::{Frame, frame};

/// Answers every frame with itself.
struct Echo;

impl Dispatch for Echo {
    fn answer(&self, frame: &Frame) -> Option<Answer> {
        Some(Box::pin(std::future::ready(frame.clone())))
    }
}

async fn serve(connection: Durable) {
    Box::new(connection).serve(Arc::new(Echo)).await;
}

/// Descriptors that a test keeps, as systemd does.
#[derive(Default)]
struct Store(Mutex<BTreeMap<String, Vec<OwnedFd>>>);

impl Store {
    fn names(&self) -> Vec<String> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).keys().cloned().collect()
    }
}

#[async_trait]
impl ConnectionStore for Store {
    async fn keep(&self, name: &str, fds: &[BorrowedFd<'_>]) -> io::Result<()> {
        let fds = fds.iter().map(|fd| fd.try_clone_to_owned()).collect::<io::Result<_>>()?;
        self.0.lock().unwrap_or_else(PoisonError::into_inner).insert(name.to_owned(), fds);
        Ok(())
    }

    fn forget(&self, name: &str) {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).remove(name);
    }
}

fn connections(store: &Arc<Store>, kept: &mut Vec<(String, OwnedFd)>) -> Arc<Connections> {
    let (connections, adopted) = Connections::adopt(store.clone(), kept, &Crashes::default()).unwrap();
    assert!(adopted.is_empty());
    connections
}

fn listen(dir: &Path) -> (UnixListener, std::path::PathBuf) {
    let path = dir.join("socket");
    (UnixListener::bind(&path).unwrap(), path)
}

fn is_readable(fd: BorrowedFd<'_>) -> bool {
    poll(&mut [PollFd::new(fd, PollFlags::POLLIN)], PollTimeout::ZERO) == Ok(1)
}

#[tokio::test]
async fn a_connection_is_kept_until_its_client_leaves() {
    let (dir, store) = (tempfile::tempdir().unwrap(), Arc::<Store>::default());
    let connections = connections(&store, &mut Vec::new());
    let (listener, path) = listen(dir.path());
    let mut accepted = connections.clone().accept(listener).unwrap();
    let mut client = UnixStream::connect(&path).unwrap();
    let connection = accepted.next().await.unwrap().unwrap();
    assert_eq!((connections.count(), store.names()), (1, vec!["c0".to_owned()]));
    assert!(!is_readable(connections.wake_fd()));
    client.write_all(b"x").unwrap();
    assert!(is_readable(connections.wake_fd()), "whoever wakes the next daemon sees the request");
    drop(client);
    serve(connection).await;
    assert_eq!((connections.count(), store.names()), (0, Vec::new()));
}

#[tokio::test]
async fn the_connection_of_a_client_that_only_probes_the_socket_is_not_kept() {
    let (dir, store) = (tempfile::tempdir().unwrap(), Arc::<Store>::default());
    let connections = connections(&store, &mut Vec::new());
    let (listener, path) = listen(dir.path());
    drop(UnixStream::connect(&path).unwrap());
    let _client = UnixStream::connect(&path).unwrap();
    let mut accepted = connections.clone().accept(listener).unwrap();
    let _connection = accepted.next().await.unwrap().unwrap();
    assert_eq!((connections.count(), store.names()), (1, vec!["c0".to_owned()]));
}

#[tokio::test]
async fn an_incomplete_connection_is_removed_and_its_number_is_not_used_again() {
    let (dir, store) = (tempfile::tempdir().unwrap(), Arc::<Store>::default());
    let (half, foreign) = (UnixStream::pair().unwrap(), UnixStream::pair().unwrap());
    let other = UnixStream::pair().unwrap();
    let mut kept = vec![
        ("c3".to_owned(), OwnedFd::from(half.0)),
        ("c7".to_owned(), foreign.0.into()),
        ("c7".to_owned(), Journal::new(&Budget::default()).unwrap().fd().try_clone_to_owned().unwrap()),
        ("o1".to_owned(), other.0.into()),
    ];
    for name in ["c3", "c7", "o1"] {
        store.keep(name, &[]).await.unwrap();
    }
    let connections = connections(&store, &mut kept);
    let names: Vec<_> = kept.iter().map(|(name, _)| name.as_str()).collect();
    assert_eq!((names, store.names()), (vec!["o1"], vec!["o1".to_owned()]));
    let (listener, path) = listen(dir.path());
    let _client = UnixStream::connect(&path).unwrap();
    let mut accepted = connections.clone().accept(listener).unwrap();
    let _connection = accepted.next().await.unwrap().unwrap();
    assert_eq!(store.names(), ["c8", "o1"]);
}

#[test]
fn only_a_journal_of_a_newer_version_is_left_to_that_version() {
    let adopt = |at: u64| {
        let journal = Journal::new(&Budget::default()).unwrap().fd().try_clone_to_owned().unwrap();
        let file = std::fs::File::from(journal.try_clone().unwrap());
        std::os::unix::fs::FileExt::write_all_at(&file, &9_u32.to_le_bytes(), at).unwrap();
        failed(Journal::adopt(journal, &Budget::default()).map(drop).unwrap_err())
    };
    assert!(!is_of_newer(&adopt(0)));
    assert!(is_of_newer(&adopt(4)));
}

#[test]
fn a_listening_socket_of_somebody_else_is_refused() {
    let dir = tempfile::tempdir().unwrap();
    let refused = from_systemd(listen(dir.path()).0.into()).map(drop).unwrap_err();
    assert_eq!(refused.kind(), io::ErrorKind::AddrNotAvailable);
}

#[tokio::test]
async fn a_connection_that_an_earlier_daemon_had_not_kept_is_served_from_its_first_byte() {
    let store = Arc::<Store>::default();
    let connections = connections(&store, &mut Vec::new());
    let (mut client, rescued) = UnixStream::pair().unwrap();
    client.write_all(b"x").unwrap();
    let (_, connection) = connections.rescue(Socket::Any, rescued).await.unwrap().unwrap();
    assert_eq!((connections.count(), store.names()), (1, vec!["c0".to_owned()]));
    assert!(is_readable(connections.wake_fd()));
    drop(connection);
    assert_eq!(store.names(), ["c0"], "it is kept for the next daemon");
    let (client, over) = UnixStream::pair().unwrap();
    drop(client);
    assert!(connections.rescue(Socket::Any, over).await.unwrap().is_none());
    assert_eq!(store.names(), ["c0"]);
}

#[tokio::test]
async fn a_connection_is_refused_when_it_can_not_be_kept() {
    struct Full;
    #[async_trait]
    impl ConnectionStore for Full {
        async fn keep(&self, _: &str, _: &[BorrowedFd<'_>]) -> io::Result<()> {
            Err(io::Error::other("no room"))
        }
        fn forget(&self, _: &str) {}
    }
    let dir = tempfile::tempdir().unwrap();
    let (connections, _) = Connections::adopt(Arc::new(Full), &mut Vec::new(), &Crashes::default()).unwrap();
    let (listener, path) = listen(dir.path());
    let mut client = UnixStream::connect(&path).unwrap();
    let mut accepted = connections.clone().accept(listener).unwrap();
    let refused = accepted.next().await.unwrap().map(drop).unwrap_err();
    assert_eq!(refused.to_string(), "no room");
    assert_eq!(io::Read::read(&mut client, &mut [0]).unwrap(), 0, "the client sees that it is closed");
    assert_eq!(connections.count(), 0);
}

#[tokio::test]
async fn a_broken_connection_is_forgotten_and_its_last_responses_with_it() {
    let (dir, store) = (tempfile::tempdir().unwrap(), Arc::<Store>::default());
    let connections = connections(&store, &mut Vec::new());
    let (listener, path) = listen(dir.path());
    let mut accepted = connections.clone().accept(listener).unwrap();
    let mut client = UnixStream::connect(&path).unwrap();
    client.write_all(&frame(1, MESSAGE_TYPE_REQUEST, b"seven")).unwrap();
    let connection = accepted.next().await.unwrap().unwrap();
    drop(client);
    serve(connection).await;
    assert_eq!(store.names(), Vec::<String>::new());
}

/// An epoll instance that can't watch any more descriptors: it is another file.
fn exhausted() -> Epoll {
    Epoll(std::fs::File::open("/dev/null").unwrap().into())
}

#[tokio::test]
async fn a_connection_that_can_not_be_watched_is_closed_and_not_kept() {
    let (dir, store) = (tempfile::tempdir().unwrap(), Arc::<Store>::default());
    let (next, count) = (AtomicU64::new(0), Count::default());
    let connections = Arc::new(Connections {
        store: store.clone(),
        next,
        wake: exhausted(),
        count,
        budget: Budget::default(),
    });
    let (listener, path) = listen(dir.path());
    let mut client = UnixStream::connect(&path).unwrap();
    let mut accepted = connections.clone().accept(listener).unwrap();
    accepted.next().await.unwrap().map(drop).unwrap_err();
    assert_eq!(store.names(), Vec::<String>::new());
    assert_eq!(io::Read::read(&mut client, &mut [0]).unwrap(), 0, "the client sees that it is closed");
    assert_eq!(connections.count(), 0);
}

#[tokio::test]
async fn a_connection_of_an_earlier_daemon_is_served_even_if_its_calls_can_start_no_daemon() {
    let store = Arc::<Store>::default();
    let (next, count) = (AtomicU64::new(0), Count::default());
    let connections =
        Connections { store: store.clone(), next, wake: exhausted(), count, budget: Budget::default() };
    let (mut client, rescued) = UnixStream::pair().unwrap();
    let (_, connection) = connections.rescue(Socket::Any, rescued).await.unwrap().unwrap();
    let connection = connection.watch_once_possible().await.unwrap();
    assert_eq!((connections.count(), store.names()), (1, vec!["c0".to_owned()]));
    let request = frame(1, MESSAGE_TYPE_REQUEST, b"seven");
    client.write_all(&request).unwrap();
    let serving = tokio::spawn(serve(connection));
    client.set_nonblocking(true).unwrap();
    let mut client = tokio::net::UnixStream::from_std(client).unwrap();
    let mut answer = vec![0; request.len()];
    tokio::io::AsyncReadExt::read_exact(&mut client, &mut answer).await.unwrap();
    assert_eq!(answer, request);
    drop(client);
    serving.await.unwrap();
    assert_eq!((connections.count(), store.names()), (0, Vec::new()));
}

#[test]
fn only_what_may_be_there_later_is_waited_for() {
    let passing = [Errno::ENOSPC, Errno::ENOMEM, Errno::EMFILE];
    assert!(passing.into_iter().all(|errno| sys::lacks_room(&errno.into())));
    assert!(!sys::lacks_room(&Errno::EPERM.into()) && !sys::lacks_room(&io::Error::other("no journal")));
}
