//! The threads for the streams of processes, apart from those that answer calls.
//!
//! The kernel copies from and to the memory of a process while it holds the lock of a pipe or of a terminal. The process
//! decides how long that takes: a page fault does not end while userfaultfd(2), a FUSE file system or a dead disk does not
//! answer. Until then, every other call on that pipe or terminal waits for the lock, also a non-blocking one, and close(2).
//! No signal ends the wait, only the end of the process that has the lock. So whatever uses a stream that a container can
//! reach runs here, where a thread that waits is replaced ([`pool`]): it delays the output of its own container, and no call.

mod pool;

use std::cell::Cell;
use std::collections::{BTreeMap, HashMap};
use std::io;
use std::pin::Pin;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, LazyLock, Mutex, MutexGuard, OnceLock, PoisonError, Weak};
use std::task::{Context, Poll, Waker, ready};
use std::time::Duration;

use tokio::runtime::{Builder, EnterGuard, Runtime};
use tokio::sync::oneshot;

use crate::id::TaskKey;
use crate::sys::quota;
use pool::{Pace, Pool};

/// The number of threads that [`start`] starts: those of the pool, one that waits for events, and one that closes descriptors.
pub const FIRST: usize = pool::USUAL + 2;
/// How many threads one container can occupy. The other streams of the container wait.
const MOST_OF_ONE: usize = 2;
/// The largest number of threads that close descriptors.
const CLOSERS: usize = 256;
/// An idle thread that closes descriptors, or that has replaced another one, ends after this time.
const IDLE: Duration = Duration::from_secs(12);
/// How often a thread that closes descriptors is used at least, so that the last one does not end: tokio panics if it has none and
/// the system allows no new one.
const USED: Duration = Duration::from_secs(5);
/// The name of all these threads.
const NAME: &str = "streams";
/// The stack size of a thread, in bytes.
const STACK: usize = 512 << 10;

/// `None` until [`start`] is called. Streams then use the async runtime of the caller, as in tests.
static THREADS: OnceLock<Threads> = OnceLock::new();

struct Threads {
    /// Waits for events, and closes descriptors.
    events: Runtime,
    pool: &'static Pool,
}

thread_local! {
    /// True in the threads for streams.
    static IS_OWN: Cell<bool> = const { Cell::new(false) };
}

/// Starts the threads, which never end.
///
/// # Errors
/// There are no descriptors or no threads for it.
///
/// # Panics
/// The system allows no further thread: the caller has to check that before.
pub fn start() -> io::Result<()> {
    let mut builder = Builder::new_multi_thread();
    builder
        .thread_name(NAME)
        .worker_threads(1)
        .max_blocking_threads(CLOSERS)
        .thread_keep_alive(IDLE)
        .thread_stack_size(STACK)
        .enable_all();
    let events = quota::runtime(builder, || IS_OWN.set(true))?;
    let pool = Pool::start(events.handle(), pool::MOST_LATE)?;
    let threads = THREADS.get_or_init(|| Threads { events, pool });
    threads.events.spawn(async {
        let mut ticks = tokio::time::interval(USED);
        loop {
            ticks.tick().await;
            drop(tokio::task::spawn_blocking(|| ()));
        }
    });
    Ok(())
}

/// As long as the returned value exists, this thread makes descriptors known to the threads for streams.
pub fn enter() -> Option<EnterGuard<'static>> {
    THREADS.get().map(|threads| threads.events.enter())
}

/// Runs work on a stream of a container.
pub fn spawn<F>(task: &TaskKey, work: F) -> Ended
where
    F: Future<Output = ()> + Send + 'static,
{
    let (running, ended) = oneshot::channel::<()>();
    let work = InTurn::new(task, work);
    let pace = work.turns.pace.clone();
    let work = async move {
        work.await;
        drop(running);
    };
    match THREADS.get() {
        Some(threads) => threads.pool.spawn(pace, work),
        None => drop(tokio::spawn(work)),
    }
    Ended(ended)
}

/// How many pieces of work on the streams of a container, also of its deleted execs, wait for their turn. A process of the container
/// that keeps streams busy in the kernel lets them all wait.
pub fn waiting(task: &TaskKey) -> usize {
    let turns = lock(&TURNS).of.get(task).and_then(Weak::upgrade);
    turns.map_or(0, |turns| lock(&turns.occupied).waiting.len())
}

/// Resolves when work on a stream has ended. The work goes on if this is dropped.
#[derive(Debug)]
pub struct Ended(oneshot::Receiver<()>);

impl Future for Ended {
    type Output = ();

    fn poll(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<()> {
        // Nothing is sent: it is an error that the work is gone.
        let _ = ready!(Pin::new(&mut self.0).poll(context));
        Poll::Ready(())
    }
}

/// Runs work that closes descriptors of streams. Only a thread for streams waits for this work.
pub fn run(work: impl FnOnce() + Send + 'static) {
    match THREADS.get() {
        Some(threads) if !IS_OWN.get() => drop(threads.events.spawn_blocking(work)),
        Some(_) | None => work(),
    }
}

/// Drops something that owns descriptors of streams. Otherwise as [`run`].
pub fn discard<T: Send + 'static>(unused: T) {
    run(move || drop(unused));
}

/// The turns of all containers.
static TURNS: LazyLock<Mutex<AllTurns>> = LazyLock::new(Mutex::default);

