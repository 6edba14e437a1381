//! Trees of processes: finds and kills all descendants of a process.

use std::collections::HashMap;
use std::os::fd::OwnedFd;
use std::time::{Duration, Instant};
use std::{fs, io};

use super::{ends_within, pidfd_open, pidfd_send_signal};

const SIGKILL: u32 = nix::libc::SIGKILL as u32;

/// A process as /proc/PID/stat shows it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Stat {
    pid: u32,
    parent: u32,
    /// It has ended, and its parent has not reaped it.
    is_dead: bool,
    /// When it started, in ticks since the boot. Together with the pid this identifies a process.
    started: u64,
}

impl Stat {
    /// The fields follow the command's name, which is in parentheses and may contain any byte (proc_pid_stat(5)).
    fn parse(text: &str) -> Option<Self> {
        let (pid, rest) = text.split_once(' ')?;
        let (_, fields) = rest.rsplit_once(')')?;
        let fields: Vec<&str> = fields.split_whitespace().collect();
        Some(Self {
            pid: pid.parse().ok()?,
            parent: fields.get(1)?.parse().ok()?,
            is_dead: matches!(*fields.first()?, "Z" | "X"),
            started: fields.get(19)?.parse().ok()?,
        })
    }

    fn read(pid: u32) -> Option<Self> {
        Self::parse(&String::from_utf8_lossy(&fs::read(format!("/proc/{pid}/stat")).ok()?))
    }

    /// Kills the process, if it still has this pid. Returns a descriptor that becomes readable when the process has
    /// ended.
    fn kill(self) -> Option<OwnedFd> {
        let process = pidfd_open(self.pid).ok()?;
        let is_same = Self::read(self.pid).is_some_and(|now| now.started == self.started);
        (is_same && pidfd_send_signal(&process, SIGKILL).is_ok()).then_some(process)
    }
}

/// When a process started, in clock ticks since the boot; `None` if there is no such process.
pub fn started(pid: u32) -> Option<u64> {
    Stat::read(pid).map(|process| process.started)
}

/// True if the first thread of a process has ended. Other threads may still run (proc_pid_stat(5) shows the state of
/// the first one). Also true if there is no such process.
pub fn first_thread_has_ended(pid: u32) -> bool {
    Stat::read(pid).is_none_or(|process| process.is_dead)
}

fn all() -> Vec<Stat> {
    let entries = fs::read_dir("/proc").into_iter().flatten().flatten();
    let pids = entries.filter_map(|entry| entry.file_name().to_str()?.parse().ok());
    pids.filter_map(Stat::read).collect()
}

/// The living descendants of a process: parents before their children.
fn descendants(root: u32, all: &[Stat]) -> Vec<Stat> {
    let mut children: HashMap<u32, Vec<Stat>> = HashMap::new();
    for process in all {
        children.entry(process.parent).or_default().push(*process);
    }
    let mut found = Vec::new();
    let mut parents = vec![root];
    while let Some(parent) = parents.pop() {
        // Each process is removed from the map, so the loop ends even if the parents form a circle. They can: /proc is read
        // while processes start and end.
        for child in children.remove(&parent).unwrap_or_default() {
            parents.push(child.pid);
            found.push(child);
        }
    }
    found.retain(|process| !process.is_dead && process.pid != root);
    found
}

/// Kills a child of this process and all its descendants. A process that has detached itself (a daemon that a hook has
/// started) is not found.
pub fn kill(root: u32) {
    let all = all();
    let root_too = all.iter().copied().filter(|process| process.pid == root && !process.is_dead);
    // The parent is killed first, as it could start other processes.
    root_too.chain(descendants(root, &all)).for_each(|process| drop(process.kill()));
}

/// True if a process has a child that has not ended. Reads the files of this process only, unless the kernel lacks
/// CONFIG_PROC_CHILDREN.
pub fn has_living_child(pid: u32) -> bool {
    let lives = |process: Option<Stat>| process.is_some_and(|process| !process.is_dead);
    match children(pid) {
        Ok(children) => children.into_iter().any(|child| lives(Stat::read(child))),
        Err(_) => all().into_iter().any(|process| process.parent == pid && lives(Some(process))),
    }
}

