//! A systemd for tests. It keeps units in memory; [`Programs`] decides what runs in them.
//!
//! Processes are real and sleep: they can be signalled, and their pids are unique. Every call is an effect (`effects`): a
//! test can end the daemon before it, or let it fail.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::os::unix::process::ExitStatusExt;
use std::path::PathBuf;
use std::process::{Child, Command, ExitStatus, Stdio};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use nix::sys::signal::{SigSet, SigmaskHow, Signal};

use tokio::sync::Notify;

use crate::cgroup::fake as cgroup;
use crate::effects::{Effects, Failure};
use crate::id::UnitName;

use super::error::Error;
use super::job::{Jobs, StartJob};
use super::main_process::{MainProcess, WaitStatus};
use super::observations::Observations;

mod calls;

/// A unit that is loaded.
#[derive(Debug, Default)]
struct Unit {
    active: &'static str,
    main: MainProcess,
    child: Option<Sleeper>,
    cgroup: Option<PathBuf>,
    is_referenced: bool,
    /// True if the daemon has not asked for the unit.
    is_foreign: bool,
}

impl Unit {
    fn is_collected(&self) -> bool {
        self.active == "inactive" && !self.is_referenced
    }
}

/// A process that sleeps until it is killed.
#[derive(Debug)]
pub struct Sleeper(Child);

