use std::fs;
use std::io::{Read, Write};
use std::os::fd::{AsRawFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::time::Duration;

use nix::pty::openpty;
use tempfile::TempDir;
use tokio::sync::watch;

use super::*;
use crate::id::{ExecId, Namespace, TaskId, TaskKey, UnitName};
use crate::launch::pipes;
use crate::stdio::journal_policy::JournalPolicy;
use crate::sys::interrupt::Interrupt;
use crate::task::TaskMetadata;
use crate::task::wiring::{Copied, JournalCopy, Logger, Output, Sink};
use crate::unit::fd_store::FdStore;
use crate::unit::fd_store::testing::Systemd;

const NUMBER: u64 = 5;

/// The directories of a process and of its client.
struct Scratch {
    dir: TempDir,
}

impl Scratch {
    fn new() -> Self {
        Self { dir: tempfile::tempdir().unwrap() }
    }

    fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    /// Makes a FIFO of the client's.
    fn fifo(&self, name: &str) -> PathBuf {
        let path = self.path(name);
        fifo::make(&path).unwrap();
        path
    }

    fn plan(&self, exec: Option<&str>, wiring: Wiring) -> Plan {
        let task = TaskKey::usual(Namespace::new("n").unwrap(), TaskId::new("web").unwrap());
        let unit = |name| UnitName::new(name).unwrap();
        Plan {
            key: ProcessKey { task, exec: exec.map(|id| ExecId::new(id).unwrap()) },
            dir: self.dir.path().to_owned(),
            console: self.path("console"),
            wiring: Wiring { store_number: NUMBER, ..wiring },
            logger: None,
            container: unit("web.service"),
            slice: unit("web.slice"),
            metadata: TaskMetadata { description: "web".to_owned(), fields: Vec::new() },
            policy: Arc::new(JournalPolicy::default()),
            interrupt: Interrupt::default(),
        }
    }
}

fn reopen(plan: &Plan, fds: &StreamFds, mode: ReopenMode) -> Result<OpenStreams, Error> {
    plan.reopen(fds, &fds.claim_streams(plan.wiring.store_number), mode)
}

fn store(fds: Vec<(String, OwnedFd)>) -> Arc<StreamFds> {
    let store = Arc::new(FdStore::adopt(Vec::new()).unwrap().0);
    Arc::new(StreamFds::new(store, fds))
}

fn copied(client: Sink) -> Output {
    Output::Copied(Copied { client: Some(client), ..Copied::default() })
}

fn only_copy(opened: &OpenStreams) -> &open::Copy {
    assert_eq!(opened.copies.len(), 1);
    &opened.copies[0]
}

fn with_journal(client: Option<Sink>, journal: JournalCopy) -> Wiring {
    Wiring { stdout: Output::Copied(Copied { client, journal }), ..Wiring::default() }
}

/// A process that ends when the test asks for it.
struct Process(watch::Sender<bool>);

impl Process {
    fn new() -> Self {
        Self(watch::Sender::new(false))
    }

    fn end(&self) {
        self.0.send_replace(true);
    }

    fn ended(&self) -> impl Fn() -> std::pin::Pin<Box<dyn Future<Output = ()> + Send>> + use<> {
        let receiver = self.0.subscribe();
        move || {
            let mut receiver = receiver.clone();
            Box::pin(async move {
                let _ = receiver.wait_for(|ended| *ended).await;
            })
        }
    }
}

fn start(plan: &Plan, opened: OpenStreams, fds: &Arc<StreamFds>, process: &Process) -> Session {
    let mut session = Session::start(&plan.key, opened, &plan.wiring, fds, process.ended()).unwrap();
    session.start_input(&plan.key.task);
    session
}

/// Everything up to the end of a file, away from the async runtime.
async fn all_of(mut file: fs::File) -> String {
    let read = tokio::task::spawn_blocking(move || {
        let mut text = String::new();
        file.read_to_string(&mut text).map(|_| text)
    });
    tokio::time::timeout(Duration::from_secs(20), read).await.unwrap().unwrap().unwrap()
}

/// A client's end of a FIFO, which blocks.
fn reader(path: &Path) -> fs::File {
    let file = fifo::open_reader(path).unwrap();
    nix::fcntl::fcntl(&file, nix::fcntl::FcntlArg::F_SETFL(nix::fcntl::OFlag::empty())).unwrap();
    file
}

#[tokio::test]
async fn a_dropped_session_ends_its_pumps() {
    let session = Session::default();
    let stop = session.pumps.stop();
    drop(session);
    assert!(stop.now.is_cancelled());
}

#[tokio::test]
async fn the_client_gets_all_output_and_its_end() {
    let (scratch, process, fds) = (Scratch::new(), Process::new(), store(Vec::new()));
    let client = scratch.fifo("client");
    let plan = scratch.plan(None, Wiring { stdout: copied(Sink::Fifo(client.clone())), ..Wiring::default() });
    assert!(!plan.has_log_files());
    let output = reader(&client);
    let opened = plan.open(&fds, LogFiles::new()).unwrap();
    let mut writer = fs::OpenOptions::new().write(true).open(plan.pipe(pipes::STDOUT)).unwrap();
    let mut session = start(&plan, opened, &fds, &process);
    writer.write_all(b"hello").unwrap();
    drop(writer);
    process.end();
    assert_eq!(all_of(output).await, "hello");
    assert!(session.take_pumps().drain(Duration::ZERO).await);
    assert!(session.is_silent());
}

#[tokio::test]
async fn the_next_daemon_delivers_what_the_last_one_left_in_a_pipe() {
    let (scratch, process) = (Scratch::new(), Process::new());
    let client = scratch.fifo("client");
    let output = reader(&client);
    let to_client = fifo::open_both_nonblocking(&client).unwrap();
    let (from, to) = nix::unistd::pipe2(nix::fcntl::OFlag::O_NONBLOCK).unwrap();
    let mut to: fs::File = to.into();
    to.write_all(b"left").unwrap();
    drop(to);
    let name = format!("o{NUMBER}");
    let fds = store(vec![
        (name.clone(), from),
        (name, to_client.into()),
        ("?".to_owned(), output.try_clone().unwrap().into()),
    ]);
    assert!(fds.has(NUMBER) && !fds.has(NUMBER + 1));
    let plan = scratch.plan(None, Wiring { stdout: copied(Sink::Fifo(client)), ..Wiring::default() });
    process.end();
    let opened = reopen(&plan, &fds, ReopenMode::Ended).unwrap();
    assert!(!fds.has(NUMBER));
    let mut session = start(&plan, opened, &fds, &process);
    assert!(session.take_pumps().drain(Duration::ZERO).await);
    drop(session);
    assert_eq!(all_of(output).await, "left");
}

#[tokio::test]
async fn no_stream_is_reopened_for_an_ended_process_that_left_no_output() {
    let (scratch, fds) = (Scratch::new(), store(Vec::new()));
    let client = scratch.path("gone");
    let wiring = Wiring {
        stdin: Input::Fifo(client.clone()),
        stdout: copied(Sink::Fifo(client)),
        ..Wiring::default()
    };
    let opened = reopen(&scratch.plan(None, wiring), &fds, ReopenMode::Ended).unwrap();
    assert!(opened.copies.is_empty() && opened.stdin.is_none());
}

#[tokio::test]
async fn input_stays_open_until_it_is_closed() {
    let (scratch, process, fds) = (Scratch::new(), Process::new(), store(Vec::new()));
    let client = scratch.fifo("stdin");
    let plan =
        scratch.plan(Some("probe"), Wiring { stdin: Input::Fifo(client.clone()), ..Wiring::default() });
    let opened = plan.open(&fds, LogFiles::new()).unwrap();
    let again = opened.client_input().unwrap();
    let stdin = reader(&client);
    let mut session = start(&plan, opened, &fds, &process);
    // A client that goes away ends nothing.
    fs::OpenOptions::new().write(true).open(&client).unwrap().write_all(b"in").unwrap();
    assert!(session.close_stdin());
    assert!(!session.close_stdin());
    drop(again);
    assert_eq!(all_of(stdin).await, "in");
}

#[tokio::test(flavor = "multi_thread")]
async fn input_that_has_ended_can_be_opened_again_for_as_long_as_the_process_lives() {
    let (scratch, process, fds) = (Scratch::new(), Process::new(), store(Vec::new()));
    let client = scratch.fifo("stdin");
    let wiring = Wiring { stdin: Input::Fifo(client.clone()), ..Wiring::default() };
    // CloseIO comes now, or came before the daemon was restarted.
    for stdin_closed in [false, true] {
        let plan = scratch.plan(None, Wiring { stdin_closed, ..wiring.clone() });
        let opened = plan.open(&fds, LogFiles::new()).unwrap();
        let stdin = reader(&client);
        let mut session = start(&plan, opened, &fds, &process);
        fs::OpenOptions::new().write(true).open(&client).unwrap().write_all(b"in").unwrap();
        assert_eq!(session.close_stdin(), !stdin_closed);
        for expected in ["in", "", ""] {
            let path = client.clone();
            let again = tokio::task::spawn_blocking(move || fs::read_to_string(path).unwrap());
            assert_eq!(again.await.unwrap(), expected);
        }
        drop(stdin);
    }
}

#[tokio::test]
async fn both_streams_are_appended_to_one_file_in_order() {
    let (scratch, process, fds) = (Scratch::new(), Process::new(), store(Vec::new()));
    let path = scratch.path("logs/web.log");
    let to = copied(Sink::File { path: path.clone(), create: true });
    let plan = scratch.plan(None, Wiring { stdout: to.clone(), stderr: to, ..Wiring::default() });
    assert!(plan.has_log_files());
    let files = plan.open_log_files().unwrap();
    let opened = plan.open(&fds, files).unwrap();
    let mut writer = fs::OpenOptions::new().write(true).open(plan.pipe(pipes::STDOUT)).unwrap();
    let mut session = start(&plan, opened, &fds, &process);
    writer.write_all(b"one\ntwo\n").unwrap();
    drop(writer);
    process.end();
    assert!(session.take_pumps().drain(Duration::ZERO).await);
    assert_eq!(fs::read_to_string(path).unwrap(), "one\ntwo\n");
}

#[tokio::test]
async fn a_terminal_passes_output_input_and_its_size() {
    let (scratch, process, fds) = (Scratch::new(), Process::new(), store(Vec::new()));
    let (input, output) = (scratch.fifo("stdin"), scratch.fifo("stdout"));
    let wiring = Wiring {
        terminal: true,
        stdin: Input::Fifo(input.clone()),
        stdout: copied(Sink::Fifo(output.clone())),
        ..Wiring::default()
    };
    let plan = scratch.plan(Some("shell"), wiring);
    let from_terminal = reader(&output);
    let mut opened = plan.open(&fds, LogFiles::new()).unwrap();
    assert!(opened.take_console().is_some());
    let pty = openpty(None, None).unwrap();
    opened.set_terminal(pty.master);
    assert!(opened.take_console().is_none());
    let mut session = start(&plan, opened, &fds, &process);
    session.terminal().unwrap().resize(132, 43).unwrap();
    let mut slave: fs::File = pty.slave.into();
    let size = rustix::termios::tcgetwinsize(&slave).unwrap();
    assert_eq!((size.ws_col, size.ws_row), (132, 43));
    fs::OpenOptions::new().write(true).open(&input).unwrap().write_all(b"line\n").unwrap();
    let (line, slave) = tokio::task::spawn_blocking(move || {
        let mut line = [0; 5];
        slave.read_exact(&mut line).map(|()| (line, slave))
    })
    .await
    .unwrap()
    .unwrap();
    assert_eq!(&line, b"line\n");
    drop(slave);
    process.end();
    // The terminal echoes what it is given.
    assert_eq!(all_of(from_terminal).await, "line\r\n");
    assert!(session.take_pumps().drain(Duration::ZERO).await);
    session.close_terminal();
    assert!(!session.close_terminal());
}

#[test]
fn a_terminal_of_an_earlier_daemon_is_claimed_and_used() {
    let (scratch, pty) = (Scratch::new(), openpty(None, None).unwrap());
    let number = pty.master.as_raw_fd();
    let fds = store(vec![(format!("t{NUMBER}"), pty.master)]);
    let plan = scratch.plan(None, Wiring { terminal: true, ..Wiring::default() });
    let mut opened = reopen(&plan, &fds, ReopenMode::Running).unwrap();
    assert_eq!(opened.terminal.as_ref().map(AsRawFd::as_raw_fd), Some(number));
    assert!(opened.take_console().is_none());
}

/// A daemon with an empty store.
fn first_daemon() -> (Systemd, Arc<StreamFds>) {
    let (systemd, notifier) = Systemd::new();
    let (fd_store, _) = FdStore::with(notifier, 100, Vec::new());
    (systemd, Arc::new(StreamFds::new(Arc::new(fd_store), Vec::new())))
}

/// Puts the descriptors of a daemon into the store of the next daemon.
fn next_daemon(systemd: &Systemd) -> (Systemd, Arc<StreamFds>) {
    let mut stored = Vec::new();
    systemd.read(&mut stored);
    let (systemd, notifier) = Systemd::new();
    let (fd_store, kept) = FdStore::with(notifier, 100, stored);
    (systemd, Arc::new(StreamFds::new(Arc::new(fd_store), kept)))
}

#[tokio::test(flavor = "multi_thread")]
async fn a_restart_keeps_the_unread_input_of_a_terminal_and_its_end() {
    // CloseIO comes while the process runs, while it starts, or before that.
    for (planned, started) in [(false, false), (false, true), (true, true)] {
        let (scratch, process) = (Scratch::new(), Process::new());
        let client = scratch.fifo("stdin");
        let wiring = Wiring { terminal: true, stdin: Input::Fifo(client.clone()), ..Wiring::default() };
        let plan = |stdin_closed| scratch.plan(None, Wiring { stdin_closed, ..wiring.clone() });
        let (systemd, fds) = first_daemon();
        let opened = plan(planned).open(&fds, LogFiles::new()).unwrap();
        let mut session = start(&plan(started), opened, &fds, &process);
        assert_eq!(session.close_stdin(), !started);
        let plan = plan(true);
        if !started {
            fds.close_input(&plan.wiring);
        }
        // The daemon does not read it: it has no terminal.
        fs::OpenOptions::new().write(true).open(&client).unwrap().write_all(b"in").unwrap();
        let before = fds.count_of(NUMBER);
        drop(session);
        let (_systemd, fds) = next_daemon(&systemd);
        fs::remove_file(client).unwrap();
        let opened = reopen(&plan, &fds, ReopenMode::Running).unwrap();
        assert!(opened.stdin.is_none());
        assert_eq!(all_of(opened.input.unwrap()).await, "in");
        assert_eq!(fds.count_of(NUMBER), before);
    }
}

#[tokio::test]
async fn a_terminal_that_hung_up_before_a_restart_keeps_no_stream_of_its_client_open() {
    let (scratch, process) = (Scratch::new(), Process::new());
    let output = scratch.fifo("client");
    let client = reader(&output);
    let wiring = Wiring { terminal: true, ..with_journal(Some(Sink::Fifo(output)), JournalCopy::Aside) };
    let plan = scratch.plan(None, wiring);
    let (systemd, fds) = first_daemon();
    let opened = reopen(&plan, &fds, ReopenMode::Running).unwrap();
    assert!(fds.count_of(NUMBER) > 0);
    let session = start(&plan, opened, &fds, &process);
    assert_eq!(fds.count_of(NUMBER), 0);
    drop((session, systemd));
    assert_eq!(all_of(client).await, "");
}

#[test]
fn a_process_whose_client_has_removed_its_input_gets_its_other_streams_again() {
    for terminal in [false, true] {
        let (scratch, fds) = (Scratch::new(), store(Vec::new()));
        let output = scratch.fifo("client");
        let _output = reader(&output);
        let stdin = Input::Fifo(scratch.path("removed"));
        let plan = scratch.plan(
            None,
            Wiring { stdin, terminal, ..with_journal(Some(Sink::Fifo(output)), JournalCopy::Complete) },
        );
        let runtime = tokio::runtime::Runtime::new().unwrap();
        let _runtime = runtime.enter();
        fifo::make(&plan.pipe(pipes::STDOUT)).unwrap();
        let opened = reopen(&plan, &fds, ReopenMode::Running).unwrap();
        assert!(opened.stdin.is_none() && opened.input.is_none());
        assert_eq!(opened.copies.len(), 1);
        assert!(reopen(&plan, &fds, ReopenMode::Starting).is_err());
    }
}

/// Otherwise each restart uses more entries of the store, until it is full.
#[tokio::test]
async fn a_stream_that_a_restart_finds_in_the_store_is_not_stored_again() {
    for terminal in [false, true] {
        for journal in [JournalCopy::None, JournalCopy::Aside, JournalCopy::Complete] {
            let scratch = Scratch::new();
            let [input, output] = ["client's stdin", "client's stdout"].map(|name| scratch.fifo(name));
            let _output = reader(&output);
            let wiring = Wiring {
                terminal,
                stdin: Input::Fifo(input.clone()),
                ..with_journal(Some(Sink::Fifo(output.clone())), journal)
            };
            let plan = scratch.plan(None, wiring);
            let mut stored = Vec::new();
            let mut counts = Vec::new();
            for daemon in 0..4 {
                let (systemd, notifier) = Systemd::new();
                let passed = std::mem::take(&mut stored);
                stored = passed
                    .iter()
                    .map(|(name, fd): &(String, OwnedFd)| (name.clone(), fd.try_clone().unwrap()))
                    .collect();
                let (fd_store, kept) = FdStore::with(notifier, 100, passed);
                let fd_store = Arc::new(fd_store);
                let fds = StreamFds::new(fd_store.clone(), kept);
                let opened = match daemon {
                    0 => plan.open(&fds, LogFiles::new()),
                    _ => reopen(&plan, &fds, ReopenMode::Running),
                };
                assert_eq!(opened.unwrap().copies.len(), 1);
                counts.push(fd_store.count());
                systemd.read(&mut stored);
            }
            assert!(counts.iter().all(|count| *count == counts[0] && *count > 1), "{counts:?}");
        }
    }
}

#[test]
fn a_logger_sees_no_end_before_the_process_has_its_pipes() {
    let (scratch, fds) = (Scratch::new(), store(Vec::new()));
    let logger = Logger { program: "/bin/logger".into(), args: Vec::new(), strict: false };
    let wiring =
        Wiring { stdout: Output::Logger, stderr: Output::Logger, logger: Some(logger), ..Wiring::default() };
    let plan = scratch.plan(Some("probe"), wiring);
    assert_eq!(plan.logger_description(), "Logger of exec probe in web");
    let mut opened = plan.open(&fds, LogFiles::new()).unwrap();
    assert!(opened.take_ready().is_some());
    let (mut logs, mut byte) = (fifo::open_reader(&plan.pipe(pipes::LOG_STDOUT)).unwrap(), [0]);
    let unread = logs.read(&mut byte).unwrap_err();
    assert_eq!(unread.kind(), io::ErrorKind::WouldBlock);
    opened.close_logger();
    assert_eq!(logs.read(&mut byte).unwrap(), 0);
    // A logger that has ended is no reader any more; the next one gets what was written meanwhile.
    drop(logs);
    fifo::open_both(&plan.pipe(pipes::LOG_STDOUT)).unwrap().write_all(b"x").unwrap();
    let mut logs = fifo::open_reader(&plan.pipe(pipes::LOG_STDOUT)).unwrap();
    assert_eq!((logs.read(&mut byte).unwrap(), byte), (1, *b"x"));
}

#[tokio::test]
async fn the_journals_copy_in_mode_auto_has_a_pipe_of_its_own() {
    let (scratch, fds) = (Scratch::new(), store(Vec::new()));
    let client = scratch.fifo("client");
    let _output = reader(&client);
    let plan = scratch.plan(None, with_journal(Some(Sink::Fifo(client)), JournalCopy::Aside));
    let opened = plan.open(&fds, LogFiles::new()).unwrap();
    let copy = only_copy(&opened);
    assert!(copy.sinks.fifo.is_some() && copy.sinks.aside.is_some() && copy.sinks.copies.is_empty());
}

#[tokio::test]
async fn a_client_without_a_copy_sees_only_the_end() {
    let (scratch, process, fds) = (Scratch::new(), Process::new(), store(Vec::new()));
    let client = scratch.fifo("client");
    let output = reader(&client);
    let plan = scratch.plan(Some("probe"), with_journal(Some(Sink::EndOnly(client)), JournalCopy::Complete));
    let opened = plan.open(&fds, LogFiles::new()).unwrap();
    let copy = only_copy(&opened);
    assert!(copy.sinks.fifo.is_none() && copy.sinks.keep_open.is_some());
    assert_eq!(copy.sinks.copies.len(), 1);
    let writer = fs::OpenOptions::new().write(true).open(plan.pipe(pipes::STDOUT)).unwrap();
    let mut session = start(&plan, opened, &fds, &process);
    drop(writer);
    process.end();
    assert_eq!(all_of(output).await, "");
    assert!(session.take_pumps().drain(Duration::ZERO).await);
}

#[tokio::test]
async fn a_terminal_with_two_destinations_is_copied_by_way_of_a_pipe() {
    let (scratch, fds) = (Scratch::new(), store(Vec::new()));
    let wiring = Wiring { terminal: true, ..with_journal(None, JournalCopy::Complete) };
    let opened = scratch.plan(None, wiring).open(&fds, LogFiles::new()).unwrap();
    assert!(matches!(opened.copies[..], [open::Copy { from: open::From::Bridge(_), .. }]));
}

#[tokio::test]
async fn the_next_daemon_completes_the_journals_copy_of_a_process_that_has_ended() {
    let (scratch, name) = (Scratch::new(), format!("a{NUMBER}"));
    let (from, to) = nix::unistd::pipe2(nix::fcntl::OFlag::O_NONBLOCK).unwrap();
    let fds = store(vec![(name.clone(), from), (name, to)]);
    let client = Some(Sink::Fifo(scratch.path("gone")));
    let plan = scratch.plan(None, with_journal(client.clone(), JournalCopy::Aside));
    let opened = reopen(&plan, &fds, ReopenMode::Ended).unwrap();
    let copy = only_copy(&opened);
    assert!(matches!(copy.from, open::From::Delivered) && copy.sinks.aside.is_some());
    // Another daemon finds nothing any more.
    assert!(reopen(&plan, &fds, ReopenMode::Ended).unwrap().copies.is_empty());
}

#[test]
fn the_logger_of_a_container_is_described_by_its_name() {
    let plan = Scratch::new().plan(None, Wiring::default());
    assert_eq!(plan.logger_description(), "Logger of web");
}

/// Output that a background process holds open arrives before the session ends.
#[tokio::test]
async fn what_is_in_a_fifo_that_another_process_holds_open_is_delivered() {
    let (scratch, process, fds) = (Scratch::new(), Process::new(), store(Vec::new()));
    let client = scratch.fifo("client");
    let plan = scratch
        .plan(Some("probe"), Wiring { stdout: copied(Sink::Fifo(client.clone())), ..Wiring::default() });
    let output = reader(&client);
    let opened = plan.open(&fds, LogFiles::new()).unwrap();
    let mut writer = fs::OpenOptions::new().write(true).open(plan.pipe(pipes::STDOUT)).unwrap();
    let mut session = start(&plan, opened, &fds, &process);
    process.end();
    // The time limit includes the time of earlier daemons: when it is over, nobody can have read the output.
    writer.write_all(b"half a line").unwrap();
    assert!(!session.take_pumps().drain(Duration::from_secs(60)).await);
    assert_eq!(all_of(output).await, "half a line");
    writer.write_all(b"x").unwrap_err();
}
