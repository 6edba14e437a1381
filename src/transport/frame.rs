//! Frames of the ttrpc protocol, as far as a connection interprets them (pure).
//!
//! A frame has a header of ten bytes (the length of the rest and the stream, both big endian, then type and flags). See
//! PROTOCOL.md of containerd's ttrpc.

use protobuf::Message;
use ttrpc::proto::{
    MESSAGE_HEADER_LENGTH, MESSAGE_LENGTH_MAX, MESSAGE_TYPE_DATA, MESSAGE_TYPE_REQUEST, MESSAGE_TYPE_RESPONSE,
};

/// The length of a header.
pub const HEADER: usize = MESSAGE_HEADER_LENGTH;

/// The flag of a request that an earlier daemon read. That daemon may have executed it, wholly or in part. ttrpc does not use
/// this bit.
pub const REPLAYED: u8 = 0x80;
/// The offset of the flags in a header.
const FLAGS: usize = 9;

/// The type of a journal entry for a frame that is too long: its length says how much of the frame's rest is missing. No
/// peer sends this type. If one does, its frame is skipped, as ttrpc skips unknown types.
pub const SKIPPED: u8 = 0xff;
/// The offset of the type in a header.
pub const TYPE: u64 = 8;

/// A frame is longer than ttrpc allows. It is skipped.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("message length {length} exceeds the maximum message size of {MESSAGE_LENGTH_MAX}")]
pub struct TooLong {
    /// The stream of the frame.
    pub stream: u32,
    /// The length of the frame's rest.
    pub length: u32,
}

/// A whole frame.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Frame {
    /// Header and rest.
    pub bytes: Vec<u8>,
}

impl Frame {
    /// The stream of the frame. Each Task call has its own.
    pub fn stream(&self) -> u32 {
        Head::of(&self.bytes).map_or(0, |head| head.stream)
    }

    /// How many bytes follow the header, according to it.
    pub fn length(&self) -> usize {
        Head::of(&self.bytes).map_or(0, |head| head.length as usize)
    }

    /// True if the frame ends a call.
    pub fn is_response(&self) -> bool {
        self.bytes.get(8) == Some(&MESSAGE_TYPE_RESPONSE)
    }

    /// True if the frame begins a call.
    pub fn is_request(&self) -> bool {
        self.bytes.get(8) == Some(&MESSAGE_TYPE_REQUEST)
    }

    /// True if the frame belongs to a stream of messages within a call.
    pub fn is_data(&self) -> bool {
        self.bytes.get(8) == Some(&MESSAGE_TYPE_DATA)
    }

    /// The flags of the frame.
    pub fn flags(&self) -> u8 {
        self.bytes.get(FLAGS).copied().unwrap_or_default()
    }

    /// The request in the frame, if it has one.
    pub fn request(&self) -> Option<ttrpc::Request> {
        let rest = self.bytes.get(HEADER..).filter(|_| self.is_request())?;
        ttrpc::Request::parse_from_bytes(rest).ok()
    }

    /// Makes an error response.
    pub fn refusal(stream: u32, code: ttrpc::Code, reason: String) -> Self {
        let mut response = ttrpc::Response::new();
        response.set_status(ttrpc::get_status(code, reason));
        // A status can always be encoded, and is not too long.
        Self::response(stream, &response).unwrap_or(Self { bytes: Vec::new() })
    }

    /// Makes a response. `None` if it can't be encoded, or is too long.
    pub fn response(stream: u32, response: &ttrpc::Response) -> Option<Self> {
        Self::new(stream, MESSAGE_TYPE_RESPONSE, response)
    }

    /// Makes a request. `None` if it can't be encoded, or is too long.
    pub fn of_request(stream: u32, request: &ttrpc::Request) -> Option<Self> {
        Self::new(stream, MESSAGE_TYPE_REQUEST, request)
    }

    fn new(stream: u32, kind: u8, message: &impl Message) -> Option<Self> {
        let rest = message.write_to_bytes().ok().filter(|rest| rest.len() <= MESSAGE_LENGTH_MAX)?;
        let mut bytes = Vec::with_capacity(HEADER + rest.len());
        bytes.extend(u32::try_from(rest.len()).ok()?.to_be_bytes());
        bytes.extend(stream.to_be_bytes());
        bytes.extend([kind, 0]);
        bytes.extend(rest);
        Some(Self { bytes })
    }

    /// The text of an error response.
    pub fn reason(&self) -> String {
        let response = self.bytes.get(HEADER..).map(ttrpc::Response::parse_from_bytes);
        response.and_then(Result::ok).map(|response| response.status().message.clone()).unwrap_or_default()
    }

