//! Lives of containers: some run to their end, some are killed, some are deleted with execs in them.

use containerd_client::types::v1::Status as Phase;

use super::client::End;
use super::common::container::Io;
use super::common::spec::Spec;
use super::common::stdio::Fifos;
use super::common::task::{SIGKILL, SIGSEGV, SIGTERM};
use super::tally::{Count, Fault};
use super::work::Worker;

impl Worker<'_> {
    /// A container that exits with any status, after a random time, with output or without.
    pub fn run(&mut self) -> Result<(), End> {
        let (status, delay) = (self.random.below(256) as u32, self.random.below(3));
        let script = format!("sleep 0.{delay}; echo word; exit {status}");
        if self.random.chance(2) {
            return self.container(Spec::sh(&script), &Io::default(), |_, _| Ok(status));
        }
        let fifos = Fifos::new("chaos");
        let (mut stdout, _stderr) = (fifos.stdout(), fifos.stderr());
        self.container(Spec::sh(&script), &fifos.output(), |worker, container| {
            let text = stdout.text();
            worker.shared.tally.add(Count::Streams, 1);
            if text != "word\n" {
                let what = format!("{}: {text:?} instead of a word", container.id);
                return Err(worker.client.fault(Fault::WrongBytes, &what));
            }
            Ok(status)
        })
    }

    /// A container that is killed. Outside of a pid namespace, where it is not PID 1, every signal has its effect.
    pub fn kill(&mut self) -> Result<(), End> {
        let signal = self.random.pick(&[SIGKILL, SIGKILL, SIGTERM, SIGSEGV]);
        let spec = Spec::sh("echo ready; exec sleep 100000");
        let spec = if signal == SIGKILL { spec } else { spec.in_host_namespace("pid") };
        let fifos = Fifos::new("chaos");
        let (mut stdout, _stderr) = (fifos.stdout(), fifos.stderr());
        self.container(spec, &fifos.output(), |worker, container| {
            // Before the output, the process is the OCI runtime, which handles signals differently.
            stdout.until(|bytes| bytes == b"ready\n");
            worker.client.kill(container, signal)?;
            Ok(128 + signal)
        })
    }

    /// A container that is frozen and thawed, and killed in either state.
    pub fn pause(&mut self) -> Result<(), End> {
        let (rounds, ends_paused) = (1 + self.random.below(3), self.random.chance(2));
        self.container(Spec::sleeping(), &Io::default(), |worker, container| {
            let client = worker.client;
            for _ in 0..rounds {
                client.change(container, Phase::Paused, || container.pause())?;
                client.change(container, Phase::Running, || container.resume())?;
            }
            if ends_paused {
                client.change(container, Phase::Paused, || container.pause())?;
            }
            client.kill(container, SIGKILL)?;
            Ok(128 + SIGKILL)
        })
    }

    /// A container that ends while it has execs: running, ended, and never started. They are removed with it.
    pub fn delete(&mut self) -> Result<(), End> {
        self.container(Spec::sleeping(), &Io::default(), |worker, container| {
            let client = worker.client;
            let mut kept = Vec::new();
            for script in ["exec sleep 100000", "exit 3", "exit 4"] {
                let id = super::common::node::unique("kept");
                kept.push(client.add(|| container.exec(Spec::sh(script)).id(&id), &Io::default())?);
            }
            let waits = [client.waiting(&kept[0]), client.waiting(&kept[1])];
            client.start(&kept[0])?;
            client.start(&kept[1])?;
            let [sleeping, ended] = waits;
            client.expect(&kept[1], ended, 3)?;
            client.kill(container, SIGKILL)?;
            client.expect(&kept[0], sleeping, 128 + SIGKILL)?;
            Ok(128 + SIGKILL)
        })
    }
}
