//! Threads for work that waits: for a client, a disk or the kernel. Each kind of work has a limit for one container, and a
//! larger one in total. Work beyond that waits for its turn, without a thread, and is refused after a while.

use std::collections::HashMap;
use std::collections::hash_map::Entry;
use std::sync::{Arc, LazyLock, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use tokio::sync::{OwnedSemaphorePermit, Semaphore, oneshot};

use crate::id::TaskKey;
use crate::suspect;

use super::spare_threads::SpareThreads;
use super::{Error, blocking};

static THREADS: SpareThreads = SpareThreads::new("waiting");

/// How long work waits for its turn. As long as a client may take to open its end of a FIFO.
const TURN_LIMIT: Duration = crate::config::STDIO_LIMIT;

/// What work waits for. A disk that does not answer keeps its threads until it does, so each kind of file has threads of its
/// own: dead log files delay no Create.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum WaitsFor {
    /// A client that opens its end of a stream, `launch` that sends a terminal, or the kernel that freezes processes. Such work
    /// has a time limit.
    Client,
    /// A disk: that of a bundle, of the files of an OCI runtime, or of another file that is no log file.
    Disk,
    /// The disk of a client's log file.
    LogFile,
    /// The close of a descriptor that a process of the container has sent.
    Notification,
    /// A terminal of a container. Its processes can make the kernel wait as long as they like (`stdio::threads`).
    Terminal,
    /// The kernel, which frees memory until a container is below a new limit.
    Limits,
    /// The kernel, which lists the processes of a container. A container can have so many cgroups that this takes seconds.
    Processes,
}

impl WaitsFor {
    fn threads(self) -> &'static Threads {
        static CLIENT: LazyLock<Threads> = LazyLock::new(|| Threads::new(1024, 64));
        static DISK: LazyLock<Threads> = LazyLock::new(|| Threads::new(256, 8));
        static LOG_FILE: LazyLock<Threads> = LazyLock::new(|| Threads::new(256, 8));
        static NOTIFICATION: LazyLock<Threads> = LazyLock::new(|| Threads::new(1024, 1));
        static LIMITS: LazyLock<Threads> = LazyLock::new(|| Threads::new(256, 2));
        // One at a time: the size that was asked for last has to win.
        static TERMINAL: LazyLock<Threads> = LazyLock::new(|| Threads::new(256, 1));
        static PROCESSES: LazyLock<Threads> = LazyLock::new(|| Threads::new(256, 2));
        match self {
            Self::Client => &CLIENT,
            Self::Disk => &DISK,
            Self::LogFile => &LOG_FILE,
            Self::Notification => &NOTIFICATION,
            Self::Terminal => &TERMINAL,
            Self::Limits => &LIMITS,
            Self::Processes => &PROCESSES,
        }
    }

    /// All turns of a task: while they exist, other work of this kind waits for its turn.
    #[cfg(test)]
    pub(crate) async fn all_turns(self, task: &TaskKey) -> impl Sized + use<> {
        let mut turns = Vec::new();
        for _ in 0..self.threads().most_of_one {
            turns.push(self.threads().turn(task).await);
        }
        turns
    }

    /// For an error: "too many threads wait for …".
    pub(crate) fn what(self) -> &'static str {
        match self {
            Self::Client => "clients that do not open their streams",
            Self::Disk => "the disks of bundles or of OCI runtimes",
            Self::LogFile => "the disks of log files",
            Self::Notification => "the close of descriptors that containers have sent",
            Self::Terminal => "the terminals of containers",
            Self::Limits => "new limits of containers",
            Self::Processes => "the lists of the processes of containers",
        }
    }
}

/// Runs work that may wait in a thread of its own. So slow clients, however many there are, use no thread of
/// [`blocking`], which the other tasks need.
///
/// # Errors
/// [`Error::ManyWait`] if too many threads wait already; no thread can be started.
pub(crate) async fn waiting<T: Send + 'static>(
    waits_for: WaitsFor,
    task: &TaskKey,
    work: impl FnOnce() -> T + Send + 'static,
) -> Result<T, Error> {
    let turn = tokio::time::timeout(TURN_LIMIT, waits_for.threads().turn(task));
    let turn = turn.await.map_err(|_| Error::ManyWait { task: task.clone(), waits_for: waits_for.what() })?;
    let (done, result) = oneshot::channel();
    let runtime = tokio::runtime::Handle::current();
    let work = suspect::inherit_fn(work);
    #[cfg(test)]
    let _stopped = StoppedClock::new();
    let run = move || {
        let _context = runtime.enter();
        let result = work();
        // Other work of this task may begin before this thread is free.
        drop(turn);
        // The receiver was dropped if the call was cancelled.
        let _ = done.send(result);
    };
    THREADS.run(run).map_err(Error::NoThread)?;
    result.await.map_err(|_| Error::Stopping)
}

/// As [`waiting`]. If no thread can be started, a thread of [`blocking`] does the work: a signal for all processes must work also then.
///
/// # Errors
/// [`Error::ManyWait`] if too many threads wait already.
pub(crate) async fn waiting_in_any_thread<T: Send + 'static>(
    waits_for: WaitsFor,
    task: &TaskKey,
    work: impl FnOnce() -> T + Clone + Send + 'static,
) -> Result<T, Error> {
    match waiting(waits_for, task, work.clone()).await {
        Err(Error::NoThread(_)) => blocking(work).await,
        done => done,
    }
}

