//! Suspects: requests and records that may crash the daemon. One that crashed it twice is not tried a third time.
//!
//! The next daemon serves a request again that a crash left unanswered, and recovers every record. If that crashes the
//! daemon because of a bug, it would do so again and again, and no task of the node could be served. So the crashes of each
//! suspect are counted.
//!
//! Only a crash of the thread that works on the suspect counts (`sys::crash`: the handler of SIGABRT, SIGSEGV and similar
//! signals records the suspect in a file). That a request was unanswered when the daemon ended is no evidence: an
//! administrator may kill the daemon many times a second, and a Wait is unanswered as long as its container runs. So
//! SIGKILL and other signals from outside do not count, nor do other requests that were running during the crash.
//!
//! A suspect is set while its future is polled ([`Suspect::watch`]) or its function runs ([`Suspect::run`]). Spawned work
//! inherits it ([`inherit`], [`inherit_fn`]).
//!
//! A hang counts as a crash: a future that is polled for too long occupies one of the few threads that serve all calls.
//! [`end_if_hanging`] ends the daemon then. If all threads hang, systemd's watchdog does (SIGABRT).
//!
//! The file is on the tmpfs of the records, so a reboot removes it. If an administrator removes it, everything is tried
//! again.

use std::collections::HashMap;
use std::fs::{File, OpenOptions};
use std::io;
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::path::Path;
use std::pin::Pin;
use std::sync::{Mutex, PoisonError};
use std::task::{Context, Poll};
use std::time::Duration;

use tokio::time::MissedTickBehavior;

use crate::id::{TaskKey, stable_hash};
use crate::sys::crash::{self, Step};

/// The number of crashes after which a suspect is not tried any more.
pub const LIMIT: usize = 2;

/// The number of crashes that the file has room for. A daemon that starts keeps the newest half of them. The file always
/// has its full size, so that it can be written when `/run` is full.
const MAX_CRASHES: usize = 512;

/// Set in the numbers of records, so that they differ from those of requests.
const RECORD: u64 = 1 << 63;

/// A request or a record that may crash the daemon.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Suspect(u64);

impl Suspect {
    /// A request. Its stream is part of its identity: the same call at another time is another suspect.
    pub fn request(stream: u32, service: &str, method: &str, payload: &[u8]) -> Self {
        let number = stable_hash(&[&stream.to_le_bytes(), service.as_bytes(), method.as_bytes(), payload]);
        // Zero stands for no suspect.
        Self(number & !RECORD | 1)
    }

    /// The record of a task, while it is being recovered.
    pub fn record(key: &TaskKey) -> Self {
        Self(stable_hash(&[key.namespace.as_str().as_bytes(), key.word().as_bytes()]) | RECORD)
    }

    /// Runs a function while this suspect is set.
    pub fn run<T>(self, work: impl FnOnce() -> T) -> T {
        let _scope = Scope::enter(self.0);
        let _step = Step::begin(self.0);
        work()
    }

    /// Makes a future that is polled while this suspect is set.
    pub fn watch<F>(self, work: F) -> Watched<F> {
        Watched { suspect: self.0, work: Box::pin(work) }
    }
}

/// The number of the request that is being served, for notes about its outcome: a replay of the request has the same number,
/// the same call at another time has another one. `None` if no request is being served.
pub fn request() -> Option<u64> {
    let subject = crash::subject();
    (subject != 0 && subject & RECORD == 0).then_some(subject)
}

/// The suspect that is set in this thread.
#[cfg(test)]
fn current() -> Option<Suspect> {
    let subject = crash::subject();
    (subject != 0).then_some(Suspect(subject))
}

/// Passes the current suspect to a future that is about to be spawned.
pub fn inherit<F>(work: F) -> Watched<F> {
    Watched { suspect: crash::subject(), work: Box::pin(work) }
}

/// Passes the current suspect to a function that is about to run in another thread.
pub fn inherit_fn<T>(work: impl FnOnce() -> T) -> impl FnOnce() -> T {
    let subject = crash::subject();
    move || {
        let _scope = Scope::enter(subject);
        work()
    }
}

/// A future that is polled while a suspect is set.
pub struct Watched<F> {
    suspect: u64,
    work: Pin<Box<F>>,
}

impl<F: Future> Future for Watched<F> {
    type Output = F::Output;

