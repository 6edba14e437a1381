//! Counts work and faults, and keeps a history of events.

use std::collections::BTreeMap;
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::Instant;

/// The sums of a run.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Count {
    Containers,
    Pods,
    Execs,
    Streams,
    Bytes,
    Calls,
    /// Calls that were cut off by the end of containerd; these are no faults of the shim.
    CutOff,
    /// Lives with an unknown outcome: containerd ended during their Create.
    GivenUp,
    Events,
    Repeats,
}

/// Kinds of faults.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Fault {
    FailedCall,
    LostTask,
    WrongExit,
    WrongBytes,
    WrongEvents,
    Leak,
    Other,
}

impl Fault {
    pub const ALL: [Fault; 7] = [
        Fault::FailedCall,
        Fault::LostTask,
        Fault::WrongExit,
        Fault::WrongBytes,
        Fault::WrongEvents,
        Fault::Leak,
        Fault::Other,
    ];

    fn name(self) -> &'static str {
        match self {
            Fault::FailedCall => "failed calls",
            Fault::LostTask => "lost tasks",
            Fault::WrongExit => "wrong or missing exit codes",
            Fault::WrongBytes => "streams with missing or doubled bytes",
            Fault::WrongEvents => "missing, wrong or disordered events",
            Fault::Leak => "leaks",
            Fault::Other => "other failures",
        }
    }
}

/// The number of faults of one kind that are printed; more of them give no information.
const TOLD: usize = 20;

/// The number of entries in the history.
const HISTORY: usize = 40;

pub struct Tally {
    begin: Instant,
    sums: Mutex<Sums>,
}

#[derive(Default)]
struct Sums {
    counts: BTreeMap<Count, u64>,
    faults: BTreeMap<Fault, u64>,
    disturbances: BTreeMap<&'static str, u64>,
    history: Vec<String>,
}

impl Tally {
    pub fn new() -> Tally {
        Tally { begin: Instant::now(), sums: Mutex::default() }
    }

    fn sums(&self) -> MutexGuard<'_, Sums> {
        self.sums.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn at(&self) -> String {
        format!("{:8.3} s", self.begin.elapsed().as_secs_f64())
    }

    pub fn add(&self, count: Count, more: u64) {
        *self.sums().counts.entry(count).or_default() += more;
    }

    /// Counts a disturbance.
    pub fn disturbed(&self, name: &'static str) {
        *self.sums().disturbances.entry(name).or_default() += 1;
    }

    /// What a run must have had, and this one had none of.
    pub fn missing(&self, is_disturbed: bool) -> Vec<&'static str> {
        let sums = self.sums();
        let is_idle =
            !sums.counts.contains_key(&Count::Containers) && !sums.counts.contains_key(&Count::Pods);
        let is_calm = is_disturbed && sums.disturbances.is_empty();
        let missing =
            [(is_idle, "no container or pod lived to its end"), (is_calm, "no disturbance happened")];
        missing.into_iter().filter_map(|(is_missing, what)| is_missing.then_some(what)).collect()
    }

    /// Notes in the history that a disturbance begins.
    pub fn begin(&self, name: &'static str) {
        let line = format!("{}  {name}", self.at());
        let mut sums = self.sums();
        sums.history.push(line);
        let surplus = sums.history.len().saturating_sub(HISTORY);
        sums.history.drain(..surplus);
    }

    /// Prints a fault at once; before the first one, prints the history.
    pub fn fault(&self, fault: Fault, what: &str) {
        let line = format!("{}  FAULT ({}): {what}", self.at(), fault.name());
        let mut sums = self.sums();
        if sums.faults.is_empty() {
            println!("the history before the first fault:");
            sums.history.iter().for_each(|line| println!("  {line}"));
        }
        let count = sums.faults.entry(fault).or_default();
        *count += 1;
        if *count as usize <= TOLD {
            println!("{line}");
        }
    }

    pub fn faults(&self) -> u64 {
        self.sums().faults.values().sum()
    }

    pub fn progress(&self) -> String {
        let faults = self.faults();
        let sums = self.sums();
        let of = |count: Count| sums.counts.get(&count).copied().unwrap_or(0);
        let disturbances: u64 = sums.disturbances.values().sum();
        format!(
            "{}  {} containers, {} execs, {} streams, {} calls, {disturbances} disturbances, {faults} faults",
            self.at(),
            of(Count::Containers),
            of(Count::Execs),
            of(Count::Streams),
            of(Count::Calls)
        )
    }

    pub fn table(&self) -> String {
        let sums = self.sums();
        let of = |count: Count| sums.counts.get(&count).copied().unwrap_or(0);
        let mut lines = vec![
            ("containers, from create to delete".to_string(), of(Count::Containers)),
            ("pods with a sandbox of the shim".to_string(), of(Count::Pods)),
            ("execs, from add to delete".to_string(), of(Count::Execs)),
            ("streams compared byte for byte".to_string(), of(Count::Streams)),
            ("megabytes in them".to_string(), of(Count::Bytes) >> 20),
            ("calls".to_string(), of(Count::Calls)),
            ("  cut off by the end of containerd".to_string(), of(Count::CutOff)),
            ("  containers given up for that".to_string(), of(Count::GivenUp)),
            ("events".to_string(), of(Count::Events)),
            ("  come again as they were".to_string(), of(Count::Repeats)),
        ];
        lines.extend(sums.disturbances.iter().map(|(name, count)| (format!("disturbance: {name}"), *count)));
        lines.extend(Fault::ALL.map(|fault| {
            (format!("FAULTS: {}", fault.name()), sums.faults.get(&fault).copied().unwrap_or(0))
        }));
        lines.iter().map(|(name, count)| format!("  {name:<52} {count:>10}\n")).collect()
    }
}
