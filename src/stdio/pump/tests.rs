use super::*;
use crate::stdio::aside::CAPACITY;
use crate::sys::watch_writable;
use nix::fcntl::{FcntlArg, OFlag, fcntl};
use nix::unistd::pipe2;
use std::future::pending;
use std::io::{Read, Write};
use std::os::fd::AsFd;
use std::thread;

/// A pipe, and its writing end as a file.
fn pipe() -> (AsyncFd<OwnedFd>, File) {
    let (reader, writer) = pipe2(OFlag::O_CLOEXEC | OFlag::O_NONBLOCK).unwrap();
    (watch(reader).unwrap(), writer.into())
}

/// Another pipe: the reading end as a file that waits.
fn sink() -> (File, AsyncFd<OwnedFd>) {
    let (reader, writer) = nix::unistd::pipe2(OFlag::O_CLOEXEC).unwrap();
    fcntl(&writer, FcntlArg::F_SETFL(OFlag::O_NONBLOCK)).unwrap();
    (reader.into(), watch_writable(writer).unwrap())
}

/// The pipe of an [`Aside`].
fn pipe_to_journal() -> (OwnedFd, OwnedFd) {
    pipe2(OFlag::O_CLOEXEC | OFlag::O_NONBLOCK).unwrap()
}

fn diverter(pipe: OwnedFd) -> Box<Diverter> {
    Box::new(Diverter::new(pipe, Arc::default()))
}

/// Reads to the end. Waits for it: a program that another test starts has a copy of the writing end until it executes.
fn text(mut from: File) -> String {
    fcntl(&from, FcntlArg::F_SETFL(OFlag::empty())).unwrap();
    let mut text = String::new();
    from.read_to_string(&mut text).unwrap();
    text
}

/// Writes so that each write has its own buffer in the pipe, as with a fast reader.
fn write_apart(to: &impl AsFd, word: &str) {
    let (reader, writer) = pipe2(OFlag::O_CLOEXEC).unwrap();
    nix::unistd::write(&writer, word.as_bytes()).unwrap();
    assert_eq!(splice(&reader, None, to, None, word.len(), NO_WAIT), Ok(word.len()));
}

#[tokio::test]
async fn short_writes_fill_the_pipe_and_the_copy_is_complete() {
    let ((source, writer), (client, to), (copy, aside)) = (pipe(), sink(), pipe_to_journal());
    let client = thread::spawn(move || text(client));
    let diverter = diverter(aside);
    let policy = diverter.policy.clone();
    let mut expected = String::new();
    fcntl(&writer, FcntlArg::F_SETPIPE_SZ(1 << 20)).unwrap();
    for number in 0..100 {
        let line = format!("{number}\n");
        write_apart(&writer, &line);
        expected.push_str(&line);
    }
    drop(writer);
    let mut journal = String::new();
    let emptied = async {
        let mut buffer = [0; 4096];
        loop {
            match nix::unistd::read(&copy, &mut buffer) {
                Ok(length) => journal.push_str(std::str::from_utf8(&buffer[..length]).unwrap()),
                Err(_) => tokio::task::yield_now().await,
            }
        }
    };
    let (over, complete) = (pin!(pending()), pin!(pending()));
    tokio::select! {
        moved = move_all(&source, &to, Some(diverter), over, complete) => moved.unwrap(),
        () = emptied => {}
    }
    drop(to);
    journal.push_str(&text(copy.into()));
    assert_eq!((client.join().unwrap(), journal), (expected.clone(), expected));
    assert!(policy.take_dropped().is_nothing());
}

/// Each short write has a buffer of its own, in a pipe that is full of such writes already.
#[tokio::test]
async fn what_an_ended_process_has_left_reaches_a_client_that_reads_later() {
    for has_copies in [false, true] {
        let ((source, writer), (client, to)) = (pipe(), sink());
        let mut expected = String::new();
        for (pipe, numbers) in [(to.as_fd(), 0..16), (writer.as_fd(), 16..32)] {
            for line in numbers.map(|number| format!("{number}\n")) {
                write_apart(&pipe, &line);
                expected.push_str(&line);
            }
        }
        assert!(!is_ready(&to, PollFlags::POLLOUT).unwrap(), "the client's pipe is full");
        let ended = CancellationToken::new();
        let size = || fcntl(&client, FcntlArg::F_GETPIPE_SZ).unwrap();
        let end = async {
            tokio::task::yield_now().await;
            assert_eq!(size(), 64 << 10, "while the process runs");
            drop(writer);
            ended.cancel();
        };
        let mut sinks = Sinks { fifo: Some(to), ..Sinks::default() };
        if has_copies {
            sinks.copies.push(Sink::Pipe(diverter(pipe_to_journal().1)));
        }
        let (over, complete) = (pin!(ended.cancelled()), pin!(pending()));
        let (moved, ()) = tokio::join!(deliver_pipe(&source, &mut sinks, None, over, complete), end);
        moved.unwrap();
        assert_eq!(size(), 128 << 10);
        drop(sinks);
        assert_eq!(text(client), expected, "has copies: {has_copies}");
    }
}

