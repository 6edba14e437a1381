//! Calls of a patient client: it repeats or checks a call that was cut off by the end of containerd, and counts every
//! other failure.

use containerd_client::tonic::{Code, Status};
use containerd_client::types::v1::Status as Phase;

use super::common::container::{Builder, Container};
use super::common::exec::{Builder as ExecBuilder, Exec};
use super::common::node::{Node, OUR_RUNTIME};
use super::common::task::{Exit, Io, Process, SIGKILL, Waiting};
use super::containerd::{Containerd, Generation};
use super::tally::{Count, Fault, Tally};

/// Why a life ends early. The fault has been reported already.
#[derive(Debug)]
pub enum End {
    /// A fault, which is counted already.
    Fault,
    /// The outcome is unknown.
    Unknown,
}

/// Each worker has its own numbers.
#[derive(Clone, Copy)]
pub struct Client<'a> {
    pub node: &'a Node,
    pub containerd: &'a Containerd,
    pub tally: &'a Tally,
}

/// A `Wait` call that has no response yet.
pub struct Pending<'a> {
    waiting: Waiting<'a>,
    begin: Generation,
}

impl<'a> Client<'a> {
    /// Makes one call. `None` if containerd has ended during the call, whatever the result was.
    pub fn once<T>(&self, what: &str, call: impl FnOnce() -> Result<T, Status>) -> Result<Option<T>, End> {
        let begin = self.containerd.now();
        self.judge(what, begin, call())
    }

    fn judge<T>(&self, what: &str, begin: Generation, answer: Result<T, Status>) -> Result<Option<T>, End> {
        self.tally.add(Count::Calls, 1);
        match answer {
            Ok(answer) => Ok(Some(answer)),
            Err(_) if !self.containerd.lasts_since(begin) => {
                self.tally.add(Count::CutOff, 1);
                self.containerd.wait(self.node);
                Ok(None)
            }
            Err(status) => {
                let text = format!("{what}: {:?}: {}", status.code(), status.message());
                Err(self.fault(Fault::FailedCall, &text))
            }
        }
    }

    pub fn fault(&self, fault: Fault, what: &str) -> End {
        self.tally.fault(fault, what);
        End::Fault
    }

    /// Repeats a call that changes nothing until it succeeds; "not found" is a result.
    fn look<T>(&self, what: &str, call: impl Fn() -> Result<T, Status>) -> Result<Option<T>, End> {
        loop {
            let answer = self.once(what, || match call() {
                Err(status) if status.code() == Code::NotFound => Ok(None),
                answer => answer.map(Some),
            })?;
            if let Some(answer) = answer {
                return Ok(answer);
            }
        }
    }

    /// Repeats a call that may be repeated until it succeeds.
    pub fn persist<T>(&self, what: &str, call: impl Fn() -> Result<T, Status>) -> Result<T, End> {
        loop {
            if let Some(answer) = self.once(what, &call)? {
                return Ok(answer);
            }
        }
    }

    fn phase(&self, process: &Process) -> Result<Option<Phase>, End> {
        let what = format!("state of {}", process.name());
        loop {
            // containerd waits two seconds for a State, and then reports the status UNKNOWN.
            match self.look(&what, || process.state())?.map(|state| state.status()) {
                Some(Phase::Unknown) => {}
                phase => return Ok(phase),
            }
        }
    }

    /// A process that existed does not exist any more. With the stock shim, containerd forgets stopped processes.
    fn lost(&self, process: &Process) -> End {
        if self.node.runtime == OUR_RUNTIME {
            self.fault(Fault::LostTask, &process.name())
        } else {
            End::Unknown
        }
    }

