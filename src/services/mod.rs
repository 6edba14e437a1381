//! What operations (`ops`) and supervision (`supervise`) share: the live tasks and their records, and the adapters
//! (`unit`, `oci`, `stdio`, `cgroup`, `store`), which don't know each other.

pub mod changes;
mod error;
pub(crate) mod exec_share;
pub mod files;
pub(crate) mod later;
pub mod launcher;
pub(crate) mod live;
pub mod notifications;
mod ordered;
pub mod own_unit;
mod owner;
pub(crate) mod pending;
pub mod process;
pub mod publishing;
pub mod registry;
pub mod runtime_files;
mod spare_threads;
pub mod streams;
mod tasks;
pub mod waiting;

use std::sync::Arc;

use tokio::sync::oneshot;

use crate::suspect;

pub use error::Error;
pub use live::Live;
pub use tasks::{Outgoing, Tasks};
pub(crate) use waiting::{WaitsFor, waiting, waiting_in_any_thread};

/// A live task, with what the running daemon attaches to it.
pub type Entry = registry::Entry<Live>;
/// One of its processes.
pub type Process = registry::Process<Live>;

/// How a call has reached this daemon.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Delivery {
    /// No earlier daemon has read the call.
    First,
    /// An earlier daemon has read the call, and may have carried it out in part or in full. This daemon does not repeat
    /// what the earlier daemon has done, and answers as if it had done it itself.
    Replayed,
}

/// Resumes, in the background, an operation that an earlier daemon has started. Holds the process's `verb` lock, so that
/// a replay of the same call waits. Returns once `work` has claimed its descriptors from the descriptor store, or has
/// finished.
pub(crate) async fn resume_in_background<W: Future<Output = ()> + Send + 'static>(
    process: &Arc<Process>,
    work: impl FnOnce(oneshot::Sender<()>) -> W + Send + 'static,
) {
    let (claimed, is_claimed) = oneshot::channel();
    let process = process.clone();
    tokio::spawn(suspect::inherit(async move {
        let _verb = process.verb.lock().await;
        work(claimed).await;
    }));
    // Work that has finished sends nothing.
    let _ = is_claimed.await;
}

/// Runs blocking work (disk, mounts, clients' files) away from the async runtime.
pub(crate) async fn blocking<T: Send + 'static>(
    work: impl FnOnce() -> T + Send + 'static,
) -> Result<T, Error> {
    tokio::task::spawn_blocking(suspect::inherit_fn(work)).await.map_err(|_| Error::Stopping)
}
