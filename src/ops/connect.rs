//! Connect: a task's init process.

use crate::id::TaskKey;
use crate::services::Tasks;

impl Tasks {
    /// A task's init process, 0 if there is no such task: Connect never fails.
    pub fn init_pid(&self, key: &TaskKey) -> u32 {
        self.registry.get(key).and_then(|entry| entry.task().init.pid()).unwrap_or_default()
    }
}
