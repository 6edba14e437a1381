//! The work of the daemon that never ends.

use std::collections::HashMap;
use std::sync::Arc;

use tokio::sync::mpsc;
use tokio::task::JoinSet;

use crate::api::events;
use crate::cli::Failure;
use crate::id::UnitName;
use crate::ops::Shim;
use crate::services::Entry;
use crate::supervise::{floods, slices};
use crate::transport::event_connection::{self, EventConnections};
use crate::unit::manager::Manager;

/// The permanent work of the daemon in addition to serving calls. If one worker ends, the daemon ends, and systemd restarts
/// it: without this work, the daemon would miss what happens to tasks.
#[derive(Default)]
pub(super) struct Workers(JoinSet<&'static str>);

impl Workers {
    pub(super) fn spawn(&mut self, name: &'static str, work: impl Future<Output = ()> + Send + 'static) {
        self.0.spawn(async move {
            work.await;
            name
        });
    }

    /// Starts the work that happens without a call.
    pub(super) fn spawn_all(
        &mut self,
        shim: &Arc<Shim>,
        manager: Arc<Manager>,
        outgoing: mpsc::UnboundedReceiver<Arc<Entry>>,
        (event_connections, earlier): (Arc<EventConnections>, HashMap<String, event_connection::Unwatched>),
    ) {
        let tasks = shim.tasks.clone();
        self.spawn("publishing events", events::publish(tasks.clone(), outgoing, event_connections, earlier));
        self.spawn("retrying failed writes of records", shim.cleanup.clone().write_pending());
        self.spawn("removing what failed creates and given-up tasks left", shim.clone().remove_leftovers());
        self.spawn("dropping unused copies of OCI runtimes", shim.clone().forget_idle_runtimes());
        self.spawn("ending floods of children of systemd", floods::end(tasks.clone(), manager.clone()));
        let removed = tasks.removed.clone();
        let is_used = move |slice: &UnitName| tasks.uses_slice(slice);
        self.spawn("observing units", shim.units.clone().observe(manager.observations.clone()));
        self.spawn("removing unused slices", slices::run(manager, removed, is_used));
        self.spawn("watching cgroups", shim.cgroups.clone().observe());
        self.spawn(
            "looking for ends that systemd's signals did not report",
            shim.units.clone().find_missed_ends(),
        );
    }

    /// Waits until one of the workers has ended.
    pub(super) async fn ended(&mut self) -> Failure {
        match self.0.join_next().await {
            Some(Ok(name)) => Failure(format!("{name} ended, so the daemon ends and systemd restarts it")),
            Some(Err(error)) => Failure(format!(
                "a part of the daemon failed, so the daemon ends and systemd restarts it: {error}"
            )),
            None => std::future::pending().await,
        }
    }
}

impl Drop for Workers {
    fn drop(&mut self) {
        // The workers end with the process.
        self.0.detach_all();
    }
}
