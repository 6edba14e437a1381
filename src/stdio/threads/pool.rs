//! Threads that poll futures, and that are replaced while a system call keeps them.
//!
//! A thread of an async runtime that waits for a lock of the kernel is missing until it gets the lock. Here, another thread
//! takes its place for that time, up to a limit. Descriptors and timers belong to a runtime that only waits for events
//! (epoll(7)), and polls nothing of a container.

use std::collections::{HashMap, VecDeque};
use std::future::poll_fn;
use std::io;
use std::pin::Pin;
use std::sync::atomic::{AtomicU8, AtomicU32, Ordering};
use std::sync::{Arc, Condvar, Mutex, PoisonError};
use std::task::{Context, Poll, Wake, Waker};
use std::thread;
use std::time::{Duration, Instant};

use tokio::runtime::Handle;
use tokio::sync::Notify;

use super::{IDLE, IS_OWN, NAME, STACK, lock};

/// The number of threads that poll while no call is late.
pub const USUAL: usize = 4;
/// How many late threads are replaced. Once there are more, nothing is polled until one of them gets its lock.
pub const MOST_LATE: usize = 128;
/// A thread is late if one poll takes longer. Usual ones take microseconds.
const LATE: Duration = Duration::from_millis(50);

/// After a poll that was late, so many polls have to be short before the container counts as quick again.
const PROBATION: u32 = 256;

/// How long the polls for one container take. A container that has kept a thread may do it again and again, each time for less
/// than [`LATE`]: its polls count as late from their beginning, so each has a thread in addition to the usual ones.
#[derive(Debug, Default)]
pub struct Pace {
    /// How many short polls are missing until the container counts as quick again.
    probation: AtomicU32,
}

impl Pace {
    fn is_slow(&self) -> bool {
        self.probation.load(Ordering::Relaxed) > 0
    }

    fn note(&self, lasted: Duration) {
        if lasted >= LATE {
            self.probation.store(PROBATION, Ordering::Relaxed);
        } else {
            let less = |missing: u32| missing.checked_sub(1);
            let _ = self.probation.fetch_update(Ordering::Relaxed, Ordering::Relaxed, less);
        }
    }
}

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
    /// What the other threads poll, by their number.
    polling: HashMap<u64, Polling>,
    next: u64,
}

/// A poll that is under way.
struct Polling {
    begun: Instant,
    /// The [`Pace`] of its container when the poll began.
    is_slow: bool,
}

