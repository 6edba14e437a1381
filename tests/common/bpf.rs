//! Programs that the kernel runs when a process of a cgroup opens a device, as GPU and VM agents change them.

#![allow(unsafe_code)] // bpf(2) has no safe binding in our dependencies

use std::fs::File;
use std::io;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
use std::path::Path;

use nix::libc;

// <linux/bpf.h>
const PROG_DETACH: libc::c_int = 9;
const PROG_GET_FD_BY_ID: libc::c_int = 13;
const PROG_QUERY: libc::c_int = 16;
const CGROUP_DEVICE: u32 = 6;

/// `query` of `union bpf_attr`.
#[repr(C)]
struct Query {
    target_fd: u32,
    attach_type: u32,
    query_flags: u32,
    attach_flags: u32,
    programs: u64,
    count: u32,
    unused: u32,
}

/// The anonymous part of `union bpf_attr` for attaching and detaching.
#[repr(C)]
struct Attachment {
    target_fd: u32,
    program_fd: u32,
    attach_type: u32,
    flags: u32,
}

/// The part of `union bpf_attr` that names an object by its number.
#[repr(C)]
struct ById {
    id: u32,
    next: u32,
    flags: u32,
}

fn bpf<T>(command: libc::c_int, attributes: &mut T) -> io::Result<i32> {
    // SAFETY: the kernel reads and writes no more than the size in the call, and the attributes live that long.
    let result = unsafe {
        libc::syscall(libc::SYS_bpf, command, std::ptr::from_mut(attributes), size_of::<T>() as libc::c_uint)
    };
    if result < 0 { Err(io::Error::last_os_error()) } else { Ok(result as i32) }
}

fn number(file: &impl AsRawFd) -> u32 {
    u32::try_from(file.as_raw_fd()).expect("a descriptor is not negative")
}

/// Removes the device programs of a cgroup, but not those of the cgroups above it. Returns how many programs it removed.
pub fn allow_all_devices(cgroup: &Path) -> usize {
    let directory = File::open(cgroup).unwrap_or_else(|error| panic!("{}: {error}", cgroup.display()));
    let mut ids = [0_u32; 64];
    let mut query = Query {
        target_fd: number(&directory),
        attach_type: CGROUP_DEVICE,
        query_flags: 0,
        attach_flags: 0,
        programs: ids.as_mut_ptr() as u64,
        count: 64,
        unused: 0,
    };
    bpf(PROG_QUERY, &mut query).expect("list the device programs of a cgroup");
    let found = &ids[..query.count as usize];
    for id in found {
        let fd = bpf(PROG_GET_FD_BY_ID, &mut ById { id: *id, next: 0, flags: 0 }).expect("open a program");
        // SAFETY: the kernel has just opened it for this process.
        let program = unsafe { OwnedFd::from_raw_fd(fd) };
        let mut attachment = Attachment {
            target_fd: number(&directory),
            program_fd: number(&program),
            attach_type: CGROUP_DEVICE,
            flags: 0,
        };
        bpf(PROG_DETACH, &mut attachment).expect("detach a program");
    }
    found.len()
}