/// While this exists, the paused clock of a test does not advance by itself. tokio lets such a clock jump to the next timer
/// whenever nothing runs on its own threads, and does not see the threads of [`waiting`]: on a busy machine, time limits of
/// minutes would pass during a moment of work. The future that awaits the work has this value, and not the thread: the end of
/// a simulated daemon drops its futures, and does not wait for its threads.
#[cfg(test)]
struct StoppedClock {
    _end: std::sync::mpsc::Sender<()>,
}

#[cfg(test)]
impl StoppedClock {
    fn new() -> Self {
        let (end, ended) = std::sync::mpsc::channel::<()>();
        // tokio's clock stands still while its blocking threads work.
        drop(tokio::task::spawn_blocking(move || ended.recv()));
        Self { _end: end }
    }
}

/// How many threads there may be for one kind of work.
struct Threads {
    all: Arc<Semaphore>,
    most_of_one: usize,
    /// The tasks that have a thread or wait for one.
    tasks: Mutex<HashMap<TaskKey, Arc<Semaphore>>>,
}

impl Threads {
    fn new(most: usize, most_of_one: usize) -> Self {
        Self { all: Arc::new(Semaphore::new(most)), most_of_one, tasks: Mutex::default() }
    }

    fn tasks(&self) -> MutexGuard<'_, HashMap<TaskKey, Arc<Semaphore>>> {
        self.tasks.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Waits until this task may have one more thread.
    async fn turn(&'static self, task: &TaskKey) -> Turn {
        let own = {
            let mut tasks = self.tasks();
            let new = || Arc::new(Semaphore::new(self.most_of_one));
            tasks.entry(task.clone()).or_insert_with(new).clone()
        };
        let mut turn = Turn { threads: self, task: task.clone(), _own: None, _one: None };
        // Neither semaphore is ever closed.
        turn._own = own.acquire_owned().await.ok();
        turn._one = self.all.clone().acquire_owned().await.ok();
        turn
    }
}

/// While this exists, the thread of a task counts.
struct Turn {
    threads: &'static Threads,
    task: TaskKey,
    _own: Option<OwnedSemaphorePermit>,
    _one: Option<OwnedSemaphorePermit>,
}

impl Drop for Turn {
    fn drop(&mut self) {
        (self._own, self._one) = (None, None);
        if let Entry::Occupied(found) = self.threads.tasks().entry(self.task.clone())
            && Arc::strong_count(found.get()) == 1
        {
            found.remove();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::id::Namespace;

    fn task(id: &str) -> TaskKey {
        TaskKey::from_word(Namespace::new("default").unwrap(), id).unwrap()
    }

    /// A turn that is there at once.
    fn at_once(threads: &'static Threads, id: &str) -> Option<Turn> {
        use futures_util::FutureExt;
        threads.turn(&task(id)).now_or_never()
    }

    #[tokio::test]
    async fn one_task_does_not_get_the_threads_that_others_need() {
        let threads: &'static Threads = Box::leak(Box::new(Threads::new(4, 2)));
        let mut hanging: Vec<_> = (0..2).map(|_| at_once(threads, "dead").unwrap()).collect();
        assert!(at_once(threads, "dead").is_none(), "its third");
        hanging.extend(["a", "b"].map(|id| at_once(threads, id).unwrap()));
        assert!(at_once(threads, "c").is_none(), "the fifth of all");
        let waiting = tokio::spawn(threads.turn(Box::leak(Box::new(task("c")))));
        tokio::task::yield_now().await;
        hanging.remove(0);
        let turn = waiting.await.unwrap();
        drop((turn, hanging));
        assert!(threads.tasks().is_empty(), "nothing is kept of tasks that have no thread");
        assert_eq!(threads.all.available_permits(), 4);
    }

    #[tokio::test(start_paused = true)]
    async fn work_that_gets_no_turn_is_refused() {
        let (key, (begin, begun)) = (task("full"), std::sync::mpsc::channel::<()>());
        let _turns = WaitsFor::LogFile.all_turns(&key).await;
        let refused = waiting(WaitsFor::LogFile, &key, move || begin.send(())).await.unwrap_err();
        assert!(refused.to_string().contains("the disks of log files"), "{refused}");
        assert_eq!(crate::api::status::code(&refused), ttrpc::Code::RESOURCE_EXHAUSTED);
        assert!(begun.recv().is_err(), "the work was not begun");
    }

    #[tokio::test(start_paused = true)]
    async fn a_simulated_clock_stands_still_while_a_thread_works() {
        let begun = tokio::time::Instant::now();
        tokio::spawn(async {
            loop {
                tokio::time::sleep(Duration::from_secs(1)).await;
            }
        });
        let (_quiet, silence) = std::sync::mpsc::channel::<()>();
        let work = move || silence.recv_timeout(Duration::from_millis(100));
        waiting(WaitsFor::Client, &task("clock"), work).await.unwrap().unwrap_err();
        assert_eq!(begun.elapsed(), Duration::ZERO);
    }
}