    pub fn make(&self, builder: Builder<'a>) -> Result<Container<'a>, End> {
        self.once("make a container", || builder.try_make())?.ok_or(End::Unknown)
    }

    pub fn create(&self, container: &Container, io: &Io) -> Result<(), End> {
        let answer = self.once(&format!("create {}", container.id), || container.create(io))?;
        // containerd has not acknowledged the container: it may know the container or not.
        match answer {
            Some(_) => Ok(()),
            None => self.phase(container)?.map(drop).ok_or(End::Unknown),
        }
    }

    pub fn start(&self, process: &Process) -> Result<(), End> {
        let mut is_repeated = false;
        loop {
            let started = self.once(&format!("start {}", process.name()), || match process.start() {
                // The first try, whose result containerd did not report, was still under way during the query.
                Err(status) if is_repeated && status.code() == Code::FailedPrecondition => Ok(()),
                answer => answer.map(drop),
            })?;
            if started.is_some() {
                return Ok(());
            }
            match self.phase(process)? {
                None => return Err(self.lost(process)),
                Some(Phase::Created) => {}
                Some(_) => return Ok(()),
            }
            is_repeated = true;
        }
    }

    /// Calls `Wait` now; [`Client::exit`] has the response.
    pub fn waiting(&self, process: &Process<'a>) -> Pending<'a> {
        let begin = self.containerd.now();
        Pending { waiting: process.waiting(), begin }
    }

    pub fn exit(&self, process: &Process<'a>, pending: Pending<'a>) -> Result<Exit, End> {
        let Pending { mut waiting, mut begin } = pending;
        loop {
            let answer = self.judge(&format!("wait for {}", process.name()), begin, waiting.exit())?;
            if let Some(exit) = answer {
                return Ok(exit);
            }
            if self.phase(process)?.is_none() {
                return Err(self.lost(process));
            }
            Pending { waiting, begin } = self.waiting(process);
        }
    }

    /// Waits, and compares the exit with the expected one.
    pub fn expect(&self, process: &Process<'a>, pending: Pending<'a>, status: u32) -> Result<(), End> {
        let exit = self.exit(process, pending)?;
        self.compare(process, "wait", exit.status, status)
    }

    fn compare(&self, process: &Process, call: &str, told: u32, status: u32) -> Result<(), End> {
        if told == status {
            return Ok(());
        }
        let what = format!("{} ended with {status}, {call} told {told}", process.name());
        Err(self.fault(Fault::WrongExit, &what))
    }

    /// Deletes a stopped process, and compares the exit in the response.
    pub fn delete(&self, process: &Process, status: u32) -> Result<(), End> {
        loop {
            let answer = self.once(&format!("delete {}", process.name()), || process.delete())?;
            match answer {
                Some(answer) => return self.compare(process, "delete", answer.exit_status, status),
                None if self.phase(process)?.is_none() => return Ok(()),
                None => {}
            }
        }
    }

    pub fn kill(&self, process: &Process, signal: u32) -> Result<(), End> {
        self.persist(&format!("kill {}", process.name()), || match process.kill(signal) {
            // The first try, whose result containerd did not report, has deleted the process.
            Err(status) if is_gone(&status) => Ok(()),
            answer => answer,
        })
    }

    /// Adds an exec to a running container.
    pub fn add<'c>(&self, exec: impl Fn() -> ExecBuilder<'c, 'a>, io: &Io) -> Result<Exec<'a>, End>
    where
        'a: 'c,
    {
        loop {
            let builder = exec();
            let process = builder.process();
            if let Some(exec) = self.once(&format!("exec {}", process.name()), || builder.add(io))? {
                return Ok(exec);
            }
            if self.phase(&process)?.is_some() {
                return Ok(Exec::of(process));
            }
        }
    }

    /// Makes a call, and checks that the task is in this phase afterwards.
    pub fn change(
        &self,
        process: &Process,
        phase: Phase,
        call: impl Fn() -> Result<(), Status>,
    ) -> Result<(), End> {
        let what = format!("{phase:?} of {}", process.name());
        let mut is_repeated = false;
        loop {
            let answer = self.once(&what, || match call() {
                // The first try has succeeded, although containerd did not report its result.
                Err(status) if is_repeated && status.code() == Code::FailedPrecondition => Ok(()),
                answer => answer,
            })?;
            let is_done = answer.is_some();
            is_repeated = true;
            match self.phase(process)? {
                None => return Err(self.lost(process)),
                Some(found) if found == phase => return Ok(()),
                Some(found) if is_done => {
                    return Err(self.fault(Fault::Other, &format!("{what} was done, and it is {found:?}")));
                }
                Some(_) => {}
            }
        }
    }

    pub fn call(&self, what: &str, call: impl Fn() -> Result<(), Status>) -> Result<(), End> {
        self.persist(what, call)
    }

    /// Removes a container in any phase, also after a fault.
    pub fn remove(&self, container: &Container<'a>) {
        let gone = |answer: Result<(), Status>| match answer {
            Err(status) if is_gone(&status) => Ok(()),
            answer => answer,
        };
        let ended = || -> Result<(), End> {
            if self.phase(container)?.is_none() {
                return Ok(());
            }
            // A stopped process can't be killed; each shim has another error for that.
            self.persist("kill all", || {
                container.kill_all(SIGKILL).or_else(|status| match status.code() {
                    Code::NotFound | Code::FailedPrecondition => Ok(()),
                    _ => Err(status),
                })
            })?;
            let pending = self.waiting(container);
            self.exit(container, pending)?;
            self.persist("delete", || gone(container.delete().map(drop)))
        };
        // Faults are counted where they occur. Remove the rest in any case.
        let _ = ended();
        let _ = self.persist("remove a container", || gone(container.remove_metadata()));
        let _ = self.persist("remove a snapshot", || gone(container.remove_snapshot()));
    }
}

fn is_gone(status: &Status) -> bool {
    status.code() == Code::NotFound
}
