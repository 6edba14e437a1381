use std::os::unix::fs::MetadataExt;
use std::os::unix::net::UnixStream;

use ttrpc::proto::{MESSAGE_LENGTH_MAX, MESSAGE_TYPE_DATA, MESSAGE_TYPE_REQUEST, MESSAGE_TYPE_RESPONSE};

use super::head::MAGIC;
use super::*;

fn frame(stream: u32, kind: u8, length: usize) -> Vec<u8> {
    let mut bytes = u32::try_from(length).unwrap().to_be_bytes().to_vec();
    bytes.extend(stream.to_be_bytes());
    bytes.extend([kind, 0]);
    bytes.resize(HEADER + length, 7);
    bytes
}

fn response(stream: u32) -> Frame {
    Frame { bytes: frame(stream, MESSAGE_TYPE_RESPONSE, 4) }
}

/// A journal with these requests, which were removed from the socket.
fn journal(requests: &[(u32, usize)]) -> Journal {
    let mut journal = Journal::new().unwrap();
    for (stream, length) in requests {
        journal.note(&frame(*stream, MESSAGE_TYPE_REQUEST, *length)).unwrap();
        journal.settle().unwrap();
    }
    journal
}

fn adopt(journal: &Journal) -> Found {
    Journal::adopt(journal.fd().try_clone_to_owned().unwrap()).unwrap()
}

fn streams(found: &Found) -> Vec<u32> {
    found.unanswered.iter().map(Frame::stream).collect()
}

#[test]
fn a_response_whose_request_was_not_marked_is_not_sent_again_by_any_later_daemon() {
    let (socket, _peer) = UnixStream::pair().unwrap();
    let mut first = journal(&[(1, 10), (3, 10), (5, 10), (7, 10)]);
    // The daemon ends after it journaled the response and before it marked the request.
    first.note_response(socket.as_fd(), &response(3)).unwrap();
    let mut second = adopt(&first);
    assert_eq!(streams(&second), [1, 5, 7]);
    second.journal.respond(socket.as_fd(), &response(5)).unwrap();
    let mut third = adopt(&second.journal);
    assert_eq!(streams(&third), [1, 7]);
    third.journal.note_response(socket.as_fd(), &response(1)).unwrap();
    let mut fourth = adopt(&third.journal);
    assert_eq!(streams(&fourth), [7]);
    fourth.journal.respond(socket.as_fd(), &response(7)).unwrap();
    assert_eq!(streams(&adopt(&fourth.journal)), [0; 0]);
}

#[test]
fn a_refusal_whose_request_was_not_marked_is_not_sent_again_by_any_later_daemon() {
    let (socket, _peer) = UnixStream::pair().unwrap();
    let mut first = journal(&[(1, 10), (5, 10)]);
    // The rest of the frame is still to come, so the log is not compacted.
    let begun = &frame(3, MESSAGE_TYPE_REQUEST, MESSAGE_LENGTH_MAX + 1)[..100];
    first.note(begun).unwrap();
    first.settle().unwrap();
    let refused = first.refusals.remove(0);
    first.note_response(socket.as_fd(), &refused.answer).unwrap();
    let mut second = adopt(&first);
    assert!(second.journal.refusals.is_empty());
    second.journal.respond(socket.as_fd(), &response(1)).unwrap();
    let third = adopt(&second.journal);
    assert_eq!(streams(&third), [5]);
    assert!(third.journal.refusals.is_empty(), "{:?}", third.journal.refusals);
}

#[test]
fn requests_beyond_the_limit_of_a_connection_are_refused_until_others_are_answered() {
    let (socket, mut peer) = UnixStream::pair().unwrap();
    let mut journal = Journal::new().unwrap();
    let note = |journal: &mut Journal, stream| {
        let served = journal.note(&frame(stream, MESSAGE_TYPE_REQUEST, 1)).unwrap();
        journal.settle().unwrap();
        served.len()
    };
    let streams: Vec<u32> = (0..).map(|number| 2 * number + 1).take(OPEN_COUNT).collect();
    assert!(streams.iter().all(|stream| note(&mut journal, *stream) == 1));
    let extra = streams.last().unwrap() + 2;
    assert_eq!(note(&mut journal, extra), 0);
    journal.refuse(socket.as_fd()).unwrap();
    journal.send(socket.as_fd()).unwrap();
    let mut bytes = vec![0; 4096];
    let length = std::io::Read::read(&mut peer, &mut bytes).unwrap();
    bytes.truncate(length);
    let mut refusals = Assembler::default().push(&bytes);
    assert_eq!(refusals.len(), 1);
    assert_eq!(refusals.remove(0).1.stream(), extra);
    assert_eq!(
        adopt(&journal).unanswered.len(),
        OPEN_COUNT,
        "the refused request is not served by a later daemon"
    );
    journal.respond(socket.as_fd(), &response(streams[0])).unwrap();
    assert_eq!(note(&mut journal, extra + 2), 1);
}

