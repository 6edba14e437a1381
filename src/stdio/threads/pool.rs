//! Threads that poll futures, and that are replaced while a system call keeps them.
//!
//! A thread of an async runtime that waits for a lock of the kernel is missing until it gets the lock. Here, another thread
//! takes its place for that time, up to a limit. Descriptors and timers belong to a runtime that only waits for events
//! (epoll(7)), and polls nothing of a container.

use std::collections::{HashMap, VecDeque};
use std::future::poll_fn;
use std::io;
use std::pin::Pin;
use std::sync::atomic::{AtomicU8, Ordering};
use std::sync::{Arc, Condvar, Mutex, PoisonError};
use std::task::{Context, Poll, Wake, Waker};
use std::thread;
use std::time::{Duration, Instant};

use tokio::runtime::Handle;
use tokio::sync::Notify;

use super::{IDLE, IS_OWN, STACK, lock};

/// The number of threads that poll while no call is late.
pub const USUAL: usize = 4;
/// How many late threads are replaced. Once there are more, nothing is polled until one of them gets its lock.
pub const MOST_LATE: usize = 128;
/// A thread is late if one poll takes longer. Usual ones take microseconds.
const LATE: Duration = Duration::from_millis(200);

type Work = Pin<Box<dyn Future<Output = ()> + Send>>;

/// The threads, and the futures that are to be polled.
pub struct Pool {
    state: Mutex<State>,
    /// Notified for each future in the queue.
    queued: Condvar,
    /// Notified when there are more futures in the queue than idle threads.
    lacking: Notify,
    /// The runtime that waits for events.
    events: Handle,
    /// How many late threads are replaced.
    most_late: usize,
}

#[derive(Default)]
struct State {
    queue: VecDeque<Arc<Job>>,
    threads: usize,
    idle: usize,
    /// Since when the other threads have polled, by their number.
    polling: HashMap<u64, Instant>,
    next: u64,
}

impl State {
    fn late(&self) -> usize {
        self.polling.values().filter(|begun| begun.elapsed() >= LATE).count()
    }

    /// How many threads there may be: late ones are replaced.
    fn wanted(&self, most_late: usize) -> usize {
        USUAL + self.late().min(most_late)
    }
}

impl Pool {
    /// Starts the usual threads, which use the events of this runtime. They never end. At most `most_late` late ones are
    /// replaced.
    ///
    /// # Errors
    /// The system allows no further thread.
    pub fn start(events: &Handle, most_late: usize) -> io::Result<&'static Self> {
        let pool: &'static Self = Box::leak(Box::new(Self {
            state: Mutex::default(),
            queued: Condvar::new(),
            lacking: Notify::new(),
            events: events.clone(),
            most_late,
        }));
        pool.grow(&mut lock(&pool.state))?;
        events.spawn(pool.replace_late());
        Ok(pool)
    }

    /// Polls a future until it is ready.
    pub fn spawn(&'static self, work: impl Future<Output = ()> + Send + 'static) {
        let work = Mutex::new(Some(Box::pin(work) as Work));
        self.push(Arc::new(Job { pool: self, work, progress: AtomicU8::new(Job::QUEUED) }));
    }

    fn push(&self, job: Arc<Job>) {
        let mut state = lock(&self.state);
        state.queue.push_back(job);
        let is_lacking = state.queue.len() > state.idle;
        drop(state);
        self.queued.notify_one();
        if is_lacking {
            self.lacking.notify_one();
        }
    }

    /// Starts threads until there are as many as wanted.
    fn grow(&'static self, state: &mut State) -> io::Result<()> {
        while state.threads < state.wanted(self.most_late) {
            let number = state.next;
            let thread = thread::Builder::new().name("stream".to_owned()).stack_size(STACK);
            thread.spawn(move || self.run(number))?;
            state.next += 1;
            state.threads += 1;
        }
        Ok(())
    }

    /// Replaces late threads for as long as futures wait for a thread. Never returns.
    async fn replace_late(&'static self) {
        loop {
            self.lacking.notified().await;
            loop {
                tokio::time::sleep(LATE).await;
                let mut state = lock(&self.state);
                if state.queue.len() <= state.idle {
                    break;
                }
                // Otherwise tried again after the same time.
                let _ = self.grow(&mut state);
            }
        }
    }

    /// The work of one thread.
    fn run(&self, number: u64) {
        IS_OWN.set(true);
        while let Some(job) = self.next(number) {
            // In the runtime, with a limit of how much the future does before another one gets its turn.
            self.events.block_on(poll_fn(|_| {
                job.poll();
                Poll::Ready(())
            }));
            lock(&self.state).polling.remove(&number);
        }
    }

    /// Waits for a future. `None` if there are more threads than needed.
    fn next(&self, number: u64) -> Option<Arc<Job>> {
        let mut state = lock(&self.state);
        loop {
            if let Some(job) = state.queue.pop_front() {
                state.polling.insert(number, Instant::now());
                return Some(job);
            }
            let is_surplus = state.threads > USUAL;
            state.idle += 1;
            state = if is_surplus {
                let waited = self.queued.wait_timeout(state, IDLE);
                waited.unwrap_or_else(PoisonError::into_inner).0
            } else {
                self.queued.wait(state).unwrap_or_else(PoisonError::into_inner)
            };
            state.idle -= 1;
            if state.queue.is_empty() && state.threads > state.wanted(self.most_late) {
                state.threads -= 1;
                return None;
            }
        }
    }
}