/// A process of the container can open the output of another one for reading.
#[tokio::test(start_paused = true)]
async fn bytes_that_another_process_takes_delay_no_end() {
    for has_copies in [false, true] {
        let ((source, writer), (_client, to), (_copy, aside)) = (pipe(), sink(), pipe_to_journal());
        (0..15).for_each(|_| write_apart(&to, "x"));
        ["a\n", "b\n"].into_iter().for_each(|line| write_apart(&writer, line));
        let (ended, whole) = (CancellationToken::new(), CancellationToken::new());
        let steal = async {
            // Both lines are copied then, and there was room for the first one only.
            while length_in(&source) > 2 {
                tokio::task::yield_now().await;
            }
            let mut stolen = [0; 16];
            assert_eq!(nix::unistd::read(&source, &mut stolen), Ok(2));
            ended.cancel();
            whole.cancel();
        };
        let mut sinks = Sinks { fifo: Some(to), ..Sinks::default() };
        let diverter = diverter(aside);
        let diverter = if has_copies {
            sinks.copies.push(Sink::Pipe(diverter));
            None
        } else {
            Some(diverter)
        };
        let (over, complete) = (pin!(ended.cancelled()), pin!(whole.cancelled()));
        let moving = deliver_pipe(&source, &mut sinks, diverter, over, complete);
        let (moved, ()) = tokio::join!(tokio::time::timeout(Duration::from_secs(1), moving), steal);
        assert!(matches!(moved, Ok(Ok(()))), "has copies: {has_copies}: {moved:?}");
        drop(writer);
    }
}

#[tokio::test]
async fn an_unread_copy_delays_nothing_and_its_missing_bytes_are_counted() {
    let ((source, mut writer), (client, to), (copy, aside)) = (pipe(), sink(), sink());
    let total = 4 << 20;
    let writing = thread::spawn(move || {
        let mut left = total;
        while left > 0 {
            match writer.write(&vec![b'x'; left.min(4096)]) {
                Ok(written) => left -= written,
                Err(_) => thread::yield_now(),
            }
        }
    });
    let reading = thread::spawn(move || text(client).len());
    let diverter = diverter(aside.into_inner());
    let policy = diverter.policy.clone();
    move_all(&source, &to, Some(diverter), pin!(pending()), pin!(pending())).await.unwrap();
    writing.join().unwrap();
    drop(to);
    assert_eq!(reading.join().unwrap(), total);
    let (copied, dropped) = (text(copy).len(), policy.take_dropped().bytes as usize);
    assert_eq!(copied + dropped, total, "{copied} copied, {dropped} dropped");
    assert!(copied as i32 >= CAPACITY - PIECE as i32, "the pipe did not grow: {copied}");
}

#[tokio::test]
async fn output_after_a_gap_begins_with_a_new_line() {
    let ((source, mut writer), (client, to), (copy, aside)) = (pipe(), sink(), sink());
    let mut diverter = diverter(aside.into_inner());
    diverter.policy.set(60_000_000, 1);
    diverter.policy.admit(0);
    diverter.write(b"half of a li").await;
    assert!(diverter.has_gap);
    diverter.policy.set(60_000_000, 100);
    diverter.has_gap = true;
    writer.write_all(b"rest of a line\n").unwrap();
    drop(writer);
    move_all(&source, &to, Some(diverter), pin!(pending()), pin!(pending())).await.unwrap();
    drop(to);
    assert_eq!((text(client), text(copy)), ("rest of a line\n".into(), "\nrest of a line\n".into()));
}

#[tokio::test]
async fn copying_from_a_source_that_never_ends_stops_once_it_is_empty() {
    let ((source, mut writer), (client, to)) = (pipe(), sink());
    writer.write_all(b"all").unwrap();
    move_all(&source, &to, None, pin!(pending()), pin!(std::future::ready(()))).await.unwrap();
    drop((to, writer));
    assert_eq!(text(client), "all");
}

#[tokio::test(start_paused = true)]
async fn the_end_of_the_last_line_is_not_waited_for_once_the_output_is_complete() {
    let (source, mut writer) = pipe();
    writer.write_all(b"no end of line").unwrap();
    let (begun, complete) = (tokio::time::Instant::now(), CancellationToken::new());
    let end = async {
        tokio::time::sleep(LINE_WAIT / 10).await;
        complete.cancel();
    };
    let (over, complete) = (pin!(pending()), pin!(complete.cancelled()));
    let spread = spread(&source, &mut [], None, PIECE, over, complete);
    let (copied, ()) = tokio::join!(spread, end);
    copied.unwrap();
    assert!(begun.elapsed() < LINE_WAIT / 2, "{:?}", begun.elapsed());
    assert!(!is_ready(&source, PollFlags::POLLIN).unwrap());
}

