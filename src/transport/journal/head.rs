//! The heads of a request journal: the positions of its logs. A head lies within one page: it is written whole or not at
//! all.

use std::fs::File;
use std::os::fd::OwnedFd;
use std::os::unix::fs::FileExt;

use super::{Error, IN_BASE, OUT_BASE};

pub(super) const MAGIC: u32 = 0x5353_6431;
/// The version of the layout that is written. The version before is read as well.
pub(super) const VERSION: u32 = 1;

/// The head of the incoming side: magic, version, then `start`, `end` and `settled`.
const IN_HEAD: u64 = 0;
/// The head of the outgoing side: `end`, then the stream of the last response.
const OUT_HEAD: u64 = 64;
/// The positions of the log of incoming bytes.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct Head {
    pub(super) start: u64,
    /// The end of the journaled bytes.
    pub(super) end: u64,
    /// The end of the bytes that were removed from the socket when the head was written.
    pub(super) settled: u64,
}

impl Head {
    /// Writes the incoming head.
    ///
    /// # Errors
    /// [`Error::Io`]
    pub(super) fn write(&self, file: &File) -> Result<(), Error> {
        Ok(file.write_all_at(&self.bytes(), IN_HEAD)?)
    }

    /// Writes both heads at once. The outgoing one is the end of the outgoing bytes, and the stream of the last response.
    ///
    /// # Errors
    /// [`Error::Io`]
    pub(super) fn write_both(&self, file: &File, end: u64, stream: u32) -> Result<(), Error> {
        const OUT: usize = OUT_HEAD as usize;
        let mut bytes = [0; OUT + 12];
        bytes[..32].copy_from_slice(&self.bytes());
        bytes[OUT..OUT + 8].copy_from_slice(&end.to_le_bytes());
        bytes[OUT + 8..].copy_from_slice(&stream.to_le_bytes());
        Ok(file.write_all_at(&bytes, IN_HEAD)?)
    }

    fn bytes(&self) -> [u8; 32] {
        let mut bytes = [0; 32];
        bytes[..4].copy_from_slice(&MAGIC.to_le_bytes());
        bytes[4..8].copy_from_slice(&VERSION.to_le_bytes());
        bytes[8..16].copy_from_slice(&self.start.to_le_bytes());
        bytes[16..24].copy_from_slice(&self.end.to_le_bytes());
        bytes[24..].copy_from_slice(&self.settled.to_le_bytes());
        bytes
    }
}

/// Writes the end of the outgoing bytes.
///
/// # Errors
/// [`Error::Io`]
pub(super) fn write_out_end(file: &File, end: u64) -> Result<(), Error> {
    Ok(file.write_all_at(&end.to_le_bytes(), OUT_HEAD)?)
}

/// True if a kept descriptor begins with the magic number of a journal.
pub fn is_journal(fd: &OwnedFd) -> bool {
    fd.try_clone().is_ok_and(|fd| read_u32(&File::from(fd), IN_HEAD).is_ok_and(|magic| magic == MAGIC))
}

/// The incoming head, the end of the outgoing bytes, and the stream of the last response.
pub(super) fn read(file: &File) -> Result<(Head, u64, Option<u32>), Error> {
    let version = read_u32(file, IN_HEAD + 4)?;
    if read_u32(file, IN_HEAD)? != MAGIC {
        return Err(Error::Malformed);
    }
    if version > VERSION {
        return Err(Error::Newer { found: version });
    }
    let position = |at| read_u64(file, at);
    let head = Head { start: position(8)?, end: position(16)?, settled: position(24)? };
    let out_end = position(OUT_HEAD)?;
    let sane = head.start <= head.settled && head.settled <= head.end && head.end < OUT_BASE - IN_BASE;
    let last = read_u32(file, OUT_HEAD + 8)?;
    if sane { Ok((head, out_end, (last != 0).then_some(last))) } else { Err(Error::Malformed) }
}

fn read_u32(file: &File, at: u64) -> Result<u32, Error> {
    let mut bytes = [0; 4];
    file.read_exact_at(&mut bytes, at)?;
    Ok(u32::from_le_bytes(bytes))
}

fn read_u64(file: &File, at: u64) -> Result<u64, Error> {
    let mut bytes = [0; 8];
    file.read_exact_at(&mut bytes, at)?;
    Ok(u64::from_le_bytes(bytes))
}
