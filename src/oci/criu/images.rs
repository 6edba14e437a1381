//! Checks the images of a checkpoint before criu reads them.
//!
//! If a file with pages of memory is too short, the restorer of criu 4.1 reads its end again and again (`restorer.c`, `preadv`
//! returns 0), and writes a line of its log each time: within minutes, the log fills /run.

use std::fs;
use std::path::{Path, PathBuf};

use nix::unistd::{SysconfVar, sysconf};
use protobuf::CodedInputStream;

use crate::files;
use crate::path_error::{PathError, io_error};

/// The image that every checkpoint has.
const INVENTORY: &str = "inventory.img";

/// The first bytes of an image with a map of pages: criu's magic numbers for images, and for this kind.
const MAGIC: [u8; 8] = [0x19, 0x43, 0x56, 0x54, 0x25, 0x40, 0x08, 0x56];

/// The largest map of pages that is checked, in bytes. An entry needs some 15 bytes.
const MAX_MAP: u64 = 64 << 20;

/// The page is in the file with pages (`PE_PRESENT`, pagemap.h).
const PRESENT: u64 = 1 << 2;

/// Why images can't be restored.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// There is no checkpoint.
    #[error("this is no checkpoint of a container: {0}")]
    Missing(#[source] PathError),
    /// An image can't be read.
    #[error("checkpoint: {0}")]
    Io(#[from] PathError),
    /// A part of the memory is missing.
    #[error("checkpoint: {path} is damaged: it has {found} bytes of {expected}")]
    Short {
        /// The file with pages.
        path: PathBuf,
        /// Its size.
        found: u64,
        /// The size of the pages that belong into it.
        expected: u64,
    },
}

/// Checks that a directory has the images of a checkpoint, with all pages of memory. criu checks the rest. OCI runtimes report
/// only which of their own files is missing.
///
/// # Errors
/// [`Error`]
pub fn check(images: &Path) -> Result<(), Error> {
    let inventory = images.join(INVENTORY);
    fs::metadata(&inventory).map_err(io_error("find", &inventory)).map_err(Error::Missing)?;
    let size = sysconf(SysconfVar::PAGE_SIZE)
        .ok()
        .flatten()
        .and_then(|size| u64::try_from(size).ok())
        .unwrap_or(4096);
    for entry in fs::read_dir(images).map_err(io_error("read", images))? {
        let path = entry.map_err(io_error("read", images))?.path();
        let name = path.file_name().unwrap_or_default().to_string_lossy();
        if !name.starts_with("pagemap-") || !name.ends_with(".img") {
            continue;
        }
        let map = files::read_regular(&path, MAX_MAP).map_err(io_error("read", &path))?;
        // criu knows what another format means.
        let Some((id, pages)) = pages(&map) else { continue };
        let path = images.join(format!("pages-{id}.img"));
        let found = fs::metadata(&path).map_err(io_error("find", &path))?.len();
        let expected = pages.saturating_mul(size);
        if found < expected {
            return Err(Error::Short { path, found, expected });
        }
    }
    Ok(())
}

/// The number of the file with pages that a map is about, and how many pages it has. `None` if the map has another format, or is
/// cut off, which criu reports.
fn pages(map: &[u8]) -> Option<(u64, u64)> {
    let mut rest = map.strip_prefix(&MAGIC)?;
    let mut id = None;
    let mut pages = 0_u64;
    while !rest.is_empty() {
        let (length, after) = rest.split_first_chunk()?;
        let (message, after) = after.split_at_checked(usize::try_from(u32::from_le_bytes(*length)).ok()?)?;
        rest = after;
        let fields = numbers(message)?;
        let field = |number: usize| fields.get(number).copied().flatten();
        if id.is_none() {
            // `pagemap_head`
            id = Some(field(1)?);
            continue;
        }
        // `pagemap_entry`: older versions of criu have other fields for the number of pages, and for those of a parent.
        let count = field(5).or_else(|| field(2))?;
        let is_present = field(4).map_or(field(3).unwrap_or_default() == 0, |flags| flags & PRESENT != 0);
        pages = pages.checked_add(if is_present { count } else { 0 })?;
    }
    Some((id?, pages))
}

/// The fields 0 to 5 of a message that has only numbers. The last of several values counts.
fn numbers(message: &[u8]) -> Option<[Option<u64>; 6]> {
    const VARINT: u32 = 0;
    let mut input = CodedInputStream::from_bytes(message);
    let mut fields = [None; 6];
    while let Some(tag) = input.read_raw_tag_or_eof().ok()? {
        if tag & 7 != VARINT {
            return None;
        }
        let value = input.read_uint64().ok()?;
        if let Some(field) = usize::try_from(tag >> 3).ok().and_then(|number| fields.get_mut(number)) {
            *field = Some(value);
        }
    }
    Some(fields)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Of criu 4.1: a shell with 15 pages.
    const MAP: &[u8] = &[
        0x19, 0x43, 0x56, 0x54, 0x25, 0x40, 0x08, 0x56, 0x02, 0, 0, 0, 0x08, 0x01, 0x09, 0, 0, 0, 0x08, 0x80,
        0xa0, 0x80, 0x02, 0x10, 0x01, 0x20, 0x04, 0x0a, 0, 0, 0, 0x08, 0x80, 0xa0, 0x9b, 0xcc, 0x03, 0x10,
        0x0e, 0x20, 0x06,
    ];

    fn with(entry: &[u8]) -> Vec<u8> {
        [&MAP[..14], &[entry.len() as u8, 0, 0, 0], entry].concat()
    }

    #[test]
    fn the_pages_of_a_map_are_counted() {
        assert_eq!(pages(MAP), Some((1, 15)));
        assert_eq!(pages(&MAP[..14]), Some((1, 0)), "a process without pages of its own");
        assert_eq!(pages(&with(&[0x08, 0, 0x10, 3, 0x20, 1])), Some((1, 0)), "pages of a parent");
        assert_eq!(pages(&with(&[0x08, 0, 0x10, 3, 0x18, 1])), Some((1, 0)), "pages of a parent, long ago");
        assert_eq!(pages(&with(&[0x08, 0, 0x10, 3])), Some((1, 3)), "long ago");
        assert_eq!(pages(&with(&[0x08, 0, 0x20, 4, 0x28, 7])), Some((1, 7)), "a newer criu");
        assert_eq!(
            pages(&with(&[0x30, 5, 0x08, 0, 0x10, 9, 0x10, 3])),
            Some((1, 3)),
            "the last value counts"
        );
        let two = [
            with(&[0x08, 0, 0x10, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0x01]),
            MAP[14..].to_vec(),
        ];
        for odd in [
            &MAP[..7],
            &MAP[..10],
            &MAP[..30],
            &with(&[0x0a, 0]),
            &with(&[0x08]),
            &with(&[]),
            &two.concat(),
            b"x",
        ] {
            assert_eq!(pages(odd), None, "{odd:?}");
        }
    }

    #[test]
    fn images_without_all_pages_are_refused_by_name() {
        let dir = tempfile::tempdir().unwrap();
        let reason = || check(dir.path()).err().map(|error| error.to_string());
        assert!(reason().unwrap().starts_with("this is no checkpoint of a container: can't find "));
        fs::write(dir.path().join("inventory.img"), "").unwrap();
        assert_eq!(reason(), None, "criu checks the rest");
        fs::write(dir.path().join("pagemap-7.img"), MAP).unwrap();
        let path = dir.path().join("pages-1.img");
        assert!(reason().unwrap().starts_with(&format!("checkpoint: can't find {}: ", path.display())));
        let size = u64::try_from(sysconf(SysconfVar::PAGE_SIZE).unwrap().unwrap()).unwrap();
        let file = fs::File::create(&path).unwrap();
        file.set_len(15 * size - 1).unwrap();
        let expected = format!(
            "checkpoint: {} is damaged: it has {} bytes of {}",
            path.display(),
            15 * size - 1,
            15 * size
        );
        assert_eq!(reason().unwrap(), expected);
        file.set_len(15 * size).unwrap();
        assert_eq!(reason(), None);
    }
}
