//! The processes of a cgroup and of all cgroups below it.
//!
//! A container that may create cgroups can create any number of them, at any depth. So the walk does not recurse, builds no
//! paths, and has one descriptor open at a time.

use std::collections::VecDeque;
use std::ffi::{CStr, CString};
use std::fs::File;
use std::io::{self, Read};
use std::os::fd::{AsFd, OwnedFd};
use std::path::Path;

use nix::dir::{Dir, Type};
use nix::errno::Errno;
use nix::fcntl::{OFlag, openat};
use nix::sys::stat::Mode;

use crate::path_error::io_error;

use super::{Error, dir, is_gone};

/// The largest number of cgroups in a walk. More would block its thread for seconds.
const MAX_CGROUPS: usize = 100_000;

/// Every process in a cgroup and below it, none if the cgroup does not exist. Reads up to 100,000 cgroups: must not run on
/// the async runtime.
///
/// # Errors
/// A cgroup can't be read, or there are more than [`MAX_CGROUPS`] cgroups.
pub fn processes(cgroup: &Path) -> Result<Vec<u32>, Error> {
    let top = dir(cgroup);
    Ok(walk(&top, MAX_CGROUPS).map_err(io_error("list the processes of", &top))?)
}

fn walk(top: &Path, most: usize) -> io::Result<Vec<u32>> {
    let mut pids = Vec::new();
    let mut at: OwnedFd = match File::open(top) {
        Ok(file) => file.into(),
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(pids),
        Err(error) => return Err(error),
    };
    let mut found = 1;
    read_processes(&at, &mut pids)?;
    // The unvisited children of the current cgroup and of each cgroup above it.
    let mut levels = vec![children(&at, &mut found, most)?];
    while let Some(left) = levels.last_mut() {
        match left.pop_front() {
            Some(child) => match open(&at, &child, DIRECTORY) {
                Ok(below) => {
                    at = below;
                    read_processes(&at, &mut pids)?;
                    levels.push(children(&at, &mut found, most)?);
                }
                Err(error) if is_gone(&error) => {}
                Err(error) => return Err(error),
            },
            None => {
                levels.pop();
                if !levels.is_empty() {
                    // The parent is the cgroup that the walk came from, as cgroups are never moved.
                    at = open(&at, c"..", DIRECTORY)?;
                }
            }
        }
    }
    Ok(pids)
}

const DIRECTORY: OFlag = OFlag::O_RDONLY.union(OFlag::O_DIRECTORY).union(OFlag::O_CLOEXEC);

fn open(dir: &OwnedFd, name: &CStr, flags: OFlag) -> io::Result<OwnedFd> {
    Ok(openat(dir, name, flags, Mode::empty())?)
}

fn read_processes(cgroup: &OwnedFd, pids: &mut Vec<u32>) -> io::Result<()> {
    let mut text = String::new();
    let read = open(cgroup, c"cgroup.procs", OFlag::O_RDONLY | OFlag::O_CLOEXEC)
        .and_then(|file| File::from(file).read_to_string(&mut text));
    match read {
        Ok(_) => pids.extend(text.lines().filter_map(|line| line.parse::<u32>().ok())),
        // The processes of a threaded cgroup are listed above it. A removed cgroup has none.
        Err(error) if is_gone(&error) || error.raw_os_error() == Some(Errno::EOPNOTSUPP as i32) => {}
        Err(error) => return Err(error),
    }
    Ok(())
}

fn children(cgroup: &OwnedFd, found: &mut usize, most: usize) -> io::Result<VecDeque<CString>> {
    let listed = cgroup.as_fd().try_clone_to_owned()?;
    let mut names = VecDeque::new();
    for entry in Dir::from_fd(listed)?.iter() {
        let entry = match entry.map_err(io::Error::from) {
            Ok(entry) => entry,
            Err(error) if is_gone(&error) => break,
            Err(error) => return Err(error),
        };
        let name = entry.file_name();
        if entry.file_type() == Some(Type::Directory) && name != c"." && name != c".." {
            *found += 1;
            if *found > most {
                return Err(io::Error::other(format!("there are more than {most} cgroups")));
            }
            names.push_back(name.to_owned());
        }
    }
    Ok(names)
}

#[cfg(test)]
mod tests {
    use super::*;
    use nix::sys::stat::mkdirat;
    use tempfile::TempDir;

    struct Scratch(TempDir);

    impl Scratch {
        fn new() -> Self {
            Self(tempfile::tempdir().unwrap())
        }

        fn path(&self) -> &Path {
            self.0.path()
        }

        fn add(&self, path: &str, pids: &str) {
            std::fs::create_dir_all(self.path().join(path)).unwrap();
            std::fs::write(self.path().join(path).join("cgroup.procs"), pids).unwrap();
        }
    }

    #[test]
    fn every_process_below_is_found() {
        let scratch = Scratch::new();
        for (path, pids) in [("", "1\n2\n"), ("a", "3\n"), ("a/x", "4\n"), ("a/y", ""), ("b/z", "5\n")] {
            scratch.add(path, pids);
        }
        let mut found = walk(scratch.path(), 7).unwrap();
        found.sort_unstable();
        assert_eq!(found, [1, 2, 3, 4, 5]);
        assert!(walk(scratch.path(), 5).unwrap_err().to_string().contains("more than 5 cgroups"));
        assert_eq!(walk(&scratch.path().join("gone"), 7).unwrap(), [0; 0]);
    }

    #[test]
    fn a_tree_deeper_than_a_path_is_long_is_walked_on_a_small_stack() {
        const DEPTH: usize = 1200;
        let scratch = Scratch::new();
        let mut at: OwnedFd = File::open(scratch.path()).unwrap().into();
        for _ in 0..DEPTH {
            mkdirat(&at, c"deeper", Mode::S_IRWXU).unwrap();
            at = openat(&at, c"deeper", DIRECTORY, Mode::empty()).unwrap();
        }
        let flags = OFlag::O_WRONLY | OFlag::O_CREAT;
        let file = openat(&at, c"cgroup.procs", flags, Mode::S_IRWXU).unwrap();
        io::Write::write_all(&mut File::from(file), b"7\n").unwrap();
        let path = scratch.path().to_owned();
        let walker = std::thread::Builder::new().stack_size(128 << 10);
        assert_eq!(walker.spawn(move || walk(&path, MAX_CGROUPS).unwrap()).unwrap().join().unwrap(), [7]);
    }
}
