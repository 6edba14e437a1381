//! Lives of sandboxes of pods, each with a container in its network.

use std::time::Instant;

use containerd_client::services::v1::sandbox::ControllerStatusResponse;
use containerd_client::tonic::{Code, Status};
use nix::sys::signal::Signal;

use super::client::{Client, End};
use super::common::container::Io;
use super::common::pod::{LinuxPodSandboxConfig, pod};
use super::common::sandbox::{READY, Sandbox};
use super::common::spec::Spec;
use super::common::task::SIGKILL;
use super::common::{daemon, process, wait};
use super::tally::{Count, Fault};
use super::work::Worker;

/// The names of sandboxes begin with this.
pub const NAME: &str = "chaos-pod";

impl Worker<'_> {
    /// A sandbox in a slice of its own. It is stopped, is killed, ends with its slice or while there is no daemon, or is removed
    /// while it runs.
    pub fn pod(&mut self) -> Result<(), End> {
        let client = self.client;
        let sandbox = Sandbox::unmade(client.node, NAME);
        let begin = Instant::now();
        let lived = self.in_sandbox(&sandbox);
        client.remove_sandbox(&sandbox);
        if let Ok(Some(status)) = lived {
            self.shared.ledger.ended(&sandbox.id, &sandbox.id, status, begin);
            self.shared.ledger.deleted(&sandbox.id, begin);
            self.shared.tally.add(Count::Pods, 1);
        }
        lived.map(drop)
    }

    /// Returns the status with which the sandbox has ended. `None` if its removal ends it.
    fn in_sandbox(&mut self, sandbox: &Sandbox<'_>) -> Result<Option<u32>, End> {
        let client = self.client;
        let slice = format!("{}.slice", sandbox.id.replace('-', "_"));
        client.create_sandbox(sandbox, &slice)?;
        let pid = client.start_sandbox(sandbox)?;
        let spec = Spec::sh("exit 3").in_namespace_of("network", &format!("/proc/{pid}/ns/net"));
        self.container(spec, &Io::default(), |_, _| Ok(3))?;
        let status = match self.random.below(5) {
            0 => {
                client.call("stop a sandbox", || sandbox.try_stop())?;
                0
            }
            1 => {
                daemon::signal(pid, Signal::SIGKILL);
                128 + SIGKILL
            }
            2 => {
                // systemd may refuse the call while it re-executes itself.
                wait::until_true("the slice is stopped", || {
                    process::run("systemctl", &["stop", &slice]).code == Some(0)
                });
                0
            }
            3 => {
                daemon::kill_now();
                daemon::signal(pid, Signal::SIGTERM);
                0
            }
            _ => return Ok(None),
        };
        client.expect_sandbox(sandbox, status)?;
        Ok(Some(status))
    }
}

impl Client<'_> {
    fn create_sandbox(&self, sandbox: &Sandbox<'_>, slice: &str) -> Result<(), End> {
        let linux = LinuxPodSandboxConfig { cgroup_parent: format!("/{slice}"), ..Default::default() };
        let options = pod(|pod| pod.linux = Some(linux));
        if self.once("create a sandbox", || sandbox.try_create(options.clone(), None))?.is_some() {
            return Ok(());
        }
        // containerd has not acknowledged the sandbox: containerd and the shim may know the sandbox or not.
        let status = self.persist("status of a sandbox", || match sandbox.try_status() {
            Err(status) if status.code() == Code::NotFound => Ok(ControllerStatusResponse::default()),
            status => status,
        })?;
        if status.state.is_empty() { Err(End::Unknown) } else { Ok(()) }
    }

    fn start_sandbox(&self, sandbox: &Sandbox<'_>) -> Result<u32, End> {
        loop {
            if let Some(pid) = self.once("start a sandbox", || sandbox.try_start())? {
                return Ok(pid);
            }
            let status = self.persist("status of a sandbox", || sandbox.try_status())?;
            match status.state.as_str() {
                READY => return Ok(status.pid),
                "" => return Err(self.fault(Fault::LostTask, &sandbox.id)),
                _ => {}
            }
        }
    }

    /// Waits, and compares the exit with the expected one.
    fn expect_sandbox(&self, sandbox: &Sandbox<'_>, status: u32) -> Result<(), End> {
        let exit = self.persist("wait for a sandbox", || sandbox.try_waited(sandbox.wait()))?;
        if exit.exit_status == status {
            return Ok(());
        }
        let what = format!("{} ended with {status}, wait told {}", sandbox.id, exit.exit_status);
        Err(self.fault(Fault::WrongExit, &what))
    }

    fn remove_sandbox(&self, sandbox: &Sandbox<'_>) {
        let gone = |answer: Result<(), Status>| match answer {
            Err(status) if status.code() == Code::NotFound => Ok(()),
            answer => answer,
        };
        // Faults are counted where they occur. Remove the rest in any case.
        let _ = self.persist("shut down a sandbox", || gone(sandbox.try_shut_down()));
        let _ = self.persist("forget a sandbox", || gone(sandbox.try_forget()));
    }
}