    fn poll(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<F::Output> {
        let _scope = Scope::enter(self.suspect);
        let _step = Step::begin(self.suspect);
        self.work.as_mut().poll(context)
    }
}

/// Ends the daemon if a suspect has occupied a thread without a pause for at least `limit` and at most twice as long. The
/// suspect is recorded as in a crash. Never returns otherwise.
///
/// A suspect is judged only by time in which this function ran: a daemon that was frozen or stopped meanwhile is not ended. Nor
/// does the time count for which its thread has waited for a processor: the machine is busy.
pub async fn end_if_hanging(limit: Duration) {
    crash::set_hang_limit(limit);
    let mut ticks = tokio::time::interval(limit / 2);
    ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
    let mut seen = Vec::new();
    loop {
        ticks.tick().await;
        let running: Vec<_> = crash::steps().into_iter().map(|step| (step, step.waited())).collect();
        seen = look(&seen, &running, limit / 2);
        if let Some(hanging) = seen.iter().find(|seen| seen.occupied >= limit) {
            tracing::error!(
                "a request or a record has occupied a thread of the daemon for {} s: the daemon ends, and the next one tries it again",
                limit.as_secs()
            );
            crash::set_subject(hanging.step.subject);
            std::process::abort();
        }
    }
}

/// A running step that a look has found.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Seen<S> {
    step: S,
    /// For how long it has occupied its thread since the first look.
    occupied: Duration,
    /// For how long its thread had waited for a processor at this look.
    waited: Duration,
}

/// Looks at the steps that run, and at how long the thread of each has waited for a processor. `interval` is the time since the
/// last look.
fn look<S: PartialEq + Copy>(
    seen: &[Seen<S>],
    running: &[(S, Duration)],
    interval: Duration,
) -> Vec<Seen<S>> {
    let found = |&(step, waited): &(S, Duration)| {
        let before = seen.iter().find(|seen| seen.step == step);
        let occupied = before.map_or(Duration::ZERO, |before| {
            before.occupied + interval.saturating_sub(waited.saturating_sub(before.waited))
        });
        Seen { step, occupied, waited }
    };
    running.iter().map(found).collect()
}

/// Sets a suspect in this thread until it is dropped.
struct Scope(u64);

impl Scope {
    fn enter(suspect: u64) -> Self {
        Self(crash::set_subject(suspect))
    }
}

impl Drop for Scope {
    fn drop(&mut self) {
        crash::set_subject(self.0);
    }
}

/// The crashes of earlier daemons.
#[derive(Debug, Default)]
pub struct Crashes {
    file: Option<File>,
    earlier: Mutex<HashMap<u64, Earlier>>,
}

#[derive(Clone, Copy, Debug, Default)]
struct Earlier {
    count: usize,
    /// The suspect was seen by this daemon.
    is_known: bool,
}

impl Crashes {
    /// Reads the crashes of earlier daemons, and installs the handler that records the crash of this one.
    ///
    /// # Errors
    /// The file can't be opened, or the signals of a crash can't be handled.
    pub fn open(path: &Path) -> io::Result<Self> {
        let crashes = Self::read(path)?;
        if let Some(file) = &crashes.file {
            crash::note_in(file, crashes.end())?;
        }
        Ok(crashes)
    }

    /// Notes a crash as the signal handler does.
    #[cfg(test)]
    pub fn note_for_tests(path: &Path, suspect: Suspect) {
        let file = OpenOptions::new().read(true).write(true).create(true).truncate(false).open(path).unwrap();
        let at = crash::read(&file, MAX_CRASHES).unwrap().len() as u64 * crash::ENTRY;
        file.write_all_at(&suspect.0.to_le_bytes(), at).unwrap();
    }

    /// Reads the file. The crash of this process will not be noted in it.
    pub fn read(path: &Path) -> io::Result<Self> {
        let mut options = OpenOptions::new();
        let file = options.read(true).write(true).create(true).truncate(false).mode(0o600).open(path)?;
        let mut earlier: HashMap<u64, Earlier> = HashMap::new();
        let entries = crash::read(&file, MAX_CRASHES)?;
        for entry in entries.into_iter().rev().take(MAX_CRASHES / 2) {
            earlier.entry(entry).or_default().count += 1;
        }
        let crashes = Self { file: Some(file), earlier: Mutex::new(earlier) };
        crashes.write()?;
        Ok(crashes)
    }