/// The children of all threads of a process, dead ones included.
fn children(pid: u32) -> io::Result<Vec<u32>> {
    let mut found = Vec::new();
    for thread in fs::read_dir(format!("/proc/{pid}/task"))? {
        let thread = thread?.path();
        match fs::read_to_string(thread.join("children")) {
            Ok(text) => found.extend(text.split_whitespace().filter_map(|child| child.parse::<u32>().ok())),
            // Without CONFIG_PROC_CHILDREN, the thread is there, but not the file.
            Err(error) if thread.exists() => return Err(error),
            Err(_) => {}
        }
    }
    Ok(found)
}

/// True if a process reads from a pipe to which one of `others` can write.
pub fn waits_for_one_of(pid: u32, others: &[u32]) -> bool {
    let read = pipes(pid, 0);
    !read.is_empty()
        && others.iter().filter(|other| **other != pid).any(|other| {
            [1, 2].iter().flat_map(|access| pipes(*other, *access)).any(|pipe| read.contains(&pipe))
        })
}

/// The pipes that a process has open, as the kernel names them. `access`: for reading (0), writing (1) or both (2), as in
/// open(2).
fn pipes(pid: u32, access: u32) -> Vec<String> {
    let entries = fs::read_dir(format!("/proc/{pid}/fd")).into_iter().flatten().flatten();
    let pipe = |entry: fs::DirEntry| {
        let target = fs::read_link(entry.path()).ok()?.to_str()?.to_owned();
        let number = entry.file_name();
        let info = fs::read_to_string(format!("/proc/{pid}/fdinfo/{}", number.to_str()?)).ok()?;
        let flags = info.lines().find_map(|line| line.strip_prefix("flags:"))?;
        let flags = u32::from_str_radix(flags.trim(), 8).ok()?;
        (target.starts_with("pipe:") && flags & 3 == access).then_some(target)
    };
    entries.filter_map(pipe).collect()
}

/// Kills all descendants of this process, and waits until they have ended. If this process is a
/// subreaper, none can detach itself. False if some have not ended in time, for example in uninterruptible sleep.
pub fn kill_own_descendants(limit: Duration) -> bool {
    let end = Instant::now() + limit;
    loop {
        let found = descendants(std::process::id(), &all());
        if found.is_empty() {
            return true;
        }
        let ending: Vec<OwnedFd> = found.into_iter().filter_map(Stat::kill).collect();
        for process in &ending {
            let left = end.saturating_duration_since(Instant::now());
            // After an error, the loop checks again.
            let _ = ends_within(process, left);
        }
        if Instant::now() >= end {
            return false;
        }
    }
}

/// A child whose first thread has ended. Another thread stays, and ends the process with this code when the returned pipe is
/// closed.
#[cfg(test)]
pub fn child_without_first_thread(code: i32) -> (u32, OwnedFd) {
    use nix::libc;
    use std::os::fd::AsRawFd;

    extern "C" fn wait_and_exit(argument: *mut libc::c_void) -> *mut libc::c_void {
        let (pipe, code) = (argument as usize as i32 & 0xffff, argument as usize as i32 >> 16);
        // SAFETY: plain system calls. The buffer outlives the call.
        unsafe {
            libc::read(pipe, [0_u8].as_mut_ptr().cast(), 1);
            libc::_exit(code);
        }
    }

    let (reading, writing) = nix::unistd::pipe().unwrap();
    let argument = (code << 16 | reading.as_raw_fd()) as usize as *mut libc::c_void;
    // SAFETY: the child only makes a thread, which needs no lock that a thread of the parent could have held: glibc and musl
    // prepare their own locks for a fork. Both threads only make system calls.
    let pid = unsafe {
        let pid = libc::fork();
        if pid == 0 {
            libc::close(writing.as_raw_fd());
            let mut thread = std::mem::zeroed();
            let made = libc::pthread_create(&raw mut thread, std::ptr::null(), wait_and_exit, argument);
            assert_eq!(made, 0);
            libc::syscall(libc::SYS_exit, 0);
        }
        pid
    };
    let pid = u32::try_from(pid).unwrap();
    while !first_thread_has_ended(pid) {
        std::thread::yield_now();
    }
    (pid, writing)
}

