//! Effects, as tests number them: every call to systemd, every command of the OCI runtime, every write to the store.
//!
//! A test can have the daemon end before an effect, or have the effect fail. Outside of tests there is nothing here
//! but a function that lets writes to the store fail in a build with fault points.

#[cfg(not(test))]
mod real {
    use std::io;
    use std::path::Path;

    use nix::errno::Errno;

    use crate::fault::{self, Failure};

    /// The store is about to change something at this path.
    #[inline(always)]
    pub fn disk(_: &Path) -> io::Result<()> {
        match fault::due(&[Failure::NoSpace, Failure::Io]) {
            None => Ok(()),
            Some(Failure::NoSpace) => Err(Errno::ENOSPC.into()),
            Some(_) => Err(Errno::EIO.into()),
        }
    }
}

#[cfg(not(test))]
pub use real::disk;

#[cfg(test)]
pub use scripted::{Effects, Failure, Plan, disk};

#[cfg(test)]
mod scripted {
    use std::collections::HashMap;
    use std::io;
    use std::path::{Path, PathBuf};
    use std::sync::{Arc, LazyLock, Mutex, MutexGuard, PoisonError};

    use nix::errno::Errno;
    use tokio::sync::Notify;

    /// The effects of each test, by the directory that its store is in.
    static ALL: LazyLock<Mutex<HashMap<PathBuf, Arc<Effects>>>> = LazyLock::new(Mutex::default);

    /// How an effect fails.
    #[derive(Clone, Copy, Debug, PartialEq, Eq)]
    pub enum Failure {
        /// There is no room.
        NoSpace,
        /// There are no more descriptors.
        TooManyFiles,
        /// Nobody answered in time.
        Timeout,
        /// The bus has too many calls under way.
        LimitsExceeded,
        /// systemd went away.
        NoReply,
        /// It is not allowed.
        Refused,
    }

    impl Failure {
        /// All of them.
        pub const ALL: [Self; 6] = [
            Self::NoSpace,
            Self::TooManyFiles,
            Self::Timeout,
            Self::LimitsExceeded,
            Self::NoReply,
            Self::Refused,
        ];

        /// As a file system reports it.
        pub fn io(self) -> io::Error {
            let errno = match self {
                Self::NoSpace => Errno::ENOSPC,
                Self::TooManyFiles => Errno::EMFILE,
                Self::Timeout => Errno::ETIMEDOUT,
                Self::LimitsExceeded => Errno::EDQUOT,
                Self::NoReply => Errno::EIO,
                Self::Refused => Errno::EACCES,
            };
            errno.into()
        }
    }

    /// What is to happen.
    #[derive(Clone, Copy, Debug, PartialEq, Eq)]
    pub enum Plan {
        /// Every effect takes place.
        Undisturbed,
        /// The daemon ends before the effect of this number; numbers begin at 0.
        Stop(usize),
        /// The effect of this number fails, once.
        Fail(usize, Failure),
        /// The first effect whose description begins with this text is refused.
        Refuse(&'static str),
    }

    /// Counts the effects of one daemon.
    #[derive(Debug)]
    pub struct Effects {
        state: Mutex<State>,
        died: Notify,
    }

    #[derive(Debug)]
    struct State {
        plan: Plan,
        count: usize,
        is_dead: bool,
        log: Vec<String>,
    }

    impl State {
        fn has_logged(&self, text: &str) -> bool {
            self.log.iter().any(|effect| effect.starts_with(text))
        }
    }

    impl Effects {
        /// Those of the daemon whose store is below `root`.
        pub fn of(root: &Path) -> Arc<Self> {
            let state = State { plan: Plan::Undisturbed, count: 0, is_dead: false, log: Vec::new() };
            let effects = Arc::new(Self { state: Mutex::new(state), died: Notify::new() });
            all().insert(root.to_owned(), effects.clone());
            effects
        }

        /// Forgets a test's effects.
        pub fn forget(root: &Path) {
            all().remove(root);
        }

        fn state(&self) -> MutexGuard<'_, State> {
            self.state.lock().unwrap_or_else(PoisonError::into_inner)
        }

        /// Begins to count again, for a daemon that lives.
        pub fn plan(&self, plan: Plan) {
            *self.state() = State { plan, count: 0, is_dead: false, log: Vec::new() };
        }

        /// True once the planned effect was reached.
        pub fn was_reached(&self) -> bool {
            let state = self.state();
            match state.plan {
                Plan::Undisturbed => false,
                Plan::Stop(at) | Plan::Fail(at, _) => state.count > at,
                Plan::Refuse(text) => state.has_logged(text),
            }
        }

        /// The effects since the plan was made, in words.
        pub fn log(&self) -> Vec<String> {
            self.state().log.clone()
        }

        /// The daemon has ended.
        pub fn is_dead(&self) -> bool {
            self.state().is_dead
        }

        /// Resolves when the daemon ends.
        pub async fn death(&self) {
            while !self.is_dead() {
                self.died.notified().await;
            }
        }

        /// Counts an effect. `Err(None)` if the daemon has ended.
        fn step(&self, what: String) -> Result<(), Option<Failure>> {
            let mut state = self.state();
            if state.is_dead {
                return Err(None);
            }
            let number = state.count;
            state.count += 1;
            let is_refused = match state.plan {
                Plan::Refuse(text) => what.starts_with(text) && !state.has_logged(text),
                _ => false,
            };
            state.log.push(what);
            match state.plan {
                Plan::Refuse(_) if is_refused => Err(Some(Failure::Refused)),
                Plan::Stop(at) if at == number => {
                    state.is_dead = true;
                    drop(state);
                    self.died.notify_one();
                    Err(None)
                }
                Plan::Fail(at, failure) if at == number => Err(Some(failure)),
                Plan::Undisturbed | Plan::Stop(_) | Plan::Fail(..) | Plan::Refuse(_) => Ok(()),
            }
        }

        /// An effect of an asynchronous call. A daemon that has ended gets no further.
        pub async fn reach(&self, what: String) -> Result<(), Failure> {
            match self.step(what) {
                Ok(()) => Ok(()),
                Err(Some(failure)) => Err(failure),
                Err(None) => std::future::pending().await,
            }
        }
    }

    fn all() -> MutexGuard<'static, HashMap<PathBuf, Arc<Effects>>> {
        ALL.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The store is about to change something at this path. A daemon that has ended gets no further: its task is
    /// unwound.
    pub fn disk(path: &Path) -> io::Result<()> {
        let effects = all().iter().find(|(root, _)| path.starts_with(root)).map(|(_, found)| found.clone());
        let name = path.file_name().unwrap_or_default().to_string_lossy().into_owned();
        match effects.map_or(Ok(()), |effects| effects.step(format!("disk {name}"))) {
            Ok(()) => Ok(()),
            Err(Some(failure)) => Err(failure.io()),
            Err(None) => std::panic::resume_unwind(Box::new("the daemon has ended")),
        }
    }
}