    /// How often a suspect crashed the daemon.
    pub fn count(&self, suspect: Suspect) -> usize {
        let mut earlier = self.earlier.lock().unwrap_or_else(PoisonError::into_inner);
        earlier.get_mut(&suspect.0).map_or(0, |found| {
            found.is_known = true;
            found.count
        })
    }

    /// True if the suspect must not be tried again.
    pub fn is_given_up(&self, suspect: Suspect) -> bool {
        self.count(suspect) >= LIMIT
    }

    /// Removes the crashes of a suspect, so that it is tried again.
    pub fn forget(&self, suspect: Suspect) {
        self.retain(|number, _| number != suspect.0);
    }

    /// Removes the requests that were not seen since [`Self::open`]: they were answered, or their connection was closed.
    pub fn forget_answered(&self) {
        self.retain(|number, found| number & RECORD != 0 || found.is_known);
    }

    /// Removes all records: this daemon has recovered them without a crash.
    pub fn forget_records(&self) {
        self.retain(|number, _| number & RECORD == 0);
    }

    fn retain(&self, keep: impl Fn(u64, &Earlier) -> bool) {
        self.earlier
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .retain(|number, found| keep(*number, found));
        if let Err(error) = self.write() {
            tracing::warn!(%error, "can't update the file of earlier crashes: {error}");
        }
    }

    fn end(&self) -> u64 {
        let earlier = self.earlier.lock().unwrap_or_else(PoisonError::into_inner);
        earlier.values().map(|found| found.count as u64).sum::<u64>() * crash::ENTRY
    }

