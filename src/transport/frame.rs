//! Frames of the ttrpc protocol, as far as a connection has to know them (pure).
//!
//! A frame is a header of ten bytes (length of the rest and stream, both big endian, then type and
//! flags) and the rest. See PROTOCOL.md of containerd's ttrpc.

use protobuf::Message;
use ttrpc::proto::{
    KeyValue, MESSAGE_HEADER_LENGTH, MESSAGE_LENGTH_MAX, MESSAGE_TYPE_REQUEST, MESSAGE_TYPE_RESPONSE,
};

/// The length of a header.
pub const HEADER: usize = MESSAGE_HEADER_LENGTH;

/// In the metadata of a request that was read by a daemon before this one: it may have been carried
/// out in part, or in full.
pub const REPLAYED: &str = "containerd-shim-systemd-v1.replayed";

/// What can be wrong with what a client sends.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("a frame of {0} bytes is too long")]
pub struct TooLong(usize);

/// A whole frame.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Frame {
    /// Header and rest.
    pub bytes: Vec<u8>,
}

impl Frame {
    /// The stream it belongs to: for Task calls, the call.
    pub fn stream(&self) -> u32 {
        self.bytes.get(4..8).map_or(0, |bytes| u32::from_be_bytes([bytes[0], bytes[1], bytes[2], bytes[3]]))
    }

    /// It begins a call.
    pub fn is_request(&self) -> bool {
        self.bytes.get(8) == Some(&MESSAGE_TYPE_REQUEST)
    }

    /// What it asks for; nothing if it is no request.
    pub fn request(&self) -> Option<ttrpc::Request> {
        let rest = self.bytes.get(HEADER..).filter(|_| self.is_request())?;
        ttrpc::Request::parse_from_bytes(rest).ok()
    }

    /// A response that is an error.
    pub fn refusal(stream: u32, code: ttrpc::Code, reason: String) -> Self {
        let mut response = ttrpc::Response::new();
        response.set_status(ttrpc::get_status(code, reason));
        // Two fields of known types: nothing that can't be encoded.
        let rest = response.write_to_bytes().unwrap_or_default();
        let mut bytes = u32::try_from(rest.len()).unwrap_or(u32::MAX).to_be_bytes().to_vec();
        bytes.extend(stream.to_be_bytes());
        bytes.extend([MESSAGE_TYPE_RESPONSE, 0]);
        bytes.extend(rest);
        Self { bytes }
    }

    /// The same request, marked as one that was read before.
    pub fn replayed(self) -> Self {
        let Some(Ok(mut request)) = self.bytes.get(HEADER..).map(ttrpc::Request::parse_from_bytes) else {
            return self;
        };
        request.metadata.push(KeyValue { key: REPLAYED.to_owned(), ..KeyValue::default() });
        let Ok(rest) = request.write_to_bytes() else {
            return self;
        };
        let length = u32::try_from(rest.len()).unwrap_or(u32::MAX);
        let mut bytes = length.to_be_bytes().to_vec();
        bytes.extend_from_slice(&self.bytes[4..HEADER]);
        bytes.extend(rest);
        Self { bytes }
    }
}

/// Puts frames together from pieces of any size.
#[derive(Debug, Default)]
pub struct Assembler {
    partial: Vec<u8>,
}

impl Assembler {
    /// Takes a piece in; returns the frames that are whole now.
    ///
    /// # Errors
    /// [`TooLong`]; nothing more should be read then.
    pub fn push(&mut self, piece: &[u8]) -> Result<Vec<Frame>, TooLong> {
        self.partial.extend_from_slice(piece);
        let mut frames = Vec::new();
        let mut rest = self.partial.as_slice();
        while let Some(length) = length(rest)? {
            let Some((frame, after)) = rest.split_at_checked(length) else {
                break;
            };
            frames.push(Frame { bytes: frame.to_vec() });
            rest = after;
        }
        let taken = self.partial.len() - rest.len();
        self.partial.drain(..taken);
        if self.partial.is_empty() {
            // A large one is not kept for the sake of the next.
            self.partial = Vec::new();
        }
        Ok(frames)
    }

    /// How much of a frame is here.
    pub fn pending(&self) -> usize {
        self.partial.len()
    }
}

/// The length of the frame that begins here, header included; nothing if that can't be told yet.
fn length(bytes: &[u8]) -> Result<Option<usize>, TooLong> {
    let Some(length) = bytes.get(..HEADER) else {
        return Ok(None);
    };
    let length = u32::from_be_bytes([length[0], length[1], length[2], length[3]]) as usize;
    if length > MESSAGE_LENGTH_MAX { Err(TooLong(length)) } else { Ok(Some(HEADER + length)) }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn frame(stream: u32, kind: u8, rest: &[u8]) -> Vec<u8> {
        let mut bytes = u32::try_from(rest.len()).unwrap().to_be_bytes().to_vec();
        bytes.extend(stream.to_be_bytes());
        bytes.extend([kind, 0]);
        bytes.extend(rest);
        bytes
    }

    #[test]
    fn frames_come_out_whole_however_they_come_in() {
        let sent = [frame(1, 1, b"one"), frame(3, 1, b""), frame(5, 3, &[7; 300])];
        let bytes = sent.concat();
        for size in [1, 2, 9, 10, 11, 50, bytes.len()] {
            let mut assembler = Assembler::default();
            let got: Vec<Frame> =
                bytes.chunks(size).flat_map(|piece| assembler.push(piece).unwrap()).collect();
            assert_eq!(got.iter().map(|frame| frame.bytes.clone()).collect::<Vec<_>>(), sent, "by {size}");
            assert_eq!(got.iter().map(Frame::stream).collect::<Vec<_>>(), [1, 3, 5]);
            assert_eq!((got[0].is_request(), got[2].is_request(), assembler.pending()), (true, false, 0));
        }
    }

    #[test]
    fn a_frame_that_nobody_accepts_is_refused_at_its_header() {
        let mut bytes = frame(1, 1, b"");
        bytes[..4].copy_from_slice(&u32::MAX.to_be_bytes());
        assert_eq!(Assembler::default().push(&bytes), Err(TooLong(u32::MAX as usize)));
    }

    #[test]
    fn a_replayed_request_says_so_and_is_the_same_otherwise() {
        let request = ttrpc::Request { service: "s".to_owned(), payload: vec![1, 2], ..Default::default() };
        let first = Frame { bytes: frame(7, 1, &request.write_to_bytes().unwrap()) };
        let again = first.replayed();
        let mut assembler = Assembler::default();
        assert_eq!(
            assembler.push(&again.bytes).unwrap(),
            std::slice::from_ref(&again),
            "its length is right"
        );
        let found = ttrpc::Request::parse_from_bytes(&again.bytes[HEADER..]).unwrap();
        assert_eq!((found.service, found.payload, again.stream()), (request.service, request.payload, 7));
        assert_eq!(found.metadata[0].key, REPLAYED);
        let nonsense = Frame { bytes: frame(9, 1, &[0xff; 8]) };
        assert_eq!(nonsense.clone().replayed(), nonsense);
    }
}