/// A future and where it is. Its waker puts it into the queue.
struct Job {
    pool: &'static Pool,
    /// `None` once it is ready. Only the thread that polls it locks it.
    work: Mutex<Option<Work>>,
    progress: AtomicU8,
}

impl Job {
    /// Waits for its waker.
    const WAITING: u8 = 0;
    /// In the queue.
    const QUEUED: u8 = 1;
    /// A thread polls it.
    const POLLED: u8 = 2;
    /// A thread polls it, and its waker was called meanwhile.
    const WOKEN: u8 = 3;

    fn poll(self: &Arc<Self>) {
        self.progress.store(Self::POLLED, Ordering::Release);
        let waker = Waker::from(self.clone());
        let mut work = lock(&self.work);
        let Some(polled) = work.as_mut().map(|work| work.as_mut().poll(&mut Context::from_waker(&waker)))
        else {
            return;
        };
        if polled.is_ready() {
            *work = None;
            return;
        }
        drop(work);
        let (from, to) = (Self::POLLED, Self::WAITING);
        if self.progress.compare_exchange(from, to, Ordering::AcqRel, Ordering::Acquire).is_err() {
            self.progress.store(Self::QUEUED, Ordering::Release);
            self.pool.push(self.clone());
        }
    }
}

impl Wake for Job {
    fn wake(self: Arc<Self>) {
        self.wake_by_ref();
    }

    fn wake_by_ref(self: &Arc<Self>) {
        let woken =
            self.progress.fetch_update(Ordering::AcqRel, Ordering::Acquire, |progress| match progress {
                Self::WAITING => Some(Self::QUEUED),
                Self::POLLED => Some(Self::WOKEN),
                _ => None,
            });
        if woken == Ok(Self::WAITING) {
            self.pool.push(self.clone());
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::mpsc;
    use tokio::runtime::{Builder, Runtime};
    use tokio::sync::oneshot;

    const LONG: Duration = Duration::from_secs(60);
    const MOST_OF_TEST: usize = 10;

    fn started() -> (&'static Pool, Runtime) {
        let runtime = Builder::new_multi_thread().worker_threads(1).enable_all().build().unwrap();
        (Pool::start(runtime.handle(), MOST_OF_TEST).unwrap(), runtime)
    }

    #[test]
    fn threads_that_are_kept_are_replaced_until_there_are_too_many() {
        let (pool, _runtime) = started();
        let (begun, begins) = mpsc::channel();
        let mut held = Vec::new();
        for _ in 0..MOST_OF_TEST + USUAL {
            let (release, released) = mpsc::channel::<()>();
            let begun = begun.clone();
            pool.spawn(async move {
                begun.send(()).unwrap();
                _ = released.recv();
            });
            held.push(release);
        }
        held.iter().for_each(|_| begins.recv_timeout(LONG).unwrap());
        let (ran, runs) = mpsc::channel();
        pool.spawn(async move { ran.send(()).unwrap() });
        assert_eq!(lock(&pool.state).threads, MOST_OF_TEST + USUAL);
        assert!(runs.recv_timeout(2 * LATE).is_err(), "all threads are kept");
        held.pop();
        runs.recv_timeout(LONG).unwrap();
    }

    #[test]
    fn a_future_that_waits_is_polled_when_it_is_woken_and_one_that_is_always_ready_gives_way() {
        let (pool, _runtime) = started();
        let (sender, receiver) = oneshot::channel();
        let (ended, ends) = mpsc::channel();
        // As many as there are threads. Without a limit, they would keep all of them.
        for _ in 0..USUAL {
            pool.spawn(async {
                loop {
                    tokio::task::consume_budget().await;
                }
            });
        }
        pool.spawn(async move {
            receiver.await.unwrap();
            tokio::time::sleep(Duration::from_millis(1)).await;
            ended.send(()).unwrap();
        });
        sender.send(()).unwrap();
        ends.recv_timeout(LONG).unwrap();
    }
}
