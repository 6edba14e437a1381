//! `launch` for tests. The fake systemd runs it. It writes the files that `launch` would write in a unit, and starts a process
//! that sleeps.

use std::fs;
use std::io::Write;
use std::os::unix::fs::OpenOptionsExt;
use std::path::Path;
use std::sync::{Arc, Mutex, PoisonError};

use crate::cgroup::fake as cgroup;
use crate::id::{ExecId, UnitName};
use crate::store::{Found, Store};
use crate::suspect::Crashes;
use crate::task::lifecycle::Exit;
use crate::task::{Placement, Task};
use crate::unit::fake::{Programs, Sleeper, Started};

use super::contract::{EXEC_PID_FILE, LAUNCH_ERROR, LAUNCHED, OUTCOME, Outcome, PID_FILE, PROCESS_SPEC};
use super::pipes::{DOORBELL, READY};

/// How the next launches end.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub enum Launches {
    /// The launches succeed.
    #[default]
    Work,
    /// The launches fail for this reason.
    Fail(String),
    /// The launches fail, and the OCI runtime records the container only when systemd stops the unit.
    RecordLate,
    /// The launches succeed, but the process of an exec ends before the handover: `launch`, which systemd knows,
    /// exits in the same way.
    Brief,
    /// The launches succeed, but a logger closes its third pipe without a byte.
    SilentLogger,
    /// The launches succeed, but a logger keeps its third pipe open and writes nothing.
    HangingLogger,
}

/// Above the kernel's largest pid (`PID_MAX_LIMIT`, 2^22).
const NO_PROCESS: u32 = (1 << 22) + 7;

/// The exit status of an exec that ends before the handover.
pub const BRIEF_STATUS: u32 = 3;

/// The `launch` of every unit.
pub struct FakeLaunch {
    store: Store,
    launches: Mutex<Launches>,
    /// The third pipes of loggers that hang.
    hanging: Mutex<Vec<fs::File>>,
}

impl FakeLaunch {
    /// A fake that reads records from `store`.
    pub fn new(store: Store) -> Arc<Self> {
        Arc::new(Self { store, launches: Mutex::default(), hanging: Mutex::default() })
    }

    /// Determines what the next launches do.
    pub fn set(&self, launches: Launches) {
        *self.launches.lock().unwrap_or_else(PoisonError::into_inner) = launches;
    }

    fn launch_container(&self, task: &Task, launches: &Launches) -> Started {
        let dir = self.store.dir(&task.key);
        fs::write(dir.join(LAUNCHED), "").unwrap();
        match launches {
            Launches::Work | Launches::Brief | Launches::SilentLogger | Launches::HangingLogger => {}
            Launches::Fail(reason) => {
                fs::write(dir.join(LAUNCH_ERROR), reason).unwrap();
                return Started::Failed;
            }
            Launches::RecordLate => return Started::Failed,
        }
        let (unit, place) = match &task.placement {
            Placement::Unit { slice, child } => {
                let unit = Path::new("/").join(slice.as_str()).join(task.unit().as_str());
                (unit.clone(), unit.join(child))
            }
            Placement::Foreign { path, .. } => (path.clone(), path.clone()),
        };
        let process = Sleeper::spawn();
        cgroup::make(&unit);
        cgroup::make(&place);
        cgroup::place(&place, process.pid());
        record(task);
        fs::write(dir.join(PID_FILE), process.pid().to_string()).unwrap();
        Started::Forked { process, cgroup: place }
    }

    /// A logger is ready once it has written a byte to its third pipe.
    fn launch_logger(&self, dir: &Path, launches: &Launches) -> Started {
        let mut options = fs::OpenOptions::new();
        let ready = options.write(true).custom_flags(nix::libc::O_NONBLOCK).open(dir.join(READY));
        match (launches, ready) {
            (Launches::Work, Ok(mut ready)) => ready.write_all(b"1").unwrap(),
            (Launches::HangingLogger, Ok(ready)) => {
                self.hanging.lock().unwrap_or_else(PoisonError::into_inner).push(ready);
            }
            _ => {}
        }
        Started::Empty
    }

    fn launch_exec(&self, task: &Task, id: &ExecId, launches: &Launches) -> Started {
        let dir = self.store.exec_dir(&task.key, id);
        assert!(dir.join(PROCESS_SPEC).exists(), "the OCI runtime needs the process spec");
        let (started, outcome) = match launches {
            Launches::Fail(reason) => (Started::Failed, Outcome::Failed { reason: reason.clone() }),
            Launches::RecordLate => (Started::Failed, Outcome::Failed { reason: String::new() }),
            Launches::Work | Launches::Brief | Launches::SilentLogger | Launches::HangingLogger => {
                let process = Sleeper::spawn();
                let pid = process.pid();
                if let Some(place) = task.cgroup() {
                    cgroup::place(place, pid);
                }
                let outcome = match launches {
                    Launches::Brief => Outcome::Ended {
                        pid: NO_PROCESS,
                        exit: Exit { status: BRIEF_STATUS, at_usec: crate::sys::now_usec() },
                    },
                    _ => Outcome::Started { pid },
                };
                fs::write(dir.join(EXEC_PID_FILE), pid.to_string()).unwrap();
                (Started::Oneshot { process, cgroup: task.cgroup().map(Path::to_owned) }, outcome)
            }
        };
        fs::write(dir.join(LAUNCHED), "").unwrap();
        // Without the store, because what happens in a unit is not an effect of the daemon.
        fs::write(dir.join(OUTCOME), serde_json::to_vec(&outcome).unwrap()).unwrap();
        let mut options = fs::OpenOptions::new();
        let _ = options.write(true).custom_flags(nix::libc::O_NONBLOCK).open(dir.join(DOORBELL));
        started
    }
}

/// Writes the state that the OCI runtime keeps of a container. A container that is not restored waits for its start.
fn record(task: &Task) {
    let state = task.runtime.root.join(task.key.id.as_str());
    fs::create_dir_all(&state).unwrap();
    if task.request.checkpoint.is_none() {
        fs::write(state.join("exec.fifo"), "").unwrap();
    }
}

impl Programs for FakeLaunch {
    fn stop(&self, unit: &UnitName) {
        let launches = self.launches.lock().unwrap_or_else(PoisonError::into_inner).clone();
        let records = self.store.load_all(&Crashes::default()).unwrap_or_default();
        let mut tasks = records.into_iter().flatten().map(|found| found.task);
        if launches == Launches::RecordLate
            && let Some(task) = tasks.find(|task| task.unit() == unit)
        {
            record(&task);
        }
    }

    fn start(&self, unit: &UnitName) -> Started {
        let launches = self.launches.lock().unwrap_or_else(PoisonError::into_inner).clone();
        let records = self.store.load_all(&Crashes::default()).unwrap_or_default();
        for Found { task, .. } in records.into_iter().flatten() {
            if *task.unit() == *unit {
                return self.launch_container(&task, &launches);
            }
            if task.init.logger.as_ref() == Some(unit) {
                return self.launch_logger(&self.store.dir(&task.key), &launches);
            }
            if let Some((id, _)) = task.execs.iter().find(|(_, exec)| exec.logger.as_ref() == Some(unit)) {
                return self.launch_logger(&self.store.exec_dir(&task.key, id), &launches);
            }
            if let Some((id, _)) = task.execs.iter().find(|(_, exec)| exec.unit == *unit) {
                return self.launch_exec(&task, id, &launches);
            }
        }
        Started::Empty
    }
}
