//! Records what this process works on when it crashes.
//!
//! A panic (the release build aborts), an overflow of the stack and a fault of the processor raise a
//! signal in the thread that caused them. The handler appends to a file the number that this thread has set with
//! [`set_subject`], and lets the signal end the process. It does nothing else: only few functions may be called in a
//! signal handler (signal-safety(7)).
//!
//! If SIGABRT comes from another process, which is how systemd's watchdog ends a process that hangs, the handler notes
//! the subject of each step ([`Step`]) that has run for longer than the limit of [`set_hang_limit`].

use std::cell::Cell;
use std::fs::File;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::os::unix::fs::FileExt;
use std::sync::OnceLock;
use std::sync::atomic::{AtomicBool, AtomicI32, AtomicU64, Ordering};
use std::time::Duration;

use nix::errno::Errno;
use nix::libc;
use nix::sys::signal::{SaFlags, SigAction, SigHandler, SigSet, Signal, raise, sigaction};

/// `si_code` of a signal that a thread has sent to itself with tgkill(2), as abort(3) does
/// (`asm-generic/siginfo.h`).
const SI_TKILL: libc::c_int = -6;

/// The size of a number in the file.
pub const ENTRY: u64 = 8;

const SIGNALS: [Signal; 6] =
    [Signal::SIGABRT, Signal::SIGSEGV, Signal::SIGBUS, Signal::SIGILL, Signal::SIGFPE, Signal::SIGSYS];

thread_local! {
    /// Has a constant initial value and no destructor: reading it never allocates, so a signal handler may read it.
    static SUBJECT: Cell<u64> = const { Cell::new(0) };
    /// The id of this thread.
    static THREAD: i32 = nix::unistd::gettid().as_raw();
}

/// The file, and the earlier handlers of the signals. [`NEXT`] is the position of the next number in the file.
static NOTES: OnceLock<Notes> = OnceLock::new();
static NEXT: AtomicU64 = AtomicU64::new(0);
static NOTED: AtomicBool = AtomicBool::new(false);

/// A step that has run for this long, in milliseconds, hangs. Without a limit, no step hangs.
static HANG_LIMIT: AtomicU64 = AtomicU64::new(u64::MAX);

/// The places for running steps: one for each thread of the async runtime, and some for blocking work. A step that finds
/// no free place is not watched.
static STEPS: [Place; 8] = [const {
    Place { subject: AtomicU64::new(0), since: AtomicU64::new(u64::MAX), thread: AtomicI32::new(0) }
}; 8];

struct Place {
    /// Zero if the place is free.
    subject: AtomicU64,
    /// When the step began, in milliseconds of CLOCK_MONOTONIC; `u64::MAX` if the place is free or was just taken.
    since: AtomicU64,
    thread: AtomicI32,
}

/// A running step.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Running {
    pub subject: u64,
    /// When it began, in milliseconds of CLOCK_MONOTONIC.
    since: u64,
    /// The thread that runs it (gettid(2)).
    thread: i32,
}

impl Running {
    /// How long the thread has waited for a processor since it began, as far as the kernel knows (`schedstat` in proc(5)).
    pub fn waited(&self) -> Duration {
        let text = std::fs::read_to_string(format!("/proc/self/task/{}/schedstat", self.thread));
        let waited = text.ok().and_then(|text| text.split_whitespace().nth(1)?.parse().ok());
        Duration::from_nanos(waited.unwrap_or_default())
    }
}

impl Place {
    fn step(&self) -> Option<Running> {
        let since = self.since.load(Ordering::Acquire);
        let subject = self.subject.load(Ordering::Acquire);
        let thread = self.thread.load(Ordering::Acquire);
        // The numbers belong together only if no other step has taken the place meanwhile.
        let is_same = self.since.load(Ordering::Acquire) == since;
        (is_same && subject != 0 && since != u64::MAX).then_some(Running { subject, since, thread })
    }
}

/// Marks work on a subject that must not occupy its thread for long, such as one poll of a future. The work ends when this
/// is dropped.
#[derive(Debug)]
pub struct Step(Option<usize>);

impl Step {
    /// Begins a step. Zero stands for no subject, and such a step is not watched.
    pub fn begin(subject: u64) -> Self {
        if subject == 0 {
            return Self(None);
        }
        let place = STEPS.iter().position(|place| {
            place.subject.compare_exchange(0, subject, Ordering::AcqRel, Ordering::Relaxed).is_ok()
        });
        if let Some(place) = place {
            STEPS[place].thread.store(THREAD.with(|thread| *thread), Ordering::Release);
            STEPS[place].since.store(now(), Ordering::Release);
        }
        Self(place)
    }
}

impl Drop for Step {
    fn drop(&mut self) {
        if let Some(place) = self.0 {
            STEPS[place].since.store(u64::MAX, Ordering::Release);
            STEPS[place].subject.store(0, Ordering::Release);
        }
    }
}

/// The running steps.
pub fn steps() -> Vec<Running> {
    STEPS.iter().filter_map(Place::step).collect()
}

/// Sets how long a step may run. A step that has run for longer is noted when SIGABRT arrives from another process.
pub fn set_hang_limit(limit: Duration) {
    HANG_LIMIT.store(u64::try_from(limit.as_millis()).unwrap_or(u64::MAX), Ordering::Relaxed);
}

