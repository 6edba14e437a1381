//! An init process or an exec, with the client's side of its streams.

use std::fs::File;
use std::time::Duration;

use crate::common::container::Container;
use crate::common::exec::Exec;
use crate::common::node::Node;
use crate::common::spec::Spec;
use crate::common::stdio::{Fifos, Reader, feed};
use crate::common::task::{Io, Process};

/// A Wait that also waits for the output of a process's children takes longer: the stock shim waits for 10 s.
pub const WAIT_LIMIT: Duration = Duration::from_secs(8);

/// The client's ends of a process's FIFOs.
pub struct Client {
    pub fifos: Fifos,
    pub stdin: File,
    pub stdout: Reader,
    /// A terminal writes nothing to it.
    pub stderr: Reader,
}

impl Client {
    /// Attaches to a process that `start` starts.
    pub fn attached<P>(spec: Spec, start: impl FnOnce(Spec, &Io) -> P) -> (P, Client) {
        let fifos = Fifos::new("attached");
        let (stdout, stderr) = (fifos.stdout(), fifos.stderr());
        let io = if spec.has_terminal() { fifos.terminal() } else { fifos.io() };
        let stdin = fifos.open_stdin();
        let process = start(spec, &io);
        let stdin = stdin.file();
        (process, Client { fifos, stdin, stdout, stderr })
    }

    pub fn enter(&self, text: &str) {
        feed(&self.stdin, text.as_bytes());
    }

    /// Reads until the output ends in this text.
    pub fn until(&mut self, end: &str) {
        self.stdout.until(|bytes| bytes.ends_with(end.as_bytes()));
    }

    /// The client closes its streams, and opens them again.
    pub fn again(self) -> Client {
        let Client { fifos, stdin, stdout, stderr } = self;
        drop((stdin, stdout, stderr));
        let (stdout, stderr) = (fifos.stdout(), fifos.stderr());
        let stdin = fifos.stdin();
        Client { fifos, stdin, stdout, stderr }
    }
}

/// Adds an exec to a container, starts it and attaches to it.
pub fn exec<'n>(container: &Container<'n>, spec: Spec) -> (Exec<'n>, Client) {
    Client::attached(spec, |spec, io| container.exec(spec).started(io))
}

/// Checks the process both as an init process and as an exec.
pub fn each_kind(spec: Spec, check: impl Fn(&Process, Client)) {
    each_kind_on(&Node::shared(), spec, check);
}

/// As [`each_kind`], on a node that the test may use alone.
pub fn each_kind_on(node: &Node, spec: Spec, check: impl Fn(&Process, Client)) {
    {
        let start = |spec, io: &Io| node.container("as-init", spec).started(io);
        let (container, client) = Client::attached(spec.clone(), start);
        check(&container, client);
    }
    let container = node.container("as-exec", spec.sleeping_instead()).started(&Io::default());
    let (exec, client) = exec(&container, spec);
    check(&exec, client);
}