#[tokio::test(start_paused = true)]
async fn a_line_that_grows_byte_by_byte_waits_no_longer_than_others() {
    let (source, mut writer) = pipe();
    let dots = async {
        for _ in 0..10 {
            writer.write_all(b".").unwrap();
            tokio::time::sleep(LINE_WAIT / 4).await;
        }
    };
    let (over, complete) = (pin!(pending()), pin!(pending()));
    let spread = spread(&source, &mut [], None, PIECE, over, complete);
    tokio::select! {
        copied = spread => panic!("ended: {copied:?}"),
        () = dots => {}
    }
    let left = length_in(&source);
    assert!(left <= 5, "{left}");
}

#[tokio::test(start_paused = true)]
async fn output_beyond_the_limit_of_the_journal_is_dropped_in_large_pieces_and_counted() {
    let scratch = tempfile::tempdir().unwrap();
    let (here, _journald) = tokio::net::UnixDatagram::pair().unwrap();
    let policy = Arc::<crate::stdio::journal_policy::JournalPolicy>::default();
    policy.set(60_000_000, 1);
    let lines = Lines::connected(here, scratch.path().join("partial"), policy.clone());
    let mut copies = [Sink::Journal(lines)];
    let (source, mut writer) = pipe();
    let (begun, complete) = (tokio::time::Instant::now(), CancellationToken::new());
    let write = async {
        for piece in 0..10 {
            writer.write_all(&vec![b'\n'; CHUNK]).unwrap();
            tokio::time::sleep(Duration::from_millis(5)).await;
            assert_eq!(length_in(&source), 0, "{piece}");
        }
        complete.cancel();
    };
    let (over, complete) = (pin!(pending()), pin!(complete.cancelled()));
    let spread = spread(&source, &mut copies, None, PIECE, over, complete);
    let (copied, ()) = tokio::join!(spread, write);
    copied.unwrap();
    assert!(begun.elapsed() < Duration::from_secs(1), "{:?}", begun.elapsed());
    // Of the first piece, lines without bytes are dropped one by one.
    assert_eq!(policy.take_dropped().bytes as usize, 10 * CHUNK - PIECE);
}

/// A journal's copy with these lines in its pipe, which the earlier daemon has left. The other end of its socket.
fn late_copy(kept: &std::path::Path, lines: usize) -> (Box<Output>, tokio::net::UnixDatagram) {
    let (reader, writer) = pipe2(OFlag::O_CLOEXEC | OFlag::O_NONBLOCK).unwrap();
    for number in 0..lines {
        nix::unistd::write(&writer, format!("{number}\n").as_bytes()).unwrap();
    }
    let (here, journald) = tokio::net::UnixDatagram::pair().unwrap();
    let policy = Arc::<crate::stdio::journal_policy::JournalPolicy>::default();
    let lines = Lines::connected(here, kept.join("partial"), policy.clone());
    let aside = Aside::new((reader, writer), lines, policy).unwrap();
    let sinks = Sinks { aside: Some(Box::new(aside)), ..Sinks::default() };
    (Box::new(Output { source: Source::Delivered, sinks }), journald)
}

#[tokio::test(start_paused = true)]
async fn a_slow_journald_delays_the_end_for_a_limited_time_and_missing_lines_are_counted() {
    let scratch = tempfile::tempdir().unwrap();
    let (output, journald) = late_copy(scratch.path(), 1000);
    let begun = tokio::time::Instant::now();
    let mut messages = Vec::new();
    let reading = async {
        let mut datagram = vec![0; 1 << 16];
        loop {
            let length = journald.recv(&mut datagram).await.unwrap();
            messages.push(String::from_utf8_lossy(&datagram[..length]).into_owned());
            tokio::time::sleep(LATE_AFTER_RESTART / 100).await;
        }
    };
    let over = Box::pin(pending());
    tokio::select! {
        () = copy(output, over, Stop::default(), || ()) => {}
        () = reading => {}
    }
    assert!(begun.elapsed() < 4 * LATE_AFTER_RESTART, "{:?}", begun.elapsed());
    let mut rest = Vec::with_capacity(1 << 20);
    while journald.try_recv_buf(&mut rest).is_ok() {}
    messages.push(String::from_utf8_lossy(&rest).into_owned());
    let text = messages.concat();
    assert!(text.contains("\u{0}0\n") && !text.contains("\u{0}999\n"), "{} datagrams", messages.len());
    assert!(text.contains("are missing here"), "{} datagrams", messages.len());
}

/// There is one for each stream, for as long as its process runs.
#[test]
fn a_pump_needs_less_than_3_kib() {
    let output = Box::new(Output { source: Source::Delivered, sinks: Sinks::default() });
    let pump = copy(output, Box::pin(pending()), Stop::default(), || ());
    assert!(size_of_val(&pump) < 3 << 10, "{} bytes", size_of_val(&pump));
}
