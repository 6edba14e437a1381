//! The first process of a pod's sandbox, a program of its own: `build.rs` compiles it, the shim contains it, and
//! `launch` puts it into the rootfs of a sandbox. It uses neither a library nor the heap, so it needs a few pages.
//!
//! It reaps the processes that the containers of the pod leave to it, and exits with 0 at SIGTERM and SIGINT. Every other
//! signal but SIGKILL and SIGSTOP stays pending: as the first process of a pid namespace it must not end by accident.
//!
//! All signals are blocked and read one after the other, so there is no handler. A seccomp filter allows the system calls of
//! its loop.

#![no_std]
#![no_main]

use core::arch::{asm, global_asm};

/// System call numbers and the value of `AUDIT_ARCH_…` (asm/unistd.h, linux/audit.h).
#[cfg(target_arch = "x86_64")]
mod abi {
    pub const RT_SIGPROCMASK: usize = 14;
    pub const RT_SIGRETURN: usize = 15;
    pub const WAIT4: usize = 61;
    pub const RT_SIGTIMEDWAIT: usize = 128;
    pub const PRCTL: usize = 157;
    pub const RESTART_SYSCALL: usize = 219;
    pub const EXIT_GROUP: usize = 231;
    pub const SECCOMP: usize = 317;
    pub const AUDIT_ARCH: u32 = 0xc000_003e;
}
#[cfg(any(target_arch = "aarch64", target_arch = "riscv64"))]
mod abi {
    pub const EXIT_GROUP: usize = 94;
    pub const RESTART_SYSCALL: usize = 128;
    pub const RT_SIGPROCMASK: usize = 135;
    pub const RT_SIGTIMEDWAIT: usize = 137;
    pub const RT_SIGRETURN: usize = 139;
    pub const PRCTL: usize = 167;
    pub const WAIT4: usize = 260;
    pub const SECCOMP: usize = 277;
    #[cfg(target_arch = "aarch64")]
    pub const AUDIT_ARCH: u32 = 0xc000_00b7;
    #[cfg(target_arch = "riscv64")]
    pub const AUDIT_ARCH: u32 = 0xc000_00f3;
}

#[cfg(target_arch = "x86_64")]
global_asm!(".globl _start", "_start:", "xor ebp, ebp", "and rsp, -16", "call {run}", "ud2", run = sym run);
#[cfg(target_arch = "aarch64")]
global_asm!(".globl _start", "_start:", "mov x29, xzr", "bl {run}", "brk #1", run = sym run);
#[cfg(target_arch = "riscv64")]
global_asm!(".globl _start", "_start:", "call {run}", "ebreak", run = sym run);

/// A system call with up to four arguments. The fifth is 0: prctl(2) checks that arguments without a meaning are.
fn call(number: usize, a: usize, b: usize, c: usize, d: usize) -> isize {
    let result: isize;
    // SAFETY: the callers pass what the kernel expects of the call, and memory that lives for as long as the call.
    #[cfg(target_arch = "x86_64")]
    unsafe {
        asm!("syscall", inlateout("rax") number as isize => result, in("rdi") a, in("rsi") b, in("rdx") c, in("r10") d,
            in("r8") 0usize, lateout("rcx") _, lateout("r11") _, options(nostack));
    }
    // SAFETY: as above.
    #[cfg(target_arch = "aarch64")]
    unsafe {
        asm!("svc 0", in("x8") number, inlateout("x0") a as isize => result, in("x1") b, in("x2") c, in("x3") d,
            in("x4") 0usize, options(nostack));
    }
    // SAFETY: as above.
    #[cfg(target_arch = "riscv64")]
    unsafe {
        asm!("ecall", in("a7") number, inlateout("a0") a as isize => result, in("a1") b, in("a2") c, in("a3") d,
            in("a4") 0usize, options(nostack));
    }
    result
}

const EINTR: isize = -4;
const SIGINT: isize = 2;
const SIGTERM: isize = 15;
const SIGCHLD: isize = 17;
/// The size of a signal set of the kernel, in bytes.
const SET: usize = 8;

const fn bit(signal: isize) -> u64 {
    1 << (signal - 1)
}

extern "C" fn run() -> ! {
    const SIG_BLOCK: usize = 0;
    let all = !0u64;
    call(abi::RT_SIGPROCMASK, SIG_BLOCK, &raw const all as usize, 0, SET);
    confine();
    let taken = bit(SIGINT) | bit(SIGTERM) | bit(SIGCHLD);
    loop {
        match call(abi::RT_SIGTIMEDWAIT, &raw const taken as usize, 0, 0, SET) {
            SIGINT | SIGTERM => exit(0),
            SIGCHLD => reap(),
            // A seccomp profile of the pod refuses the call. A loop of failing calls would use a whole processor.
            error if error < 0 && error != EINTR => exit(1),
            _ => {}
        }
    }
}

fn reap() {
    const WNOHANG: usize = 1;
    const ANY: usize = usize::MAX;
    while call(abi::WAIT4, ANY, 0, WNOHANG, 0) > 0 {}
}

fn exit(code: usize) -> ! {
    loop {
        call(abi::EXIT_GROUP, code, 0, 0, 0);
    }
}

/// An instruction of a seccomp filter (linux/filter.h).
#[repr(C)]
struct Instruction {
    code: u16,
    if_true: u8,
    if_false: u8,
    value: u32,
}

#[repr(C)]
struct Program {
    length: u16,
    instructions: *const Instruction,
}

const fn load(offset: u32) -> Instruction {
    Instruction { code: 0x20, if_true: 0, if_false: 0, value: offset }
}

/// Skips `skipped` instructions if the loaded value is this one.
const fn skip_if(value: u32, skipped: u8) -> Instruction {
    Instruction { code: 0x15, if_true: skipped, if_false: 0, value }
}

const fn result(value: u32) -> Instruction {
    Instruction { code: 0x06, if_true: 0, if_false: 0, value }
}

static FILTER: [Instruction; 11] = {
    const KILL_PROCESS: u32 = 0x8000_0000;
    const ALLOW: u32 = 0x7fff_0000;
    const NUMBER_AT: u32 = 0;
    const ARCH_AT: u32 = 4;
    [
        load(ARCH_AT),
        skip_if(abi::AUDIT_ARCH, 1),
        result(KILL_PROCESS),
        load(NUMBER_AT),
        skip_if(abi::RT_SIGTIMEDWAIT as u32, 5),
        skip_if(abi::WAIT4 as u32, 4),
        skip_if(abi::EXIT_GROUP as u32, 3),
        skip_if(abi::RT_SIGRETURN as u32, 2),
        skip_if(abi::RESTART_SYSCALL as u32, 1),
        result(KILL_PROCESS),
        result(ALLOW),
    ]
};

/// Gives up all system calls but those of the loop. A kernel or a profile that does not allow a filter leaves the process
/// as it is.
fn confine() {
    const PR_SET_NO_NEW_PRIVS: usize = 38;
    const SECCOMP_SET_MODE_FILTER: usize = 1;
    let program = Program { length: FILTER.len() as u16, instructions: FILTER.as_ptr() };
    call(abi::PRCTL, PR_SET_NO_NEW_PRIVS, 1, 0, 0);
    call(abi::SECCOMP, SECCOMP_SET_MODE_FILTER, 0, &raw const program as usize, 0);
}

#[panic_handler]
fn never(_: &core::panic::PanicInfo<'_>) -> ! {
    exit(1)
}