#[derive(Default)]
struct AllTurns {
    of: HashMap<TaskKey, Weak<Turns>>,
    /// Once the map has this many entries, those of containers that are gone are removed.
    prune_at: usize,
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Limits how many threads the streams of one container occupy at the same moment.
#[derive(Debug, Default)]
struct Turns {
    occupied: Mutex<Occupied>,
    pace: Arc<Pace>,
}

#[derive(Debug, Default)]
struct Occupied {
    threads: usize,
    waiting: BTreeMap<u64, Waker>,
}

impl Turns {
    fn of(task: &TaskKey) -> Arc<Self> {
        /// The map is never pruned below this number of entries.
        const FEW: usize = 64;
        let mut all = lock(&TURNS);
        if let Some(turns) = all.of.get(task).and_then(Weak::upgrade) {
            return turns;
        }
        if all.of.len() >= all.prune_at {
            all.of.retain(|_, turns| turns.strong_count() > 0);
            all.prune_at = FEW.max(2 * all.of.len());
        }
        let turns = Arc::<Self>::default();
        all.of.insert(task.clone(), Arc::downgrade(&turns));
        turns
    }

    /// Begins a turn, unless the container occupies as many threads as it may. `waker` is called once
    /// the container may occupy another thread.
    fn begin(&self, number: u64, waker: &Waker) -> Option<Turn<'_>> {
        let mut occupied = lock(&self.occupied);
        if occupied.threads >= MOST_OF_ONE {
            occupied.waiting.insert(number, waker.clone());
            return None;
        }
        occupied.waiting.remove(&number);
        occupied.threads += 1;
        Some(Turn(self))
    }

    /// Wakes one of those that wait, if there may be another turn.
    fn wake_next(&self) {
        let mut occupied = lock(&self.occupied);
        let next = if occupied.threads < MOST_OF_ONE { occupied.waiting.pop_first() } else { None };
        drop(occupied);
        if let Some((_, waker)) = next {
            waker.wake();
        }
    }
}

struct Turn<'a>(&'a Turns);

impl Drop for Turn<'_> {
    fn drop(&mut self) {
        lock(&self.0.occupied).threads -= 1;
        self.0.wake_next();
    }
}

/// Work that is polled in turn with the other work on the streams of its container.
struct InTurn<F> {
    number: u64,
    turns: Arc<Turns>,
    /// `None` once it has ended.
    work: Option<Pin<Box<F>>>,
}

impl<F: Future<Output = ()>> InTurn<F> {
    fn new(task: &TaskKey, work: F) -> Self {
        static NEXT: AtomicU64 = AtomicU64::new(0);
        let number = NEXT.fetch_add(1, Ordering::Relaxed);
        Self { number, turns: Turns::of(task), work: Some(Box::pin(work)) }
    }
}

impl<F: Future<Output = ()>> Future for InTurn<F> {
    type Output = ();

    fn poll(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<()> {
        let this = &mut *self;
        let Some(_turn) = this.turns.begin(this.number, context.waker()) else {
            return Poll::Pending;
        };
        let Some(work) = &mut this.work else { return Poll::Ready(()) };
        let polled = work.as_mut().poll(context);
        if polled.is_ready() {
            // Closes its descriptors, which may wait, too.
            this.work = None;
        }
        polled
    }
}

impl<F> Drop for InTurn<F> {
    fn drop(&mut self) {
        lock(&self.turns.occupied).waiting.remove(&self.number);
        // It may have been woken for a turn that it does not take any more.
        self.turns.wake_next();
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::mpsc;

    use crate::id::{Namespace, TaskId};

    fn key(id: &str) -> TaskKey {
        TaskKey::usual(Namespace::new("threads").unwrap(), TaskId::new(id).unwrap())
    }

    /// Work that occupies its thread until the returned sender is dropped, and says that it has begun.
    fn stuck(task: &TaskKey, begun: &mpsc::Sender<()>) -> (mpsc::Sender<()>, Ended) {
        let (release, released) = mpsc::channel::<()>();
        let begun = begun.clone();
        let work = spawn(task, async move {
            begun.send(()).unwrap();
            _ = released.recv();
        });
        (release, work)
    }

    #[tokio::test(flavor = "multi_thread", worker_threads = 4)]
    async fn a_container_occupies_two_threads_and_its_other_streams_wait() {
        let (begun, begins) = mpsc::channel();
        let (hostile, other) = (key("hostile"), key("other"));
        let mut held: Vec<_> = (0..MOST_OF_ONE).map(|_| stuck(&hostile, &begun)).collect();
        (0..MOST_OF_ONE).for_each(|_| begins.recv().unwrap());
        let (release, waiting) = stuck(&hostile, &begun);
        // Another container's work runs, and the third of the hostile one does not.
        spawn(&other, async {}).await;
        tokio::task::yield_now().await;
        assert!(begins.try_recv().is_err());
        drop(held.pop());
        begins.recv().unwrap();
        drop((held, release));
        waiting.await;
    }

    #[tokio::test]
    async fn little_is_kept_of_containers_whose_streams_have_ended() {
        for number in 0..1000 {
            spawn(&key(&format!("gone-{number}")), async {}).await;
        }
        let kept = lock(&TURNS).of.len();
        assert!(kept < 200, "{kept}");
    }

    #[tokio::test]
    async fn work_that_is_woken_often_while_it_waits_is_kept_once() {
        let turns = Turns::default();
        let waker = Waker::noop();
        let _occupied: Vec<_> =
            (0..MOST_OF_ONE as u64).map(|number| turns.begin(number, waker).unwrap()).collect();
        for _ in 0..100 {
            assert!(turns.begin(7, waker).is_none());
        }
        assert_eq!(lock(&turns.occupied).waiting.len(), 1);
    }
}
