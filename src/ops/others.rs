//! What others have that a new process must not touch: units with its name, and containers with its id.

use crate::cgroup;
use crate::id::UnitName;
use crate::launch::contract::{self, UnitKind};
use crate::oci::state::State;
use crate::services::Error;
use crate::store;
use crate::task::Task;
use crate::unit::name;

use super::Shim;

impl Shim {
    /// Those of the names for a new unit that the units of others have, or whose loggers' names they have (`has_logger`). The
    /// names of this daemon's own tasks are not among them: the registry knows those.
    ///
    /// # Errors
    /// systemd can't be reached.
    pub(super) async fn taken_names(
        &self,
        names: impl Iterator<Item = UnitName>,
        has_logger: bool,
    ) -> Result<Vec<UnitName>, Error> {
        let mut taken = Vec::new();
        for unit in names.filter(|unit| self.tasks.registry.by_unit(unit).is_none()) {
            let logger = has_logger.then(|| name::logger(&unit)).transpose()?;
            let is_taken = self.manager.is_taken(&unit).await?
                || match &logger {
                    Some(logger) => self.manager.is_taken(logger).await?,
                    None => false,
                };
            if is_taken {
                taken.push(unit);
            }
        }
        Ok(taken)
    }

    /// Checks that no container with this id runs whose record the daemon can't use or does not have. The daemon does not manage
    /// such a container. `taken`: the names for the unit that the units of others have.
    ///
    /// # Errors
    /// Such a container may run, or systemd can't be reached.
    pub(super) async fn check_unmanaged(&self, task: &Task, taken: &[UnitName]) -> Result<(), Error> {
        match self.store.check(&task.key) {
            // The cgroup of the container says whether the container runs.
            Err(store::Error::SetAside { .. })
                if !name::candidates(&task.key)
                    .any(|unit| cgroup::is_populated(&task.placement.cgroup(&unit))) => {}
            checked => checked?,
        }
        for unit in taken {
            let arguments = contract::arguments(UnitKind::Container.into(), &task.key.init());
            if self.manager.has_command(unit, &arguments).await? {
                return Err(Error::Unmanaged { key: task.key.clone(), unit: unit.to_string() });
            }
        }
        Ok(())
    }

    /// True if the OCI runtime has a container with this id already: one of another shim or of another containerd, or one that was
    /// left behind. What the daemon does for the new task must not touch that container.
    ///
    /// # Errors
    /// The container can't be kept apart from those that the OCI runtime has, or the disk with their state does not answer.
    pub(super) async fn is_known_to_runtime(&self, task: &Task) -> Result<bool, Error> {
        let is_known = self.runtime_files.state(task, State::exists).await?;
        let has_namesakes = !self.tasks.registry.namesakes(&task.key).is_empty();
        if is_known || has_namesakes {
            let mut apart = task.clone();
            keep_apart(&mut apart);
            if self.runtime_files.state(&apart, State::exists).await? {
                return Err(Error::in_runtime(&apart));
            }
        }
        if is_known && !has_namesakes {
            let (key, root) = (&task.key, task.runtime.root.display());
            tracing::warn!(task = %key, "task {key}: the OCI runtime already has a container of this id in {root}, which this daemon does not manage; the state of the new container is kept apart from it");
        }
        Ok(is_known)
    }
}

/// The OCI runtime identifies a container by its id alone. If two containerds have a container with the same id, or another
/// shim has, the later task gets a state directory of its own.
pub(super) fn keep_apart(task: &mut Task) {
    let owner = if task.key.owner.is_usual() { "containerd" } else { task.key.owner.as_str() };
    let mut root = task.runtime.root.clone().into_os_string();
    root.push(format!("+{owner}"));
    task.runtime.root = root.into();
}