#[test]
fn a_refusal_that_was_not_written_is_written_by_the_next_daemon() {
    let (socket, _peer) = UnixStream::pair().unwrap();
    let mut first = journal(&[(1, 10)]);
    first.note(&frame(3, MESSAGE_TYPE_REQUEST, MESSAGE_LENGTH_MAX + 1)[..100]).unwrap();
    first.settle().unwrap();
    let mut second = adopt(&first);
    assert_eq!(streams(&second), [1]);
    assert_eq!(second.journal.unsent(), 0);
    second.journal.refuse(socket.as_fd()).unwrap();
    assert!(second.journal.unsent() > 0);
    assert!(adopt(&second.journal).journal.refusals.is_empty());
}

/// How much memory a journal takes.
fn memory(journal: &Journal) -> u64 {
    journal.file.metadata().unwrap().blocks() * 512
}

#[test]
fn frames_that_nobody_answers_do_not_reach_the_place_of_the_responses() {
    let (socket, _peer) = UnixStream::pair().unwrap();
    // This request is never answered, as a Wait is for long.
    let mut journal = journal(&[(1, 10)]);
    journal.note_response(socket.as_fd(), &response(5)).unwrap();
    let data = frame(3, MESSAGE_TYPE_DATA, MESSAGE_LENGTH_MAX);
    let mut most = 0;
    for _ in 0..IN_LIMIT * 5 / 4 / data.len() as u64 {
        for piece in data.chunks(1 << 20) {
            journal.note(piece).unwrap();
            journal.settle().unwrap();
            journal.refuse(socket.as_fd()).unwrap();
            most = most.max(journal.head.end);
        }
        assert!(memory(&journal) < 16 << 20, "{} bytes are kept", memory(&journal));
    }
    assert!(IN_BASE + most < OUT_BASE, "{most}");
    assert_eq!(streams(&adopt(&journal)), [1]);
    let mut kept = [0; HEADER];
    journal.file.read_exact_at(&mut kept, OUT_BASE).unwrap();
    assert_eq!(kept, response(5).bytes[..HEADER]);
}

#[test]
fn responses_that_were_read_are_forgotten_although_one_is_always_unread() {
    let (socket, mut peer) = UnixStream::pair().unwrap();
    let mut journal = journal(&[(1, 10)]);
    let large = Frame { bytes: frame(3, MESSAGE_TYPE_RESPONSE, 30_000) };
    let mut unread = vec![0; large.bytes.len()];
    journal.note_response(socket.as_fd(), &large).unwrap();
    journal.send(socket.as_fd()).unwrap();
    for _ in 0..1000 {
        journal.note_response(socket.as_fd(), &large).unwrap();
        journal.send(socket.as_fd()).unwrap();
        std::io::Read::read_exact(&mut peer, &mut unread).unwrap();
        assert_eq!(unread, large.bytes);
        assert!(memory(&journal) < 1 << 20, "{} bytes are kept", memory(&journal));
    }
    assert!(journal.out_end > 10 << 20, "there was no moment at which everything was read");
}

#[test]
fn a_journal_of_another_layout_is_refused() {
    let change = |at: u64, bytes: &[u8]| {
        let journal = journal(&[(1, 10)]);
        journal.file.write_all_at(bytes, at).unwrap();
        Journal::adopt(journal.fd().try_clone_to_owned().unwrap()).map(drop)
    };
    assert!(change(0, &MAGIC.to_le_bytes()).is_ok());
    assert!(matches!(change(0, b"none"), Err(Error::Malformed)));
    assert!(matches!(change(4, &9_u32.to_le_bytes()), Err(Error::Newer { found: 9 })));
    assert!(matches!(change(16, &u64::MAX.to_le_bytes()), Err(Error::Malformed)));
}
