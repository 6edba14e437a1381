//! Threads that stay for a while after their work, for more work: starting a thread takes longer than most of the work of
//! [`super::waiting()`].

use std::io;
use std::sync::mpsc::{self, Receiver, RecvTimeoutError, SendError, Sender};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::Duration;

type Work = Box<dyn FnOnce() + Send>;

/// How long a thread stays without work.
const SPARE_LIMIT: Duration = Duration::from_secs(10);

/// The most threads without work. Execs one after the other need one; more are for several clients.
const MOST_SPARE: usize = 4;

/// Enough for opening and polling a few descriptors.
const STACK: usize = 256 << 10;

/// The threads of one name, which run any work.
pub(super) struct SpareThreads {
    name: &'static str,
    limit: Duration,
    /// Those without work, and the number of the next one.
    spare: Mutex<(Vec<Spare>, u64)>,
}

/// How a thread without work gets some.
struct Spare {
    number: u64,
    work: Sender<Work>,
}

impl SpareThreads {
    pub(super) const fn new(name: &'static str) -> Self {
        Self::with_limit(name, SPARE_LIMIT)
    }

    const fn with_limit(name: &'static str, limit: Duration) -> Self {
        Self { name, limit, spare: Mutex::new((Vec::new(), 0)) }
    }

    fn spare(&self) -> MutexGuard<'_, (Vec<Spare>, u64)> {
        self.spare.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Runs work in a thread without work, or in a new one.
    ///
    /// # Errors
    /// No thread can be started. The work is not done.
    pub(super) fn run(&'static self, work: impl FnOnce() + Send + 'static) -> io::Result<()> {
        let mut work: Work = Box::new(work);
        while let Some(spare) = self.take() {
            match spare.work.send(work) {
                Ok(()) => return Ok(()),
                // A thread that is available receives until it gets work, so this is not reached.
                Err(SendError(back)) => work = back,
            }
        }
        let thread = std::thread::Builder::new().name(self.name.to_owned()).stack_size(STACK);
        thread.spawn(move || self.work(work)).map(drop)
    }

    fn take(&self) -> Option<Spare> {
        self.spare().0.pop()
    }

    /// The life of a thread.
    fn work(&self, first: Work) {
        first();
        let (sender, receiver) = mpsc::channel();
        while let Some(number) = self.offer(&sender) {
            match self.next(number, &receiver) {
                Some(work) => work(),
                None => return,
            }
        }
    }

    /// Makes the current thread available, and returns its number. `None` if enough threads are.
    fn offer(&self, work: &Sender<Work>) -> Option<u64> {
        let mut spare = self.spare();
        let (threads, next) = &mut *spare;
        if threads.len() >= MOST_SPARE {
            return None;
        }
        let number = *next;
        *next = next.wrapping_add(1);
        threads.push(Spare { number, work: work.clone() });
        Some(number)
    }

    /// Waits for work. `None` if there was none for a while; the thread is not available any more.
    fn next(&self, number: u64, work: &Receiver<Work>) -> Option<Work> {
        match work.recv_timeout(self.limit) {
            Ok(work) => return Some(work),
            Err(RecvTimeoutError::Timeout) => {}
            Err(RecvTimeoutError::Disconnected) => return None,
        }
        let mut spare = self.spare();
        let before = spare.0.len();
        spare.0.retain(|thread| thread.number != number);
        if spare.0.len() < before {
            return None;
        }
        drop(spare);
        // A caller has just taken this thread, and sends work to it.
        work.recv().ok()
    }
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::{AtomicUsize, Ordering};
    use std::thread::ThreadId;
    use std::time::Instant;

    use super::*;

    fn threads(limit: Duration) -> &'static SpareThreads {
        Box::leak(Box::new(SpareThreads::with_limit("test", limit)))
    }

    /// The thread that does some work.
    fn worker(threads: &'static SpareThreads) -> ThreadId {
        let (tell, told) = mpsc::channel();
        threads.run(move || tell.send(std::thread::current().id()).unwrap()).unwrap();
        told.recv().unwrap()
    }

    /// Waits until this many threads have no work.
    fn await_spare(threads: &SpareThreads, count: usize) {
        while threads.spare().0.len() != count {
            std::thread::yield_now();
        }
    }

    #[test]
    fn a_thread_does_more_work_after_its_first() {
        let threads = threads(Duration::from_secs(60));
        let first = worker(threads);
        for _ in 0..100 {
            await_spare(threads, 1);
            assert_eq!(worker(threads), first);
        }
    }

    #[test]
    fn work_does_not_wait_for_a_thread_that_works() {
        let threads = threads(Duration::from_secs(60));
        let (end, ended) = mpsc::channel::<()>();
        threads
            .run(move || {
                let _ = ended.recv();
            })
            .unwrap();
        worker(threads);
        drop(end);
        await_spare(threads, 2);
    }

    #[test]
    fn few_threads_stay() {
        let threads = threads(Duration::from_secs(60));
        let (end, ended) = mpsc::channel::<()>();
        let ended = std::sync::Arc::new(Mutex::new(ended));
        let (tell, told) = mpsc::channel::<()>();
        for _ in 0..MOST_SPARE + 3 {
            let (ended, tell) = (ended.clone(), tell.clone());
            let work = move || {
                let _ = ended.lock().unwrap().recv();
                drop(tell);
            };
            threads.run(work).unwrap();
        }
        drop((end, tell));
        told.recv().unwrap_err();
        await_spare(threads, MOST_SPARE);
    }

    #[test]
    fn no_work_is_lost_while_threads_end() {
        let threads = threads(Duration::from_micros(50));
        let done = std::sync::Arc::new(AtomicUsize::new(0));
        for count in 1..=2000 {
            let one = done.clone();
            threads
                .run(move || {
                    one.fetch_add(1, Ordering::Relaxed);
                })
                .unwrap();
            // Threads end at about the time at which the next work comes.
            let pause = Instant::now() + Duration::from_micros(count % 150);
            while Instant::now() < pause {
                std::thread::yield_now();
            }
        }
        while done.load(Ordering::Relaxed) < 2000 {
            std::thread::yield_now();
        }
        await_spare(threads, 0);
    }
}