/// A child that has ended with this code, and that another process traces until the returned pipe is closed.
#[cfg(test)]
pub fn traced_child(code: i32) -> (u32, OwnedFd) {
    use nix::libc;
    use std::os::fd::AsRawFd;

    let (reading, writing) = nix::unistd::pipe().unwrap();
    let (tracer_reading, tracer_writing) = nix::unistd::pipe().unwrap();
    // SAFETY: the child and its own child only make system calls. The buffers outlive the calls.
    let pid = unsafe {
        let pid = libc::fork();
        if pid == 0 {
            // The child of the child may trace it.
            libc::prctl(libc::PR_SET_PTRACER, libc::PR_SET_PTRACER_ANY);
            let traced = libc::getpid();
            if libc::fork() == 0 {
                libc::close(writing.as_raw_fd());
                let seized = libc::ptrace(libc::PTRACE_SEIZE, traced, 0, 0);
                libc::write(tracer_writing.as_raw_fd(), [u8::from(seized == 0)].as_ptr().cast(), 1);
                libc::read(reading.as_raw_fd(), [0_u8].as_mut_ptr().cast(), 1);
                libc::_exit(0);
            }
            let mut seized = [0_u8];
            libc::read(tracer_reading.as_raw_fd(), seized.as_mut_ptr().cast(), 1);
            libc::_exit(if seized == [1] { code } else { 255 });
        }
        pid
    };
    let pid = u32::try_from(pid).unwrap();
    while !first_thread_has_ended(pid) {
        std::thread::yield_now();
    }
    (pid, writing)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::process::Command;

    #[test]
    fn a_command_name_may_contain_anything() {
        let fields = "S 7 1 1 0 -1 4194560 1 2 3 4 5 6 7 8 20 0 1 0 4711 1 2";
        let stat = Stat::parse(&format!("42 (a) R 1 (b) {fields}")).unwrap();
        assert_eq!(stat, Stat { pid: 42, parent: 7, is_dead: false, started: 4711 });
        assert_eq!(Stat::parse("42 (a"), None);
    }

    #[test]
    fn descendants_are_found_at_any_depth_also_where_parents_form_a_circle() {
        let process = |pid, parent| Stat { pid, parent, is_dead: false, started: 0 };
        let all = [process(2, 1), process(3, 2), process(4, 3), process(9, 1), process(1, 4)];
        let mut found: Vec<u32> = descendants(2, &all).into_iter().map(|process| process.pid).collect();
        found.sort_unstable();
        assert_eq!(found, [1, 3, 4, 9]);
    }

    #[test]
    fn only_a_child_that_lives_counts() {
        let line = |child: &mut std::process::Child| {
            std::io::Read::read_exact(child.stdout.as_mut().unwrap(), &mut [0]).unwrap();
        };
        let shell = |script: &str| {
            let mut child =
                Command::new("sh").args(["-c", script]).stdout(std::process::Stdio::piped()).spawn().unwrap();
            line(&mut child);
            child
        };
        let mut with_child = shell("sleep 1000 & echo; wait");
        assert!(has_living_child(with_child.id()));
        // The second program does not reap the child of the first one.
        let mut with_dead_child = shell("sh -c 'echo' & exec sleep 1000");
        let dead = children(with_dead_child.id()).unwrap();
        assert_eq!(dead.len(), 1);
        assert_eq!(ends_within(&pidfd_open(dead[0]).unwrap(), Duration::from_secs(10)), Ok(true));
        assert!(!has_living_child(with_dead_child.id()));
        for child in [&mut with_child, &mut with_dead_child] {
            kill(child.id());
            child.wait().unwrap();
        }
        assert!(!has_living_child(with_child.id()), "there is no such process");
    }

    #[test]
    fn a_tree_is_killed_with_its_root() {
        let mut root = Command::new("sh")
            .args(["-c", "sh -c 'sleep 1000 & echo; wait' & wait"])
            .stdout(std::process::Stdio::piped())
            .spawn()
            .unwrap();
        let mut ready = [0];
        std::io::Read::read_exact(root.stdout.as_mut().unwrap(), &mut ready).unwrap();
        let below = descendants(root.id(), &all());
        assert_eq!(below.len(), 2);
        let watched: Vec<OwnedFd> = below.iter().map(|process| pidfd_open(process.pid).unwrap()).collect();
        kill(root.id());
        assert!(!root.wait().unwrap().success());
        for process in watched {
            let limit = Duration::from_secs(10);
            assert_eq!(ends_within(&process, limit), Ok(true));
        }
    }
}