    fn write(&self) -> io::Result<()> {
        let Some(file) = &self.file else {
            return Ok(());
        };
        let end = self.end();
        let earlier = self.earlier.lock().unwrap_or_else(PoisonError::into_inner);
        let entries = earlier.iter().flat_map(|(number, found)| std::iter::repeat_n(*number, found.count));
        let mut bytes: Vec<u8> = entries.flat_map(u64::to_le_bytes).collect();
        bytes.resize(MAX_CRASHES * crash::ENTRY as usize, 0);
        file.write_all_at(&bytes, 0)?;
        crash::continue_at(end);
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::path::PathBuf;
    use tempfile::TempDir;

    /// A directory with the file of crashes.
    struct Scratch(TempDir);

    impl Scratch {
        fn new() -> Self {
            Self(tempfile::tempdir().unwrap())
        }

        fn file(&self) -> PathBuf {
            self.0.path().join("crashes")
        }

        fn crash(&self, suspect: Suspect) {
            Crashes::note_for_tests(&self.file(), suspect);
        }
    }

    fn key(id: &str) -> TaskKey {
        use crate::id::{Namespace, TaskId};
        TaskKey::usual(Namespace::new("default").unwrap(), TaskId::new(id).unwrap())
    }

    #[test]
    fn the_same_call_on_another_stream_is_another_suspect_and_a_replayed_one_the_same() {
        let first = Suspect::request(1, "s", "Pids", b"web");
        assert_eq!(first, Suspect::request(1, "s", "Pids", b"web"));
        assert_ne!(first, Suspect::request(3, "s", "Pids", b"web"));
        assert_ne!(first, Suspect::request(1, "s", "Kill", b"web"));
        assert_ne!(Suspect::record(&key("a")), Suspect::record(&key("b")));
    }

    /// A later daemon, possibly of another version, compares the numbers with those that this one has written.
    #[test]
    fn the_numbers_of_suspects_never_change() {
        let request = Suspect::request(3, "containerd.task.v2.Task", "Pids", b"web");
        assert_eq!(request, Suspect(0x4905_23aa_5796_8e5b));
        assert_eq!(Suspect::record(&key("web")), Suspect(0xb454_bea5_9653_4e6a));
    }

    #[test]
    fn a_request_that_crashed_two_daemons_is_given_up_and_no_other() {
        let scratch = Scratch::new();
        let (poison, innocent) =
            (Suspect::request(1, "s", "Pids", b""), Suspect::request(3, "s", "Wait", b""));
        assert_eq!(Crashes::read(&scratch.file()).unwrap().count(poison), 0);
        for count in 1..=LIMIT {
            scratch.crash(poison);
            let crashes = Crashes::read(&scratch.file()).unwrap();
            assert_eq!((crashes.count(poison), crashes.count(innocent)), (count, 0));
            crashes.forget_answered();
        }
        assert!(Crashes::read(&scratch.file()).unwrap().is_given_up(poison));
    }

    #[test]
    fn answered_requests_and_recovered_records_have_no_crash_count() {
        let scratch = Scratch::new();
        let (request, record) = (Suspect::request(1, "s", "Pids", b""), Suspect::record(&key("web")));
        drop(Crashes::read(&scratch.file()).unwrap());
        scratch.crash(request);
        scratch.crash(record);
        // The request was answered by this daemon.
        Crashes::read(&scratch.file()).unwrap().forget_answered();
        let crashes = Crashes::read(&scratch.file()).unwrap();
        assert_eq!((crashes.count(request), crashes.count(record)), (0, 1));
        crashes.forget_records();
        assert_eq!(Crashes::read(&scratch.file()).unwrap().count(record), 0);
    }

    #[test]
    fn a_file_of_any_content_is_bounded() {
        let scratch = Scratch::new();
        std::fs::write(scratch.file(), vec![7; 1 << 20]).unwrap();
        let crashes = Crashes::read(&scratch.file()).unwrap();
        assert_eq!(crashes.end(), MAX_CRASHES as u64 / 2 * crash::ENTRY);
    }

    /// For how long steps have occupied their threads at the last of some looks, which come once a second. A step is a number; the
    /// other number says how long its thread has waited for a processor, in milliseconds.
    fn occupied(looks: &[&[(u8, u64)]]) -> Vec<(u8, u128)> {
        let interval = Duration::from_secs(1);
        let last = looks.iter().fold(Vec::new(), |seen, running| {
            let running: Vec<_> =
                running.iter().map(|(step, waited)| (*step, Duration::from_millis(*waited))).collect();
            look(&seen, &running, interval)
        });
        last.iter().map(|seen| (seen.step, seen.occupied.as_millis())).collect()
    }

    #[test]
    fn a_step_occupies_its_thread_from_the_first_look_on() {
        assert_eq!(occupied(&[&[(1, 0)]]), [(1, 0)]);
        assert_eq!(occupied(&[&[(1, 0)], &[(2, 0), (1, 0)], &[(1, 0), (2, 0)]]), [(1, 2000), (2, 1000)]);
        assert_eq!(occupied(&[&[(1, 0)], &[], &[(1, 0)]]), [(1, 0)], "it paused");
    }

    #[test]
    fn the_time_for_which_a_thread_waits_for_a_processor_does_not_count() {
        assert_eq!(occupied(&[&[(1, 5000)], &[(1, 5900)], &[(1, 7200)]]), [(1, 100)]);
        assert_eq!(occupied(&[&[(1, 5000)], &[(1, 5500)], &[(1, 6000)], &[(1, 6500)]]), [(1, 1500)]);
    }

    #[tokio::test]
    async fn a_suspect_runs_a_step_while_it_is_polled_and_not_while_it_waits() {
        let suspect = Suspect::request(1, "s", "Pids", b"a step");
        let runs = move || crash::steps().iter().any(|step| step.subject == suspect.0);
        let (go, gone) = tokio::sync::oneshot::channel();
        let work = tokio::spawn(suspect.watch(async move {
            assert!(runs());
            gone.await.unwrap();
            assert!(runs());
        }));
        tokio::task::yield_now().await;
        assert!(!runs());
        go.send(()).unwrap();
        work.await.unwrap();
        assert!(!runs());
    }

    #[tokio::test]
    async fn a_suspect_is_current_while_it_is_polled_and_passed_on_to_what_is_spawned() {
        let suspect = Suspect::request(1, "s", "Pids", b"");
        let found = suspect.watch(async {
            tokio::task::yield_now().await;
            let spawned = tokio::spawn(inherit(async { current() })).await.unwrap();
            let blocking = tokio::task::spawn_blocking(inherit_fn(current)).await.unwrap();
            (current(), spawned, blocking)
        });
        assert_eq!(found.await, (Some(suspect), Some(suspect), Some(suspect)));
        assert_eq!(current(), None);
    }
}
