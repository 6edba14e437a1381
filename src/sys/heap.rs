//! The memory that this process has freed, and that glibc keeps for later.

use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

#[cfg(target_env = "gnu")]
use nix::libc;
use nix::time::{ClockId, clock_gettime};

/// Memory is returned once this process has worked for so long since the last time: a process that does nothing frees nothing.
const WORK: Duration = Duration::from_millis(10);
/// Returning memory takes at most one of so many parts of this process's CPU time. `malloc_trim` looks at every free block, which
/// is slow after a thousand containers, above all if the kernel has reclaimed memory that nobody used for a while.
const PART: u32 = 20;
/// After this time, memory is returned although that takes a larger part.
const LONG: Duration = Duration::from_secs(60);

/// How much freed memory may stay at the end of a heap, in bytes. This is glibc's default at the start of a process.
#[cfg(target_env = "gnu")]
const UNUSED: i32 = 128 << 10;

static LAST: Mutex<Option<Last>> = Mutex::new(None);

/// When memory was returned last.
struct Last {
    at: Instant,
    /// The CPU time of this process until then.
    used: Duration,
    /// The part of it that returning the memory took.
    cost: Duration,
}

impl Last {
    /// Whether returning memory again pays for a process that has used so much CPU time.
    fn pays_again(&self, now: Instant, used: Duration) -> bool {
        let work = used.saturating_sub(self.used);
        let is_long_ago = now.saturating_duration_since(self.at) >= LONG;
        work >= WORK && (is_long_ago || work >= self.cost.saturating_mul(PART))
    }
}

/// Limits the memory that glibc keeps after it is freed. Call it before another thread starts.
///
/// `heaps` is how many heaps (arenas) the threads share, because each heap costs memory.
///
/// By default, glibc raises two limits with each large block that is freed (mallopt(3), `M_MMAP_THRESHOLD`): after a
/// message of 4 MiB, blocks of this size come from a heap, of which 8 MiB stay at the end. `malloc_trim` does not free the
/// end of other heaps than the first. A limit that is set stays as it is.
pub fn limit_unused_memory(heaps: i32) {
    #[cfg(target_env = "gnu")]
    for (parameter, value) in [(libc::M_ARENA_MAX, heaps), (libc::M_TRIM_THRESHOLD, UNUSED)] {
        // SAFETY: the function changes only parameters of the allocator, and no other thread exists (mallopt(3)).
        if unsafe { libc::mallopt(parameter, value) } == 0 {
            tracing::warn!(
                "glibc refuses the parameter {parameter} of malloc, so freed memory can stay in use"
            );
        }
    }
    #[cfg(not(target_env = "gnu"))]
    let _ = heaps;
}

/// Returns to the system the memory that this process has freed, unless this process has worked little since it did so last.
/// Without these calls, glibc keeps the memory that many simultaneous calls needed: by itself, it returns only the end of each
/// heap.
///
/// Takes less than a millisecond for each few MiB, during which other threads wait if they allocate.
pub fn return_unused_memory() {
    // Linux has had this clock since 2.6.12, so the call does not fail.
    let used = || clock_gettime(ClockId::CLOCK_PROCESS_CPUTIME_ID).map_or(Duration::ZERO, Duration::from);
    let before = used();
    let mut last = LAST.lock().unwrap_or_else(PoisonError::into_inner);
    if last.as_ref().is_some_and(|last| !last.pays_again(Instant::now(), before)) {
        return;
    }
    #[cfg(target_env = "gnu")]
    // SAFETY: the function is thread-safe (malloc_trim(3)), and frees no memory that is in use.
    unsafe {
        libc::malloc_trim(0);
    }
    let used = used();
    *last = Some(Last { at: Instant::now(), used, cost: used.saturating_sub(before) });
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn memory_is_returned_once_the_process_has_worked_in_proportion() {
        let (at, second) = (Instant::now(), Duration::from_secs(1));
        let (used, ms) = (3 * second, Duration::from_millis);
        let cheap = Last { at, used, cost: ms(0) };
        let pays_again = |last: &Last, seconds, work| last.pays_again(at + second * seconds, used + work);
        assert!(!pays_again(&cheap, 5, ms(9)) && pays_again(&cheap, 5, ms(10)));
        assert!(!pays_again(&cheap, 3600, ms(9)), "a process that does nothing frees nothing");
        let slow = Last { at, used, cost: ms(40) };
        assert!(!pays_again(&slow, 5, ms(799)) && pays_again(&slow, 5, ms(800)));
        assert!(!pays_again(&slow, 59, ms(10)) && pays_again(&slow, 60, ms(10)));
    }
}
