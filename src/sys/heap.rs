//! The memory that this process has freed, and that glibc keeps for later.

#[cfg(target_env = "gnu")]
use nix::libc;

/// How much freed memory may stay at the end of a heap, in bytes. This is glibc's default at the start of a process.
#[cfg(target_env = "gnu")]
const UNUSED: i32 = 128 << 10;

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

/// Returns to the system the memory that this process has freed. Without this call, glibc keeps the memory that many
/// simultaneous calls needed: by itself, it returns only the end of each heap.
///
/// Takes less than a millisecond for each few MiB, during which other threads wait if they allocate.
pub fn return_unused_memory() {
    #[cfg(target_env = "gnu")]
    // SAFETY: the function is thread-safe (malloc_trim(3)), and frees no memory that is in use.
    unsafe {
        libc::malloc_trim(0);
    }
}