/// Milliseconds of CLOCK_MONOTONIC. Safe in a signal handler.
fn now() -> u64 {
    let mut time = libc::timespec { tv_sec: 0, tv_nsec: 0 };
    // SAFETY: the pointer is valid; the kernel writes the time to it.
    let _ = unsafe { libc::clock_gettime(libc::CLOCK_MONOTONIC_COARSE, &raw mut time) };
    time.tv_sec as u64 * 1000 + time.tv_nsec as u64 / 1_000_000
}

struct Notes {
    file: OwnedFd,
    earlier: Vec<(Signal, SigAction)>,
}

/// Sets the subject that this thread works on; zero stands for no subject. Returns the earlier subject.
pub fn set_subject(subject: u64) -> u64 {
    SUBJECT.replace(subject)
}

/// The subject that this thread works on; zero for none.
pub fn subject() -> u64 {
    SUBJECT.get()
}

/// Installs the handler. Crashes are noted in this file, at the position `next`. Only the first call sets the file.
///
/// # Errors
/// The signals can't be handled.
pub fn note_in(file: &File, next: u64) -> std::io::Result<()> {
    NEXT.store(next, Ordering::Relaxed);
    let file = file.as_fd().try_clone_to_owned()?;
    let action = SigAction::new(
        SigHandler::SigAction(crashed),
        // The handler runs on the alternate stack that the standard library gives every thread: the usual stack may have
        // overflowed.
        SaFlags::SA_SIGINFO | SaFlags::SA_ONSTACK | SaFlags::SA_NODEFER,
        SigSet::empty(),
    );
    let mut earlier = Vec::new();
    for signal in SIGNALS {
        // SAFETY: the handler only makes calls that are safe in a signal handler: it reads constants, atomics
        // and a thread-local without destructor, and calls pwrite, sigaction and raise.
        earlier.push((signal, unsafe { sigaction(signal, &action) }?));
    }
    // If a signal arrives before this line, the handler has no file, and the signal ends the process as usual.
    drop(NOTES.set(Notes { file, earlier }));
    Ok(())
}

/// Sets the position of the next number, after the file was changed.
pub fn continue_at(next: u64) {
    NEXT.store(next, Ordering::Relaxed);
}

extern "C" fn crashed(number: libc::c_int, info: *mut libc::siginfo_t, _: *mut libc::c_void) {
    let subject = subject();
    // SAFETY: the kernel passes a valid siginfo_t to a handler that was installed with SA_SIGINFO, and
    // `si_pid` is read only where a process has sent the signal, which is when the kernel has filled it in.
    let (is_own, is_sent) = unsafe {
        let code = (*info).si_code;
        (code > 0 || (code == SI_TKILL && (*info).si_pid() == libc::getpid()), code <= 0)
    };
    let notes = NOTES.get();
    if let Some(notes) = notes
        && (is_own || number == libc::SIGABRT)
        && !NOTED.swap(true, Ordering::Relaxed)
    {
        if is_own {
            note(notes, subject);
        } else {
            note_hanging(notes);
        }
    }
    let Ok(signal) = Signal::try_from(number) else {
        return;
    };
    let default = SigAction::new(SigHandler::SigDfl, SaFlags::empty(), SigSet::empty());
    let before = notes.and_then(|notes| notes.earlier.iter().find(|(known, _)| *known == signal));
    let before = before.map_or(default, |(_, action)| *action);
    // SAFETY: restores the earlier handler of the signal. A fault happens again when this handler returns, and abort(3)
    // raises its signal again.
    let _ = unsafe { sigaction(signal, &before) };
    if is_sent {
        let _ = raise(signal);
    }
}

/// Writes a number into the file. Safe in a signal handler.
fn note(notes: &Notes, subject: u64) {
    if subject == 0 {
        return;
    }
    let at = libc::off_t::try_from(NEXT.fetch_add(ENTRY, Ordering::Relaxed)).unwrap_or(0);
    let bytes = subject.to_le_bytes();
    // SAFETY: the descriptor is never closed, and the buffer lives on this stack. An error is ignored: a
    // signal handler can report it to nobody.
    let _ = unsafe { libc::pwrite(notes.file.as_raw_fd(), bytes.as_ptr().cast(), bytes.len(), at) };
}

/// Notes each subject with a step that hangs. Safe in a signal handler.
fn note_hanging(notes: &Notes) {
    let (now, limit) = (now(), HANG_LIMIT.load(Ordering::Relaxed));
    let mut noted = [0; STEPS.len()];
    for (place, index) in STEPS.iter().zip(0..) {
        if let Some(Running { subject, since, .. }) = place.step()
            && now.saturating_sub(since) >= limit
            // Several threads may work on the same request.
            && !noted.contains(&subject)
        {
            noted[index] = subject;
            note(notes, subject);
        }
    }
}

/// Reads the numbers in a file.
///
/// # Errors
/// The file can't be read.
pub fn read(file: &File, most: usize) -> std::io::Result<Vec<u64>> {
    let mut bytes = vec![0; most * ENTRY as usize];
    let mut length = 0;
    while length < bytes.len() {
        match file.read_at(&mut bytes[length..], length as u64) {
            Ok(0) => break,
            Ok(read) => length += read,
            Err(error) if error.raw_os_error() == Some(Errno::EINTR as i32) => {}
            Err(error) => return Err(error),
        }
    }
    let entries = bytes[..length].as_chunks().0.iter().map(|entry| u64::from_le_bytes(*entry));
    Ok(entries.filter(|entry| *entry != 0).collect())
}