    /// This frame, marked as replayed. The mark does not make it longer: it may have the largest size already.
    pub fn replayed(mut self) -> Self {
        if let Some(flags) = self.bytes.get_mut(FLAGS) {
            *flags |= REPLAYED;
        }
        self
    }

    /// True if the frame has the mark of [`Self::replayed`].
    #[cfg(any(test, fuzzing))]
    pub fn is_replayed(&self) -> bool {
        self.flags() & REPLAYED != 0
    }
}

/// Assembles frames from pieces of any size. Skips a frame that is too long, for which its sender gets an error.
#[derive(Debug, Default)]
pub struct Assembler {
    partial: Vec<u8>,
    /// How many bytes of the skipped frame are missing.
    left: u64,
    /// How many bytes of the skipped frame have arrived.
    skipped: u64,
    refused: Vec<(u64, TooLong)>,
}

impl Assembler {
    /// Adds a piece, and returns the frames that are complete now, each with its position. Positions count from the first
    /// byte of the frame that was incomplete before.
    pub fn push(&mut self, piece: &[u8]) -> Vec<(u64, Frame)> {
        let (mut frames, mut at) = (Vec::new(), 0);
        let skipped = usize::try_from(self.left).map_or(piece.len(), |left| left.min(piece.len()));
        self.left -= skipped as u64;
        self.skipped += skipped as u64;
        if self.left > 0 {
            return frames;
        }
        at += std::mem::take(&mut self.skipped);
        self.partial.extend_from_slice(&piece[skipped..]);
        let mut rest = self.partial.as_slice();
        while let Some(head) = Head::of(rest) {
            let whole = HEADER as u64 + u64::from(head.length);
            if head.is_kept() {
                let Some((frame, after)) = usize::try_from(whole).ok().and_then(|n| rest.split_at_checked(n))
                else {
                    break;
                };
                frames.push((at, Frame { bytes: frame.to_vec() }));
                rest = after;
            } else {
                if head.kind != SKIPPED {
                    self.refused.push((at, TooLong { stream: head.stream, length: head.length }));
                }
                let here = usize::try_from(whole).map_or(rest.len(), |whole| whole.min(rest.len()));
                rest = &rest[here..];
                self.left = whole - here as u64;
                if self.left > 0 {
                    self.skipped = here as u64;
                    break;
                }
            }
            at += whole;
        }
        let taken = self.partial.len() - rest.len();
        self.partial.drain(..taken);
        if self.partial.is_empty() {
            // Frees the memory of a large frame.
            self.partial = Vec::new();
        }
        frames
    }

    /// How many bytes of an incomplete frame have arrived.
    pub fn pending(&self) -> u64 {
        if self.left > 0 { self.skipped } else { self.partial.len() as u64 }
    }

    /// True if the next `length` bytes all belong to a frame that is skipped.
    pub fn skips(&self, length: usize) -> bool {
        self.left >= length as u64 && self.left > 0
    }

    /// If a frame is being skipped: replaces what has arrived of it by a header of type [`SKIPPED`], which it returns.
    pub fn shorten(&mut self) -> Option<[u8; HEADER]> {
        let length = u32::try_from(self.left).ok().filter(|left| *left > 0)?;
        self.skipped = HEADER as u64;
        let mut header = [0; HEADER];
        header[..4].copy_from_slice(&length.to_be_bytes());
        header[8] = SKIPPED;
        Some(header)
    }

    /// The stream of the frame that is incomplete, and how many bytes of it are kept. `None` if its header is incomplete, or if
    /// it is skipped.
    pub fn incomplete(&self) -> Option<(u32, u64)> {
        Some((Head::of(&self.partial)?.stream, self.partial.len() as u64))
    }

    /// Skips the frame that is incomplete. Has no effect if [`Self::incomplete`] returns none.
    pub fn give_up(&mut self) {
        if let Some(head) = Head::of(&self.partial) {
            self.skipped = self.partial.len() as u64;
            self.left = HEADER as u64 + u64::from(head.length) - self.skipped;
            self.partial = Vec::new();
        }
    }

    /// The frames that were too long since the last call, with their positions as in [`Self::push`].
    pub fn take_refused(&mut self) -> Vec<(u64, TooLong)> {
        std::mem::take(&mut self.refused)
    }
}

/// A parsed header.
struct Head {
    length: u32,
    stream: u32,
    kind: u8,
}

