//! Kills the processes of cgroups, and removes cgroups.
//!
//! Both wait for a lock of the kernel, which it also holds while it makes and removes other cgroups and moves processes. So they can
//! take long on a busy machine. [`kill`] and [`remove`] work in another thread, with a time limit. The functions whose names end with
//! `_blocking` are for threads that may wait: none of the async runtime may.

use std::fs;
use std::io;
use std::path::Path;
use std::time::Duration;

use tokio::task::spawn_blocking;
use tokio::time::timeout;

use crate::path_error::io_error;
use crate::suspect;

use super::{Error, dir, is_gone};

/// How long the kernel may take. The thread continues to wait after that.
const LIMIT: Duration = Duration::from_secs(30);

/// Kills every process in a cgroup and below it, including concurrent forks. Does nothing if the cgroup does not exist.
///
/// # Errors
/// The kernel refused, or has not answered within 30 s.
pub async fn kill(cgroup: &Path) -> Result<(), Error> {
    kill_within(LIMIT, cgroup).await
}

/// As [`kill`], with another time limit.
///
/// # Errors
/// The kernel refused, or has not answered within `limit`.
pub async fn kill_within(limit: Duration, cgroup: &Path) -> Result<(), Error> {
    within(limit, "kill the processes of", cgroup, kill_blocking).await
}

/// Removes a cgroup. Returns false if it has processes or other cgroups below it.
///
/// # Errors
/// The kernel refused for another reason, or has not answered within 30 s.
pub async fn remove(cgroup: &Path) -> Result<bool, Error> {
    within(LIMIT, "remove", cgroup, remove_blocking).await
}

/// As [`kill`], in this thread and without a time limit.
///
/// # Errors
/// The kernel refused.
pub fn kill_blocking(cgroup: &Path) -> Result<(), Error> {
    let path = dir(cgroup).join("cgroup.kill");
    match fs::write(&path, "1") {
        Err(e) if is_gone(&e) => Ok(()),
        result => Ok(result.map_err(io_error("write", &path))?),
    }
}

/// As [`remove`], in this thread and without a time limit.
///
/// # Errors
/// The kernel refused for another reason.
pub fn remove_blocking(cgroup: &Path) -> Result<bool, Error> {
    let dir = dir(cgroup);
    match fs::remove_dir(&dir) {
        Err(e) if e.kind() == io::ErrorKind::ResourceBusy => Ok(false),
        Err(e) if is_gone(&e) => Ok(true),
        result => Ok(result.map(|()| true).map_err(io_error("remove", &dir))?),
    }
}

/// Does `work` with a cgroup in another thread. `action` names the work in an error.
async fn within<T: Send + 'static>(
    limit: Duration,
    action: &'static str,
    cgroup: &Path,
    work: fn(&Path) -> Result<T, Error>,
) -> Result<T, Error> {
    let path = cgroup.to_owned();
    let mut done = spawn_blocking(suspect::inherit_fn(move || work(&path)));
    let error = match timeout(limit, &mut done).await {
        Ok(Ok(done)) => return done,
        // The daemon is stopping.
        Ok(Err(error)) => error.into(),
        Err(_) => {
            // Work that waits for a thread is not begun any more: a later cgroup may have the same path.
            done.abort();
            let text = format!("the kernel has not done it within {} s", limit.as_secs());
            io::Error::new(io::ErrorKind::TimedOut, text)
        }
    };
    Err(io_error(action, &dir(cgroup))(error).into())
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::OpenOptionsExt;
    use std::pin::pin;

    use futures_util::FutureExt;
    use nix::sys::stat::Mode;
    use nix::unistd::mkfifo;

    use super::*;
    use crate::cgroup::fake;

    #[tokio::test]
    async fn a_kill_that_waits_for_the_kernel_occupies_no_thread_of_the_runtime_and_has_a_time_limit() {
        let cgroup = Path::new("/locked.slice");
        fake::make(cgroup);
        let file = dir(cgroup).join("cgroup.kill");
        // The open(2) of this file waits for a reader.
        mkfifo(&file, Mode::S_IRWXU).unwrap();
        let mut killing = pin!(kill(cgroup));
        assert!(killing.as_mut().now_or_never().is_none());
        let late = kill_within(Duration::from_millis(10), cgroup).await;
        let late = late.unwrap_err();
        assert!(
            late.is_timeout() && late.to_string().contains("/locked.slice: the kernel has not"),
            "{late}"
        );
        let _reader = fs::File::options().read(true).custom_flags(nix::libc::O_NONBLOCK).open(&file).unwrap();
        killing.await.unwrap();
        fake::remove(cgroup);
    }
}