impl State {
    fn late(&self) -> usize {
        let is_late = |polling: &&Polling| polling.is_slow || polling.begun.elapsed() >= LATE;
        self.polling.values().filter(is_late).count()
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

    /// Polls a future of the container with this pace until it is ready.
    pub fn spawn(&'static self, pace: Arc<Pace>, work: impl Future<Output = ()> + Send + 'static) {
        let work = Mutex::new(Some(Box::pin(work) as Work));
        self.push(Arc::new(Job { pool: self, pace, work, progress: AtomicU8::new(Job::QUEUED) }));
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
            let thread = thread::Builder::new().name(NAME.to_owned()).stack_size(STACK);
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
    fn run(&'static self, number: u64) {
        IS_OWN.set(true);
        while let Some(job) = self.next(number) {
            // In the runtime, with a limit of how much the future does before another one gets its turn.
            self.events.block_on(poll_fn(|_| {
                job.poll();
                Poll::Ready(())
            }));
            if let Some(polled) = lock(&self.state).polling.remove(&number) {
                job.pace.note(polled.begun.elapsed());
            }
        }
    }

    /// Waits for a future. `None` if there are more threads than needed.
    fn next(&'static self, number: u64) -> Option<Arc<Job>> {
        let mut state = lock(&self.state);
        loop {
            if let Some(job) = state.queue.pop_front() {
                let is_slow = job.pace.is_slow();
                state.polling.insert(number, Polling { begun: Instant::now(), is_slow });
                if is_slow {
                    // Otherwise tried again when futures wait for a thread.
                    let _ = self.grow(&mut state);
                }
                return Some(job);
            }
            let is_surplus = state.threads > USUAL;
            state.idle += 1;
            let was_idle;
            (state, was_idle) = if is_surplus {
                let waited = self.queued.wait_timeout(state, IDLE);
                let (state, timeout) = waited.unwrap_or_else(PoisonError::into_inner);
                (state, timeout.timed_out())
            } else {
                (self.queued.wait(state).unwrap_or_else(PoisonError::into_inner), false)
            };
            state.idle -= 1;
            if was_idle && state.queue.is_empty() && state.threads > state.wanted(self.most_late) {
                state.threads -= 1;
                return None;
            }
        }
    }
}

/// A future and where it is. Its waker puts it into the queue.
struct Job {
    pool: &'static Pool,
    pace: Arc<Pace>,
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
        // Acquires what was written before each call of the waker while the future was in the queue.
        self.progress.swap(Self::POLLED, Ordering::AcqRel);
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
            // Not a store: this would hide from the next poll what was written before a call of the waker that comes here.
            self.progress.swap(Self::QUEUED, Ordering::AcqRel);
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
                // Written as well, although the value stays: the next poll acquires what was written before this call.
                queued_or_woken => Some(queued_or_woken),
            });
        if woken == Ok(Self::WAITING) {
            self.pool.push(self.clone());
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::Write;
    use std::sync::mpsc;
    use tokio::io::AsyncReadExt;
    use tokio::runtime::{Builder, Runtime};
    use tokio::sync::oneshot;

    const LONG: Duration = Duration::from_secs(60);
    const MOST_OF_TEST: usize = 10;

    fn started() -> (&'static Pool, Runtime) {
        let runtime = Builder::new_multi_thread().worker_threads(1).enable_all().build().unwrap();
        (Pool::start(runtime.handle(), MOST_OF_TEST).unwrap(), runtime)
    }

    fn quick() -> Arc<Pace> {
        Arc::default()
    }

    #[test]
    fn a_container_that_has_kept_a_thread_is_slow_until_its_polls_are_short_again() {
        let pace = Pace::default();
        pace.note(Duration::ZERO);
        assert!(!pace.is_slow());
        pace.note(LATE);
        (1..PROBATION).for_each(|_| pace.note(Duration::ZERO));
        assert!(pace.is_slow());
        pace.note(Duration::ZERO);
        assert!(!pace.is_slow());
    }

    #[test]
    fn each_poll_of_a_slow_container_has_a_thread_in_addition_to_the_usual_ones() {
        let (pool, _runtime) = started();
        let slow = quick();
        slow.note(LATE);
        let (begun, begins) = mpsc::channel();
        let (release, released) = mpsc::channel::<()>();
        let released = Arc::new(Mutex::new(released));
        for _ in 0..USUAL {
            let (begun, released) = (begun.clone(), released.clone());
            pool.spawn(slow.clone(), async move {
                begun.send(lock(&pool.state).threads).unwrap();
                _ = lock(&released).recv();
            });
        }
        let threads: Vec<_> = (0..USUAL).map(|_| begins.recv_timeout(LONG).unwrap()).collect();
        assert_eq!(threads.iter().max(), Some(&(2 * USUAL)));
        drop(release);
    }

    #[test]
    fn threads_that_are_kept_are_replaced_until_there_are_too_many() {
        let (pool, _runtime) = started();
        let (begun, begins) = mpsc::channel();
        let mut held = Vec::new();
        for _ in 0..MOST_OF_TEST + USUAL {
            let (release, released) = mpsc::channel::<()>();
            let begun = begun.clone();
            pool.spawn(quick(), async move {
                begun.send(()).unwrap();
                _ = released.recv();
            });
            held.push(release);
        }
        held.iter().for_each(|_| begins.recv_timeout(LONG).unwrap());
        let (ran, runs) = mpsc::channel();
        pool.spawn(quick(), async move { ran.send(()).unwrap() });
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
            pool.spawn(quick(), async {
                loop {
                    tokio::task::consume_budget().await;
                }
            });
        }
        pool.spawn(quick(), async move {
            receiver.await.unwrap();
            tokio::time::sleep(Duration::from_millis(1)).await;
            ended.send(()).unwrap();
        });
        sender.send(()).unwrap();
        ends.recv_timeout(LONG).unwrap();
    }

    /// A worker of tokio that gets an event and then waits in the poll that the event causes leaves nobody to wait for events.
    #[test]
    fn events_arrive_while_the_thread_that_the_last_event_woke_is_kept() {
        let (pool, runtime) = started();
        let pair = || {
            let (ours, theirs) = std::os::unix::net::UnixStream::pair().unwrap();
            ours.set_nonblocking(true).unwrap();
            let _events = runtime.enter();
            (tokio::net::UnixStream::from_std(ours).unwrap(), theirs)
        };
        let ((mut kept, mut wakes), (mut read, mut written)) = (pair(), pair());
        let (begun, begins) = mpsc::channel();
        let (release, released) = mpsc::channel::<()>();
        pool.spawn(quick(), async move {
            kept.read_u8().await.unwrap();
            begun.send(()).unwrap();
            _ = released.recv();
        });
        let (arrived, arrivals) = mpsc::channel();
        pool.spawn(quick(), async move {
            loop {
                let Ok(byte) = read.read_u8().await else { return };
                arrived.send(byte).unwrap();
            }
        });
        // Afterwards, both wait for events.
        written.write_all(&[1]).unwrap();
        arrivals.recv_timeout(LONG).unwrap();
        wakes.write_all(&[1]).unwrap();
        begins.recv_timeout(LONG).unwrap();
        written.write_all(&[2]).unwrap();
        assert_eq!(arrivals.recv_timeout(LONG), Ok(2));
        drop(release);
    }
}