impl Head {
    /// Parses a header. `None` if it is incomplete.
    fn of(bytes: &[u8]) -> Option<Self> {
        let bytes: &[u8; HEADER] = bytes.first_chunk()?;
        let [a, b, c, d, e, f, g, h, kind, _] = *bytes;
        let (length, stream) = (u32::from_be_bytes([a, b, c, d]), u32::from_be_bytes([e, f, g, h]));
        Some(Self { length, stream, kind })
    }

    fn is_kept(&self) -> bool {
        self.kind != SKIPPED && self.length as usize <= MESSAGE_LENGTH_MAX
    }
}

/// The bytes of a frame, for tests.
#[cfg(test)]
pub(crate) fn frame(stream: u32, kind: u8, rest: &[u8]) -> Vec<u8> {
    let mut bytes = u32::try_from(rest.len()).unwrap().to_be_bytes().to_vec();
    bytes.extend(stream.to_be_bytes());
    bytes.extend([kind, 0]);
    bytes.extend(rest);
    bytes
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn frames_are_whole_whatever_the_sizes_of_their_pieces() {
        let sent = [frame(1, 1, b"one"), frame(3, 1, b""), frame(5, 3, &[7; 300])];
        let bytes = sent.concat();
        for size in [1, 2, 9, 10, 11, 50, bytes.len()] {
            let mut assembler = Assembler::default();
            let got: Vec<Frame> =
                bytes.chunks(size).flat_map(|piece| assembler.push(piece)).map(|(_, frame)| frame).collect();
            assert_eq!(got.iter().map(|frame| frame.bytes.clone()).collect::<Vec<_>>(), sent, "by {size}");
            assert_eq!(got.iter().map(Frame::stream).collect::<Vec<_>>(), [1, 3, 5]);
            assert_eq!((got[0].is_request(), got[2].is_request(), assembler.pending()), (true, false, 0));
        }
    }

    #[test]
    fn a_frame_that_is_too_long_is_skipped_and_reported_and_the_next_one_found() {
        let long = MESSAGE_LENGTH_MAX + 1;
        let sent = [frame(1, 1, b"one"), frame(3, 1, &vec![7; long]), frame(5, 1, b"two"), frame(7, 1, b"")];
        let bytes = sent.concat();
        for size in [7, 4096, bytes.len()] {
            let mut assembler = Assembler::default();
            let (mut streams, mut begun, mut come) = (Vec::new(), 0, 0);
            for piece in bytes.chunks(size) {
                for (at, frame) in assembler.push(piece) {
                    let at = usize::try_from(begun + at).unwrap();
                    assert_eq!(bytes[at..at + frame.bytes.len()], frame.bytes, "by {size}");
                    streams.push(frame.stream());
                }
                come += piece.len() as u64;
                begun = come - assembler.pending();
                assert!(assembler.partial.len() < 100);
            }
            assert_eq!(streams, [1, 5, 7], "by {size}");
            let refused = assembler.take_refused();
            assert_eq!(refused[0].1, TooLong { stream: 3, length: long as u32 });
            assert_eq!(refused.len(), 1);
            assert_eq!(assembler.pending(), 0);
        }
    }

    #[test]
    fn the_skipping_of_a_frame_continues_from_its_shortened_header() {
        let mut bytes = frame(1, 1, &vec![7; MESSAGE_LENGTH_MAX + 100]);
        let (head, rest) = bytes.split_at_mut(5000);
        let mut first = Assembler::default();
        assert!(first.push(head).is_empty() && first.skips(rest.len()) && !first.skips(rest.len() + 1));
        let header = first.shorten().unwrap();
        assert_eq!((first.take_refused().len(), first.pending()), (1, HEADER as u64));
        let mut second = Assembler::default();
        assert!(second.push(&header).is_empty() && second.push(rest).is_empty());
        let next = frame(3, 1, b"next");
        assert_eq!(second.push(&next), [(0, Frame { bytes: next.clone() })]);
        assert_eq!((second.take_refused(), second.shorten()), (Vec::new(), None));
    }

    #[test]
    fn a_replayed_request_says_so_and_is_the_same_otherwise() {
        let first = Frame { bytes: frame(7, 1, &vec![7; MESSAGE_LENGTH_MAX]) };
        let again = first.clone().replayed();
        let mut assembler = Assembler::default();
        assert_eq!(assembler.push(&again.bytes), [(0, again.clone())], "it is not too long");
        assert!(again.is_replayed() && !first.is_replayed() && again.stream() == 7);
        assert_eq!(again.bytes[HEADER..], first.bytes[HEADER..]);
    }
}
