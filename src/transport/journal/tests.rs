use std::os::unix::fs::MetadataExt;
use std::os::unix::net::UnixStream;

use ttrpc::proto::{MESSAGE_LENGTH_MAX, MESSAGE_TYPE_DATA, MESSAGE_TYPE_REQUEST, MESSAGE_TYPE_RESPONSE};

use protobuf::Message;

use super::super::budget::Amount;
use super::super::weight::MOST_METADATA;
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
    let mut journal = Journal::new(&Budget::default()).unwrap();
    for (stream, length) in requests {
        journal.note(&frame(*stream, MESSAGE_TYPE_REQUEST, *length)).unwrap();
        journal.settle().unwrap();
    }
    journal
}

fn adopt(journal: &Journal) -> Found {
    Journal::adopt(journal.fd().try_clone_to_owned().unwrap(), &Budget::default()).unwrap()
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
    let mut journal = Journal::new(&Budget::default()).unwrap();
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
fn small_responses_share_a_page_and_are_sent_once_by_whichever_daemon() {
    let (socket, mut peer) = UnixStream::pair().unwrap();
    // The first request is never answered, as a Wait is for long; or there is none.
    for waiting in [vec![(1, 10)], Vec::new()] {
        let mut journal = journal(&waiting);
        let mut furthest = 0;
        for stream in (3..1000).step_by(2) {
            journal.note(&frame(stream, MESSAGE_TYPE_REQUEST, 10)).unwrap();
            journal.settle().unwrap();
            journal.respond(socket.as_fd(), &response(stream)).unwrap();
            // A daemon ends before it sends the response, and the next one after that.
            journal = adopt(&journal).journal;
            journal.send(socket.as_fd()).unwrap();
            let mut read = vec![0; response(stream).bytes.len()];
            std::io::Read::read_exact(&mut peer, &mut read).unwrap();
            assert_eq!(read, response(stream).bytes);
            let found = adopt(&journal);
            assert_eq!(streams(&found), waiting.iter().map(|(stream, _)| *stream).collect::<Vec<_>>());
            assert_eq!(found.journal.unsent(), 0);
            journal = found.journal;
            furthest = furthest.max(journal.out_end);
            assert!(memory(&journal) < 1 << 20, "{} bytes are kept", memory(&journal));
        }
        let length = response(1).bytes.len() as u64;
        assert!((PAGE - length..=PAGE).contains(&furthest), "{furthest}");
    }
}

#[test]
fn a_journal_of_another_layout_is_refused() {
    let change = |at: u64, bytes: &[u8]| {
        let journal = journal(&[(1, 10)]);
        journal.file.write_all_at(bytes, at).unwrap();
        Journal::adopt(journal.fd().try_clone_to_owned().unwrap(), &Budget::default()).map(drop)
    };
    assert!(change(0, &MAGIC.to_le_bytes()).is_ok());
    assert!(matches!(change(0, b"none"), Err(Error::Malformed)));
    assert!(matches!(change(4, &9_u32.to_le_bytes()), Err(Error::Newer { found: 9 })));
    assert!(matches!(change(16, &u64::MAX.to_le_bytes()), Err(Error::Malformed)));
}

/// A request with a payload of this length.
fn request(stream: u32, payload: usize, metadata: usize) -> Vec<u8> {
    let metadata = vec![ttrpc::proto::KeyValue::default(); metadata];
    let request = ttrpc::Request { payload: vec![0x7b; payload], metadata, ..ttrpc::Request::default() };
    super::super::frame::frame(stream, MESSAGE_TYPE_REQUEST, &request.write_to_bytes().unwrap())
}

/// The answers that a client gets.
fn answers(journal: &mut Journal, socket: &UnixStream, peer: &mut UnixStream) -> Vec<(u32, String)> {
    journal.refuse(socket.as_fd()).unwrap();
    journal.send(socket.as_fd()).unwrap();
    peer.set_nonblocking(true).unwrap();
    let mut bytes = vec![0; 1 << 20];
    let length = std::io::Read::read(peer, &mut bytes).unwrap_or_default();
    let found = Assembler::default().push(&bytes[..length]);
    found.into_iter().map(|(_, frame)| (frame.stream(), frame.reason())).collect()
}

#[test]
fn a_request_that_needs_much_more_memory_than_its_bytes_is_refused_and_not_kept() {
    let (socket, mut peer) = UnixStream::pair().unwrap();
    let mut journal = journal(&[(1, 10)]);
    let served = journal.note(&request(3, 10, MOST_METADATA + 1)).unwrap();
    journal.settle().unwrap();
    assert!(served.is_empty() && journal.open.len() == 1);
    // The daemon ends before it refuses the request.
    let mut second = adopt(&journal);
    assert_eq!(streams(&second), [1]);
    let found = answers(&mut second.journal, &socket, &mut peer);
    assert_eq!(found, [(3, "the request has more than 64 entries of metadata".to_owned())]);
    let third = adopt(&second.journal);
    assert_eq!((streams(&third), third.journal.refusals.len()), (vec![1], 0));
}

#[test]
fn a_second_request_on_a_stream_is_refused_until_the_first_one_is_answered() {
    let (socket, mut peer) = UnixStream::pair().unwrap();
    let mut journal = journal(&[(1, 10), (3, 10)]);
    assert!(journal.note(&request(3, 10, 0)).unwrap().is_empty());
    journal.settle().unwrap();
    let found = answers(&mut journal, &socket, &mut peer);
    assert_eq!(found, [(3, "the request on stream 3 is not answered yet".to_owned())]);
    assert_eq!((journal.open.len(), streams(&adopt(&journal))), (2, vec![1]));
    journal.respond(socket.as_fd(), &response(3)).unwrap();
    assert_eq!(journal.note(&request(3, 10, 0)).unwrap().len(), 1);
}

/// A budget for a single large request, in addition to what each connection has.
fn tight() -> Budget {
    Budget::of(Amount { count: 1000, weight: 5 << 20 })
}

#[test]
fn an_open_request_that_an_earlier_version_took_and_that_is_too_much_is_refused_by_the_next_daemon() {
    let (socket, mut peer) = UnixStream::pair().unwrap();
    let first = journal(&[(1, 4 << 20), (3, 100), (5, 4 << 20), (7, 100)]);
    let kept = first.fd().try_clone_to_owned().unwrap();
    let budget = tight();
    let mut second = Journal::adopt(kept, &budget).unwrap();
    assert_eq!(streams(&second), [1, 3, 7]);
    let found = answers(&mut second.journal, &socket, &mut peer);
    assert_eq!(found, [(5, NO_ROOM.to_owned())]);
    assert_eq!(streams(&adopt(&second.journal)), [1, 3, 7]);
}

#[test]
fn requests_on_all_connections_together_have_a_limit_and_each_connection_can_do_little_work() {
    let (socket, mut peer) = UnixStream::pair().unwrap();
    let budget = tight();
    let mut greedy = Journal::new(&budget).unwrap();
    assert_eq!(greedy.note(&request(1, (4 << 20) - 100, 0)).unwrap().len(), 1);
    let mut other = Journal::new(&budget).unwrap();
    assert_eq!(other.note(&request(1, 3 << 20, 0)).unwrap().len(), 0);
    other.settle().unwrap();
    assert_eq!(answers(&mut other, &socket, &mut peer), [(1, NO_ROOM.to_owned())]);
    assert_eq!(other.note(&request(3, 1000, 4)).unwrap().len(), 1, "a usual request");
    drop(greedy);
    assert_eq!(other.note(&request(5, 3 << 20, 0)).unwrap().len(), 1);
}

#[test]
fn an_incomplete_request_counts_and_its_rest_is_skipped_wherever_the_daemon_ends() {
    let all = request(3, (4 << 20) - 100, 0);
    let next = request(5, 10, 0);
    // The daemon ends before the refusal, between the refusal and its mark, or after both.
    for steps in 0..3 {
        let (socket, mut peer) = UnixStream::pair().unwrap();
        let budget = tight();
        let mut greedy = Journal::new(&budget).unwrap();
        greedy.note(&request(1, 3 << 20, 0)).unwrap();
        let mut first = Journal::new(&budget).unwrap();
        // Another request, so that the log is kept.
        first.note(&request(1, 10, 0)).unwrap();
        let (begun, mut rest) = all.split_at(3 << 20);
        assert!(first.note(begun).unwrap().is_empty() && first.refusals.len() == 1);
        first.settle().unwrap();
        if steps == 1 {
            let refused = first.refusals.remove(0);
            first.note_response(socket.as_fd(), &refused.answer).unwrap();
        } else if steps == 2 {
            first.refuse(socket.as_fd()).unwrap();
            let (more, after) = rest.split_at(1000);
            assert!(first.note(more).unwrap().is_empty());
            first.settle().unwrap();
            rest = after;
        }
        let kept = first.fd().try_clone_to_owned().unwrap();
        drop(first);
        let Found { journal: mut second, unanswered, .. } = Journal::adopt(kept, &budget).unwrap();
        assert_eq!(unanswered.len(), 1);
        assert!(second.note(rest).unwrap().is_empty(), "step {steps}");
        second.settle().unwrap();
        assert_eq!(answers(&mut second, &socket, &mut peer), [(3, NO_ROOM.to_owned())], "step {steps}");
        assert_eq!(second.note(&next).unwrap(), [Frame { bytes: next.clone() }], "step {steps}");
        second.settle().unwrap();
        assert_eq!(streams(&adopt(&second)), [1, 5]);
        assert!(memory(&second) < 8 << 20);
    }
}