impl Sleeper {
    /// Starts the process. It blocks SIGHUP, as the first process of a sandbox does: the start of a sandbox waits for that.
    pub fn spawn() -> Self {
        let mut command = Command::new("sleep");
        command.arg("1000").stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null());
        let hangup = SigSet::from_iter([Signal::SIGHUP]);
        // A child inherits the mask of the thread that makes it.
        let earlier = hangup.thread_swap_mask(SigmaskHow::SIG_BLOCK).unwrap();
        let child = command.spawn();
        earlier.thread_set_mask().unwrap();
        Self(child.unwrap())
    }

    pub fn pid(&self) -> u32 {
        self.0.id()
    }

    fn kill(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

impl Drop for Sleeper {
    fn drop(&mut self) {
        self.kill();
    }
}

/// What runs in the units.
pub trait Programs: Send + Sync {
    /// Starts the process for which a unit exists.
    fn start(&self, unit: &UnitName) -> Started;

    /// Does what these programs do when systemd stops their unit.
    fn stop(&self, unit: &UnitName);
}

/// The result of the start of a unit.
pub enum Started {
    /// The unit is active. Its process is of no interest to the test.
    Empty,
    /// The unit has failed.
    Failed,
    /// The unit is active, and this is its main process: `Type=forking`.
    Forked {
        /// The main process.
        process: Sleeper,
        /// The cgroup of the process, below the unit's.
        cgroup: PathBuf,
    },
    /// The unit is being started while this process runs: `Type=oneshot`.
    Oneshot {
        /// The main process.
        process: Sleeper,
        /// The cgroup of the process, which belongs to another unit.
        cgroup: Option<PathBuf>,
    },
}

#[derive(Debug)]
struct State {
    units: BTreeMap<UnitName, Unit>,
    observations: Arc<Observations>,
    /// How many containers have been launched.
    launched: usize,
    /// The unit that looks as if it were not loaded when its state is read next.
    hidden: Option<UnitName>,
    /// Where the files are that are hidden, and where they belong.
    hidden_files: Vec<(PathBuf, PathBuf)>,
    /// How many processes were killed in each unit because memory ran out. `None`: nobody answers.
    oom_kills: Option<u64>,
    /// How long the answer to that takes.
    oom_kills_take: Duration,
    /// The active slices.
    slices: BTreeSet<UnitName>,
    /// The slices that were stopped, in this order.
    stopped_slices: Vec<String>,
    /// The units whose properties were set, in this order.
    limited: Vec<String>,
    /// True if calls that add references get no answer.
    answers_no_references: bool,
    /// How often the references of earlier daemons were dropped.
    forgotten: usize,
    /// How often a daemon has made sure of the order of stops at shutdown.
    orders: usize,
    /// If present, systemd reports the end of a stop job only when this is notified.
    slow_stops: Option<Arc<Notify>>,
}

impl State {
    fn new() -> Self {
        Self {
            units: BTreeMap::new(),
            observations: Arc::default(),
            launched: 0,
            hidden: None,
            hidden_files: Vec::new(),
            oom_kills: Some(0),
            oom_kills_take: Duration::ZERO,
            slices: BTreeSet::new(),
            stopped_slices: Vec::new(),
            limited: Vec::new(),
            answers_no_references: false,
            forgotten: 0,
            orders: 0,
            slow_stops: None,
        }
    }
}

pub struct FakeSystemd {
    effects: Arc<Effects>,
    programs: Arc<dyn Programs>,
    jobs: Jobs,
    state: Mutex<State>,
}

impl FakeSystemd {
    /// One without units.
    pub fn new(effects: Arc<Effects>, programs: Arc<dyn Programs>) -> Arc<Self> {
        Arc::new(Self { effects, programs, jobs: Jobs::default(), state: Mutex::new(State::new()) })
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Reports to these observations from now on: those of a new daemon.
    pub fn observed_by(&self, observations: Arc<Observations>) {
        self.state().observations = observations;
    }

    /// How many containers have been launched.
    pub fn launched(&self) -> usize {
        self.state().launched
    }

    /// Makes this unit look as if it were not loaded when its state is read next.
    pub fn hide_once(&self, unit: UnitName) {
        self.state().hidden = Some(unit);
    }

    /// As [`Self::hide_once`], also for files that were made in the unit: they are there again when a unit is started next.
    pub fn hide_with_files(&self, unit: UnitName, files: &[PathBuf]) {
        self.hide_once(unit);
        let aside = |file: &PathBuf| (file.with_extension("hidden"), file.clone());
        let hidden = files.iter().filter(|file| file.exists()).map(aside);
        let hidden: Vec<_> = hidden.inspect(|(to, file)| fs::rename(file, to).unwrap()).collect();
        self.state().hidden_files = hidden;
    }

    /// Determines how many processes were killed in each unit because memory ran out. `None`: nobody answers.
    pub fn set_oom_kills(&self, kills: Option<u64>) {
        self.state().oom_kills = kills;
    }

    /// Determines how long systemd takes to answer how many processes were killed because memory ran out.
    pub fn delay_oom_kills(&self, time: Duration) {
        self.state().oom_kills_take = time;
    }

    /// Determines whether calls that add references get an answer.
    pub fn answer_references(&self, does: bool) {
        self.state().answers_no_references = !does;
    }

    /// From now on, systemd reports the end of a stop job only when the returned value is notified.
    pub fn slow_stops(&self) -> Arc<Notify> {
        self.state().slow_stops.get_or_insert_default().clone()
    }

    /// How often a daemon has dropped the references of earlier ones.
    pub fn forgotten(&self) -> usize {
        self.state().forgotten
    }

    /// How often a daemon has made sure of the order of stops at shutdown.
    pub fn orders(&self) -> usize {
        self.state().orders
    }

    /// The units whose properties were set, in this order.
    pub fn limited(&self) -> Vec<String> {
        self.state().limited.clone()
    }

    /// Makes a slice active.
    pub fn add_slice(&self, slice: UnitName) {
        self.state().slices.insert(slice);
    }

    /// The slices that were stopped, in this order.
    pub fn stopped_slices(&self) -> Vec<String> {
        self.state().stopped_slices.clone()
    }

    /// Starts a unit that no daemon of ours has asked for.
    pub fn start_foreign(&self, unit: UnitName) {
        let foreign = Unit { is_foreign: true, ..running("active", Sleeper::spawn(), None) };
        self.state().units.insert(unit, foreign);
    }

    /// True if a unit has a process that runs.
    pub fn runs(&self, unit: &UnitName) -> bool {
        let process = |unit: &mut Unit| unit.child.as_mut().map(|child| child.0.try_wait());
        matches!(self.with(unit, process), Some(Some(Ok(None))))
    }

    /// Every loaded unit and its state.
    pub fn units(&self) -> Vec<(String, &'static str)> {
        let state = self.state();
        state.units.iter().map(|(name, unit)| (name.to_string(), unit.active)).collect()
    }

    /// Ends the main process of a unit with this exit code, without a signal on the bus.
    pub fn end_unheard(&self, unit: &UnitName, code: i32) {
        let mut state = self.state();
        if let Some(unit) = state.units.get_mut(unit) {
            end(unit, WaitStatus { code: 1, status: code, at_usec: Some(7) });
        }
    }

    /// Ends the process of a unit, without a signal on the bus. systemd never had this process as the main process: its own one,
    /// if there was any, ended as stated.
    pub fn end_unknown(&self, unit: &UnitName, own: Option<i32>) {
        let mut state = self.state();
        if let Some(unit) = state.units.get_mut(unit) {
            end(unit, WaitStatus { code: 1, status: own.unwrap_or_default(), at_usec: Some(7) });
            unit.main = match own {
                Some(_) => MainProcess { last_pid: Some(1), ..unit.main },
                None => MainProcess::default(),
            };
        }
    }

    /// Ends the main process of a unit with this exit code.
    pub fn end(&self, unit: &UnitName, code: i32) {
        self.end_unheard(unit, code);
        self.tell(unit);
    }

    /// Ends the main process of a unit by this signal.
    pub fn end_by_signal(&self, unit: &UnitName, signal: i32) {
        if let Some(unit) = self.state().units.get_mut(unit) {
            end(unit, WaitStatus { code: 2, status: signal, at_usec: Some(7) });
        }
        self.tell(unit);
    }

    /// Reports the main process of a unit, possibly once more.
    pub fn tell(&self, unit: &UnitName) {
        let state = self.state();
        if let Some(found) = state.units.get(unit) {
            state.observations.reported(unit.clone(), found.main);
        }
    }

    /// Reports an earlier process of the unit, late.
    pub fn tell_late(&self, unit: &UnitName, pid: u32, code: i32) {
        let ended = Some(WaitStatus { code: 1, status: code, at_usec: Some(3) });
        self.state()
            .observations
            .reported(unit.clone(), MainProcess { pid: None, last_pid: Some(pid), ended });
    }

    /// Reports that signals may have been missed: the bus was lost, or systemd was reloaded.
    pub fn lose_signals(&self) {
        self.state().observations.missed();
    }

    /// Ends the main process of a unit that systemd unloads at once: somebody has removed its file.
    pub fn end_and_unload(&self, unit: &UnitName, code: i32) {
        self.end(unit, code);
        self.state().units.remove(unit);
    }

    /// Unloads a unit, as an administrator can. Its exit code is lost.
    pub fn unload(&self, unit: &UnitName) {
        if let Some(mut gone) = self.state().units.remove(unit) {
            end(&mut gone, WaitStatus::killed_at(7));
        }
    }

    /// Does what the kernel and systemd do without a call: ends processes that were killed, and reports it.
    pub fn tick(&self) {
        let mut state = self.state();
        let State { units, observations, .. } = &mut *state;
        // The kernel kills all processes of a cgroup at once, before systemd removes it.
        for unit in units.values_mut() {
            if unit.cgroup.as_deref().is_some_and(cgroup::is_to_be_killed)
                && let Some(child) = &mut unit.child
            {
                child.kill();
            }
        }
        for (name, unit) in units {
            let status = unit.child.as_mut().and_then(|child| child.0.try_wait().ok().flatten());
            if let Some(status) = status {
                end(unit, ended_by(status));
                observations.reported(name.clone(), unit.main);
            }
        }
    }

    async fn call(&self, verb: &'static str, unit: &UnitName) -> Result<(), Error> {
        // An answer of the bus never comes at once.
        tokio::task::yield_now().await;
        let reached = self.effects.reach(format!("{verb} {unit}")).await;
        reached.map_err(|failure| error(verb, unit.as_str(), failure))
    }

    fn begin(&self, name: &UnitName, is_referenced: bool) -> Result<StartJob, Error> {
        let waiter = self.jobs.wait_for(name);
        let mut state = self.state();
        state.hidden_files.drain(..).for_each(|(from, file)| fs::rename(from, file).unwrap());
        if state.units.contains_key(name) {
            return Err(Error::Exists { unit: name.to_string() });
        }
        let mut unit = match self.programs.start(name) {
            Started::Empty => Unit { active: "active", ..Unit::default() },
            Started::Failed => Unit { active: "failed", ..Unit::default() },
            Started::Forked { process, cgroup } => running("active", process, Some(cgroup)),
            Started::Oneshot { process, cgroup } => running("activating", process, cgroup),
        };
        unit.is_referenced = is_referenced;
        // Only units of containers have references.
        state.launched += usize::from(is_referenced);
        state.units.insert(name.clone(), unit);
        Ok(StartJob { waiter, job: None })
    }

    fn stop_now(&self, name: &UnitName) {
        let mut state = self.state();
        let State { units, observations, .. } = &mut *state;
        if let Some(unit) = units.get_mut(name) {
            if unit.child.is_some() {
                end(unit, WaitStatus::killed_at(7));
                observations.reported(name.clone(), unit.main);
            }
            if unit.active != "failed" {
                unit.active = "inactive";
            }
        }
        state.units.retain(|_, unit| !unit.is_collected());
    }

    fn with<T>(&self, name: &UnitName, read: impl FnOnce(&mut Unit) -> T) -> Option<T> {
        self.state().units.get_mut(name).map(read)
    }
}

fn running(active: &'static str, child: Sleeper, cgroup: Option<PathBuf>) -> Unit {
    let main = MainProcess { pid: Some(child.pid()), last_pid: Some(child.pid()), ended: None };
    Unit { active, main, child: Some(child), cgroup, ..Unit::default() }
}

fn end(unit: &mut Unit, ended: WaitStatus) {
    let Some(mut child) = unit.child.take() else {
        return;
    };
    child.kill();
    cgroup::forget_process(child.pid());
    // The cgroup of a container is removed with its unit. An exec is in the cgroup of its container.
    if unit.active == "active"
        && let Some(place) = &unit.cgroup
    {
        cgroup::remove(place.parent().unwrap_or(place));
    }
    unit.main = MainProcess { pid: None, last_pid: Some(child.pid()), ended: Some(ended) };
    // The unit of an exec never fails, whatever its exit code is.
    unit.active = if ended.exit_status() == 0 || unit.active == "activating" { "active" } else { "failed" };
}

fn ended_by(status: ExitStatus) -> WaitStatus {
    match (status.code(), status.signal()) {
        (Some(code), _) => WaitStatus { code: 1, status: code, at_usec: Some(7) },
        (None, signal) => WaitStatus { code: 2, status: signal.unwrap_or_default(), at_usec: Some(7) },
    }
}

fn error(verb: &'static str, unit: &str, failure: Failure) -> Error {
    let refused = |name: &str| Error::Refused {
        verb,
        unit: unit.to_owned(),
        name: name.to_owned(),
        reason: "as the test wants".to_owned(),
    };
    match failure {
        Failure::NoSpace => refused("System.Error.ENOSPC"),
        Failure::TooManyFiles => refused("System.Error.EMFILE"),
        Failure::LimitsExceeded => refused("org.freedesktop.DBus.Error.LimitsExceeded"),
        Failure::Refused => refused("org.freedesktop.DBus.Error.AccessDenied"),
        Failure::Timeout | Failure::NoReply => Error::no_answer(),
    }
}
