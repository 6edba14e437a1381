//! Files in memory whose content is in huge pages.

use std::fs::File;
use std::num::NonZeroUsize;
use std::os::fd::AsRawFd;
use std::ptr::null_mut;

use nix::errno::Errno;
use nix::libc;

/// The size of a huge page of processors whose pages have 4 KiB. With larger pages, the kernel refuses the request or does
/// nothing.
const HUGE: usize = 2 << 20;

/// madvise(2), Linux 6.1. Not all C libraries have it.
const MADV_COLLAPSE: libc::c_int = 25;

/// Moves the content of a memfd to huge pages. A program that is executed from the file then costs the kernel less: it maps and
/// unmaps many pages in one step. The end of the file, if it does not fill a huge page, stays where it is, so the file needs no
/// more memory than before.
///
/// # Errors
/// The kernel can't do it (before 6.1, or without huge pages), or is short of memory. A part of the content may have moved.
pub fn use_huge_pages(memfd: &File) -> Result<(), Errno> {
    let length =
        memfd.metadata().map_or(0, |found| usize::try_from(found.len()).unwrap_or_default()) / HUGE * HUGE;
    let Some(length) = NonZeroUsize::new(length) else {
        return Ok(());
    };
    let room = Mapping::reserve(length.saturating_add(HUGE))?;
    // Only where address and offset are multiples of the size of a huge page can the kernel use one.
    let begin = room.begin.map_addr(|address| address.next_multiple_of(HUGE));
    let (length, flags) = (length.get(), libc::MAP_SHARED | libc::MAP_FIXED);
    // SAFETY: the range is inside `room`, which nothing else uses, and nothing reads or writes the memory there.
    let mapped = unsafe { libc::mmap(begin, length, libc::PROT_READ, flags, memfd.as_raw_fd(), 0) };
    if mapped == libc::MAP_FAILED {
        return Err(Errno::last());
    }
    // SAFETY: as above. The call does not change the content.
    Errno::result(unsafe { libc::madvise(begin, length, MADV_COLLAPSE) }).map(drop)
}

/// A range of addresses that nothing else uses.
struct Mapping {
    begin: *mut libc::c_void,
    length: usize,
}

impl Mapping {
    fn reserve(length: NonZeroUsize) -> Result<Self, Errno> {
        let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_NORESERVE;
        // SAFETY: the kernel chooses addresses that nothing uses.
        let begin = unsafe { libc::mmap(null_mut(), length.get(), libc::PROT_NONE, flags, -1, 0) };
        if begin == libc::MAP_FAILED {
            return Err(Errno::last());
        }
        Ok(Self { begin, length: length.get() })
    }
}

impl Drop for Mapping {
    fn drop(&mut self) {
        // SAFETY: the range belongs to this value, and nothing refers to the memory there.
        unsafe { libc::munmap(self.begin, self.length) };
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::fs;
    use std::io::Write;

    use nix::sys::memfd::{MFdFlags, memfd_create};

    /// How much of a file's content is in huge pages, in KiB. `None` if the kernel has none.
    fn in_huge_pages(file: &File) -> Option<u64> {
        let length = file.metadata().unwrap().len() as usize;
        let room = Mapping::reserve(NonZeroUsize::new(length + HUGE).unwrap()).unwrap();
        let begin = room.begin.map_addr(|address| address.next_multiple_of(HUGE));
        let flags = libc::MAP_SHARED | libc::MAP_FIXED | libc::MAP_POPULATE;
        // SAFETY: the range is inside `room`.
        let mapped = unsafe { libc::mmap(begin, length, libc::PROT_READ, flags, file.as_raw_fd(), 0) };
        assert_eq!(mapped, begin);
        let maps = fs::read_to_string("/proc/self/smaps").unwrap();
        let own = maps.split_once(&format!("\n{:x}-", begin.addr())).unwrap().1;
        let line = own.lines().find_map(|line| line.strip_prefix("ShmemPmdMapped:"))?;
        line.trim().strip_suffix(" kB")?.parse().ok()
    }

    #[test]
    fn the_content_of_a_file_moves_to_huge_pages_and_stays_the_same() {
        let mut file = File::from(memfd_create("test", MFdFlags::MFD_CLOEXEC).unwrap());
        let content: Vec<u8> = (0..5 * HUGE / 2).map(|byte| (byte / 7) as u8).collect();
        file.write_all(&content).unwrap();
        match use_huge_pages(&file) {
            Ok(()) => assert_eq!(in_huge_pages(&file), Some(2 * (HUGE as u64 >> 10))),
            // The machine has no huge pages, or none that are free.
            Err(errno) => assert!(
                [Errno::EINVAL, Errno::ENOMEM, Errno::EAGAIN, Errno::EBUSY].contains(&errno),
                "{errno}"
            ),
        }
        assert_eq!(fs::read(format!("/proc/self/fd/{}", file.as_raw_fd())).unwrap(), content);
    }

    #[test]
    fn a_small_file_stays_as_it_is() {
        let file = File::from(memfd_create("test", MFdFlags::MFD_CLOEXEC).unwrap());
        assert_eq!(use_huge_pages(&file), Ok(()));
    }
}
