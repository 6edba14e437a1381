//! The clients. Each runs one life after the other, of random kinds.

use std::any::Any;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::mpsc::Receiver;
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use super::client::{Client, End};
use super::common::container::{Container, Io};
use super::common::node::{Node, unique};
use super::common::random::Random;
use super::common::spec::Spec;
use super::tally::{Count, Fault};
use super::{Shared, pause, thread};

/// The kinds of lives.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Kind {
    Run,
    Kill,
    Delete,
    Pause,
    Pod,
    Exec,
    Terminal,
    Output,
}

impl Kind {
    pub const ALL: [Kind; 8] = [
        Kind::Run,
        Kind::Kill,
        Kind::Delete,
        Kind::Pause,
        Kind::Pod,
        Kind::Exec,
        Kind::Terminal,
        Kind::Output,
    ];

    pub fn name(self) -> &'static str {
        match self {
            Kind::Run => "run",
            Kind::Kill => "kill",
            Kind::Delete => "delete",
            Kind::Pause => "pause",
            Kind::Pod => "pod",
            Kind::Exec => "exec",
            Kind::Terminal => "terminal",
            Kind::Output => "output",
        }
    }
}

pub struct Worker<'a> {
    pub client: Client<'a>,
    pub shared: &'a Shared,
    pub random: Random,
    number: usize,
}

/// Works until the other side of the channel is dropped.
pub fn start(
    shared: &Arc<Shared>,
    number: usize,
    kinds: &[Kind],
    random: Random,
    end: &Arc<Mutex<Receiver<()>>>,
) -> JoinHandle<()> {
    let (shared, kinds, end) = (shared.clone(), kinds.to_vec(), end.clone());
    thread(&format!("worker {number}"), move || {
        let node = Node::shared();
        let client = Client { node: &node, containerd: &shared.containerd, tally: &shared.tally };
        let mut worker = Worker { client, shared: &shared, random, number };
        while pause(&end.lock().unwrap_or_else(PoisonError::into_inner), Duration::ZERO) {
            let kind = worker.random.pick(&kinds);
            worker.doing(kind.name());
            match catch_unwind(AssertUnwindSafe(|| worker.live(kind))) {
                Ok(Ok(()) | Err(End::Fault)) => {}
                Ok(Err(End::Unknown)) => shared.tally.add(Count::GivenUp, 1),
                Err(panic) => {
                    let what = format!("{}: {}", kind.name(), message(panic.as_ref()));
                    shared.tally.fault(Fault::Other, &what);
                }
            }
        }
        worker.doing("nothing");
    })
}

fn message(panic: &(dyn Any + Send)) -> &str {
    let text = panic.downcast_ref::<String>().map(String::as_str);
    text.or_else(|| panic.downcast_ref::<&str>().copied()).unwrap_or("a panic")
}

impl<'a> Worker<'a> {
    fn live(&mut self, kind: Kind) -> Result<(), End> {
        match kind {
            Kind::Run => self.run(),
            Kind::Kill => self.kill(),
            Kind::Delete => self.delete(),
            Kind::Pause => self.pause(),
            Kind::Pod => self.pod(),
            Kind::Exec => self.execs(),
            Kind::Terminal => self.terminals(),
            Kind::Output => self.output(),
        }
    }

    pub fn doing(&self, what: &str) {
        self.shared.doing(self.number, what);
    }

    /// A container from Create to Delete. `during` runs after its start and returns the expected exit status.
    pub fn container(
        &mut self,
        spec: Spec,
        io: &Io,
        during: impl FnOnce(&mut Self, &Container<'a>) -> Result<u32, End>,
    ) -> Result<(), End> {
        let client = self.client;
        let container = client.make(client.node.container("chaos", spec))?;
        let begin = Instant::now();
        let lived = (|| {
            client.create(&container, io)?;
            let pending = client.waiting(&container);
            client.start(&container)?;
            let status = during(self, &container)?;
            client.expect(&container, pending, status)?;
            self.shared.ledger.ended(&container.id, &container.id, status, begin);
            client.delete(&container, status)?;
            self.shared.ledger.deleted(&container.id, begin);
            self.shared.tally.add(Count::Containers, 1);
            Ok(())
        })();
        client.remove(&container);
        lived
    }

    /// As the function above, for an exec from Exec to Delete.
    pub fn exec(
        &mut self,
        container: &Container<'a>,
        spec: &Spec,
        io: &Io,
        during: impl FnOnce(&mut Self, &super::common::exec::Exec<'a>) -> Result<u32, End>,
    ) -> Result<(), End> {
        let (client, id, begin) = (self.client, unique("exec"), Instant::now());
        let exec = client.add(|| container.exec(spec.clone()).id(&id), io)?;
        let pending = client.waiting(&exec);
        client.start(&exec)?;
        let status = during(self, &exec)?;
        client.expect(&exec, pending, status)?;
        self.shared.ledger.ended(&container.id, &exec.id, status, begin);
        client.delete(&exec, status)?;
        self.shared.tally.add(Count::Execs, 1);
        Ok(())
    }
}
