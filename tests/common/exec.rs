//! One exec of a test: a process added to a container's task, removed on drop.

use std::ops::Deref;

use containerd_client::services::v1::ExecProcessRequest;
use containerd_client::tonic::Status;
use prost_types::Any;

use super::container::Container;
use super::node::{request, unique};
use super::spec::Spec;
use super::task::{Io, Process};

/// An exec that the shim does not know yet.
pub struct Builder<'c, 'n> {
    container: &'c Container<'n>,
    id: String,
    process: Option<Any>,
    terminal: bool,
}

impl<'n> Container<'n> {
    /// An exec of the process of the spec; the rest of the spec is ignored.
    pub fn exec(&self, spec: Spec) -> Builder<'_, 'n> {
        let terminal = spec.has_terminal();
        Builder { container: self, id: unique("exec"), process: Some(spec.process_to_any()), terminal }
    }

    /// Starts an exec of a shell script, and discards its output.
    pub fn exec_sh(&self, script: &str) -> Exec<'n> {
        self.exec(Spec::sh(script)).started(&Io::default())
    }
}

impl<'n> Builder<'_, 'n> {
    pub fn id(mut self, id: &str) -> Self {
        self.id = id.to_string();
        self
    }

    /// The process of the exec.
    pub fn process(&self) -> Process<'n> {
        self.container.process(&self.id)
    }

    /// Adds the exec to the task.
    pub fn add(self, io: &Io) -> Result<Exec<'n>, Status> {
        let Builder { container, id, process, terminal } = self;
        let add = ExecProcessRequest {
            container_id: container.id.clone(),
            exec_id: id.clone(),
            stdin: io.stdin.clone(),
            stdout: io.stdout.clone(),
            stderr: io.stderr.clone(),
            terminal,
            spec: process,
        };
        container.node.call(container.node.tasks().exec(request(&container.namespace, add)))?;
        Ok(Exec::of(container.process(&id)))
    }

    pub fn added(self, io: &Io) -> Exec<'n> {
        let name = format!("{}:{}", self.container.id, self.id);
        self.add(io).unwrap_or_else(|error| panic!("add exec {name}: {error}"))
    }

    /// Adds the exec and starts it.
    pub fn started(self, io: &Io) -> Exec<'n> {
        let exec = self.added(io);
        exec.start().unwrap_or_else(|error| panic!("start exec {}: {error}", exec.name()));
        exec
    }
}

/// An exec can be used as a process.
pub struct Exec<'n> {
    process: Process<'n>,
    pub id: String,
}

impl<'n> Exec<'n> {
    /// An exec that has been added already.
    pub fn of(process: Process<'n>) -> Exec<'n> {
        let id = process.exec.clone();
        Exec { process, id }
    }
}

impl<'n> Deref for Exec<'n> {
    type Target = Process<'n>;

    fn deref(&self) -> &Process<'n> {
        &self.process
    }
}

impl Drop for Exec<'_> {
    fn drop(&mut self) {
        self.end();
    }
}
