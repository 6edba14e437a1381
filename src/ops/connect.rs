//! Connect: a task's init process.

use crate::id::TaskKey;
use crate::services::Shim;

impl Shim {
    /// A task's init process, 0 if there is no such task: Connect never fails.
    pub fn init_pid(&self, key: &TaskKey) -> u32 {
        self.tasks.registry.get(key).and_then(|entry| entry.task().init.pid()).unwrap_or_default()
    }
}
