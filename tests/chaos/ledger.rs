//! Notes what the clients did, for the comparison with the events.

use std::collections::HashMap;
use std::sync::{Mutex, PoisonError};
use std::time::Instant;

use super::common::audit::Audit;
use super::containerd::Containerd;
use super::pods;
use super::tally::{Fault, Tally};

/// One process that has ended.
struct Ended {
    process: String,
    status: u32,
    begin: Instant,
    end: Instant,
}

/// The processes of one container.
#[derive(Default)]
struct Life {
    ended: Vec<Ended>,
    /// Whether the container was deleted without a fault, so that its events must be complete.
    deleted: Option<(Instant, Instant)>,
}

#[derive(Default)]
pub struct Ledger {
    lives: Mutex<HashMap<String, Life>>,
}

impl Ledger {
    /// Notes the exit of a process; the init process has the id of the container.
    pub fn ended(&self, container: &str, process: &str, status: u32, begin: Instant) {
        let ended = Ended { process: process.to_string(), status, begin, end: Instant::now() };
        self.change(container, |life| life.ended.push(ended));
    }

    pub fn deleted(&self, container: &str, begin: Instant) {
        self.change(container, |life| life.deleted = Some((begin, Instant::now())));
    }

    fn change(&self, container: &str, change: impl FnOnce(&mut Life)) {
        let mut lives = self.lives.lock().unwrap_or_else(PoisonError::into_inner);
        change(lives.entry(container.to_string()).or_default());
    }

    /// Whether all expected events have been received.
    pub fn is_complete(&self, audit: &Audit, containerd: &Containerd) -> bool {
        let lives = self.lives.lock().unwrap_or_else(PoisonError::into_inner);
        lives.iter().all(|(id, life)| life.missing(id, audit, containerd).is_empty())
    }

    /// Counts the faults.
    pub fn compare(&self, audit: &Audit, containerd: &Containerd, tally: &Tally) {
        let lives = self.lives.lock().unwrap_or_else(PoisonError::into_inner);
        for (id, life) in lives.iter() {
            for what in life.missing(id, audit, containerd).into_iter().chain(life.wrong(id, audit)) {
                tally.fault(Fault::WrongEvents, &format!("{id}: {what}"));
            }
        }
        for id in audit.containers().filter(|id| !is_sandbox(id)) {
            for what in audit.faults(id) {
                tally.fault(Fault::WrongEvents, &format!("{id}: {what}"));
            }
        }
    }
}

/// True for the sandbox of a pod.
fn is_sandbox(id: &str) -> bool {
    id.starts_with(pods::NAME)
}

impl Life {
    fn missing(&self, id: &str, audit: &Audit, containerd: &Containerd) -> Vec<String> {
        let is_due = |begin, end| !containerd.may_hide_events(begin, end);
        // A sandbox may have an exit of containerd's own.
        let has_exit = |ended: &Ended| match is_sandbox(id) {
            true => audit.exits_of(id).contains(&ended.status),
            false => audit.exit_of(id, &ended.process).is_some(),
        };
        let exits = self.ended.iter().filter(|ended| !has_exit(ended) && is_due(ended.begin, ended.end));
        let mut missing: Vec<String> =
            exits.map(|ended| format!("no exit of {} ({})", ended.process, ended.status)).collect();
        if let Some((begin, end)) = self.deleted
            && !audit.is_deleted(id)
            && is_due(begin, end)
        {
            missing.push("no delete".to_string());
        }
        missing
    }

    fn wrong(&self, id: &str, audit: &Audit) -> Vec<String> {
        if is_sandbox(id) {
            let faults = self.ended.iter().map(|ended| audit.faults_of_sandbox(id, ended.status));
            return faults.flatten().collect();
        }
        let wrong = self.ended.iter().filter_map(|ended| {
            let told = audit.exit_of(id, &ended.process)?;
            (told != ended.status)
                .then(|| format!("{} ended with {}, the event says {told}", ended.process, ended.status))
        });
        wrong.collect()
    }
}
