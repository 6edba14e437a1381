//! Quotas that the kernel has for each user.
//!
//! Some things count for the real user of the thread that makes them, for as long as they exist:
//!
//! - descriptors in the queues of Unix sockets. A process may send descriptors until its user has more than the process's
//!   `RLIMIT_NOFILE` in queues (unix(7), `ETOOMANYREFS`).
//! - the memory of pipes: once a user has `fs.pipe-user-pages-soft`, its new pipes are small (pipe(7)).
//! - what an epoll instance watches: beyond `fs.epoll.max_user_watches`, the kernel watches nothing more for any instance of
//!   the user (epoll(7)).
//!
//! In the first two cases, a process with `CAP_SYS_RESOURCE` or `CAP_SYS_ADMIN` may use more, so the daemon always gets what
//! it needs. But root in a container without a user namespace is the same user as the daemon, usually has neither of these
//! capabilities, and would get less. In the last case there is no exception: root in a container can use up what the daemon
//! needs. So the daemon makes what it keeps for a long time [`apart`]: in a thread with another real user.

use std::hash::{BuildHasher, RandomState};
use std::io;
use std::sync::mpsc::{SendError, SyncSender, sync_channel};
use std::sync::{LazyLock, Mutex, PoisonError};

use nix::errno::Errno;
use rustix::process::{Uid, getuid};
use rustix::thread::set_thread_res_uid;
use tokio::runtime::{Builder, Runtime};

/// The user whose quotas are used: a random number above 2,147,483,647, which systemd gives to no user (`docs/UIDS-GIDS.md` of
/// systemd), and for which neither a pod nor a container can ask (runc and Kubernetes refuse it). Root in a container without a
/// user namespace may become any user (`CAP_SETUID`): it could use up the quotas of a number that it knows, and send signals to
/// the thread.
static USER: LazyLock<Uid> = LazyLock::new(|| {
    const FIRST: u32 = 1 << 31;
    // The last number, -1, stands for no user.
    let random = RandomState::new().hash_one(0) % u64::from(u32::MAX - FIRST);
    Uid::from_raw_unchecked(FIRST + u32::try_from(random).unwrap_or_default())
});

/// How much work may wait for the thread.
const QUEUE: usize = 64;

/// The stack size of the thread, in bytes.
const STACK: usize = 128 << 10;

type Work = Box<dyn FnOnce() + Send>;

/// Runs work in a thread whose real user nobody else has, and waits for the result. The effective user, with which the
/// kernel decides on access, is that of the daemon.
///
/// The work must not wait, start a process or change the thread. Without a thread, and in a user namespace that does not have
/// the user's number, the work uses the quotas of the daemon's own user.
///
/// # Errors
/// Those of the work.
pub fn apart<T: Send + 'static>(
    work: impl FnOnce() -> Result<T, Errno> + Send + 'static,
) -> Result<T, Errno> {
    let (done, result) = sync_channel(1);
    let work: Work = Box::new(move || {
        // Can't fail: the receiver waits.
        let _ = done.send(work());
    });
    let rejected = match thread() {
        Ok(thread) => thread.send(work).err().map(|SendError(work)| work),
        Err(error) => {
            tracing::debug!(%error, "no thread for the quotas of another user: {error}");
            Some(work)
        }
    };
    if let Some(work) = rejected {
        work();
    }
    // Without a result, the work has panicked.
    result.recv().unwrap_or(Err(Errno::EIO))
}

/// Builds an async runtime with an epoll instance of that user. Each thread of the runtime calls `begin` first.
///
/// # Errors
/// Those of [`Builder::build`].
///
/// # Panics
/// As [`Builder::build`]: the system allows no further thread.
pub fn runtime(mut builder: Builder, begin: impl Fn() + Send + Sync + 'static) -> io::Result<Runtime> {
    let own = getuid();
    builder.on_thread_start(move || {
        // A thread begins with the user of the thread that has started it. A user may always go back to its effective user.
        if getuid() != own
            && let Err(error) = set_thread_res_uid(own, None, None)
        {
            tracing::error!(%error, "a thread keeps the user whose quotas it was started with: {error}");
        }
        begin();
    });
    let build =
        move || builder.build().map_err(|error| error.raw_os_error().map_or(Errno::EIO, Errno::from_raw));
    Ok(apart(build)?)
}

/// The queue of the thread, which is started if necessary.
fn thread() -> io::Result<SyncSender<Work>> {
    static THREAD: Mutex<Option<SyncSender<Work>>> = Mutex::new(None);
    let mut thread = THREAD.lock().unwrap_or_else(PoisonError::into_inner);
    match &*thread {
        Some(thread) => Ok(thread.clone()),
        None => start().inspect(|started| *thread = Some(started.clone())),
    }
}

fn start() -> io::Result<SyncSender<Work>> {
    let (thread, queue) = sync_channel::<Work>(QUEUE);
    let run = move || {
        // Changes this thread only, unlike setresuid(3) of the C library.
        if let Err(error) = set_thread_res_uid(*USER, None, None) {
            tracing::debug!(%error, "the daemon uses the quotas of its own user: {error}");
        }
        queue.into_iter().for_each(|work| work());
    };
    std::thread::Builder::new().name("quota".to_owned()).stack_size(STACK).spawn(run)?;
    Ok(thread)
}

#[cfg(test)]
mod tests {
    use super::*;
    use rustix::process::{geteuid, getuid};

    #[test]
    fn work_uses_the_quotas_of_another_user_and_has_the_rights_of_this_one() {
        let is_root = geteuid().is_root();
        let before = (getuid(), geteuid());
        let inside = apart(|| Ok((getuid(), geteuid()))).unwrap();
        assert_eq!(inside, (if is_root { *USER } else { before.0 }, before.1));
        assert!(USER.as_raw() > i32::MAX.cast_unsigned() && USER.as_raw() < u32::MAX, "{:?}", *USER);
        assert_eq!((getuid(), geteuid()), before, "no other thread changes");
        assert_eq!(apart(|| Err::<(), _>(Errno::EAGAIN)), Err(Errno::EAGAIN));
    }

    #[test]
    fn threads_of_a_runtime_have_the_user_of_this_process() {
        let mut builder = Builder::new_multi_thread();
        builder.worker_threads(2).enable_all();
        let runtime = runtime(builder, || ()).unwrap();
        let worker = runtime.spawn(async { getuid() });
        let blocking = runtime.spawn_blocking(getuid);
        let from_worker = runtime.spawn(async { tokio::task::spawn_blocking(getuid).await.unwrap() });
        runtime.block_on(async {
            for user in [worker, blocking, from_worker] {
                assert_eq!(user.await.unwrap(), getuid());
            }
        });
    }

    #[test]
    fn many_threads_use_it_at_once() {
        let work = |number| std::thread::spawn(move || apart(move || Ok(number)));
        let all: Vec<_> = (0..4 * QUEUE).map(work).collect();
        for (number, thread) in all.into_iter().enumerate() {
            assert_eq!(thread.join().unwrap(), Ok(number));
        }
    }
}
