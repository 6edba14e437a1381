//! Connect: a task's init process.

use crate::id::TaskKey;
use crate::services::Tasks;

impl Tasks {
    /// A task's init process. `None` if there is no such task or no such process: Connect never fails.
    pub fn init_pid(&self, key: &TaskKey) -> Option<u32> {
        self.registry.get(key).and_then(|entry| entry.task().init.pid())
    }
}
