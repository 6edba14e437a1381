//! Lives of execs, several in a container: short ones, killed ones, and terminals with input.

use super::client::End;
use super::common::container::Io;
use super::common::spec::Spec;
use super::common::stdio::{Fifos, feed};
use super::common::task::{SIGKILL, SIGTERM};
use super::tally::{Count, Fault};
use super::work::Worker;

/// The largest number of execs in a row in one container.
const ROW: u64 = 12;

impl<'a> Worker<'a> {
    /// Execs with any exit status, and some that are killed.
    pub fn execs(&mut self) -> Result<(), End> {
        self.container(Spec::sleeping(), &Io::default(), |worker, container| {
            for _ in 0..=worker.random.below(ROW) {
                if worker.random.chance(4) {
                    let signal = worker.random.pick(&[SIGKILL, SIGTERM]);
                    worker.exec(container, &Spec::sleeping(), &Io::default(), |worker, exec| {
                        worker.client.kill(exec, signal)?;
                        Ok(128 + signal)
                    })?;
                } else {
                    let status = worker.random.below(256) as u32;
                    let spec = Spec::sh(&format!("exit {status}"));
                    worker.exec(container, &spec, &Io::default(), |_, _| Ok(status))?;
                }
            }
            worker.client.kill(container, SIGKILL)?;
            Ok(128 + SIGKILL)
        })
    }

    /// A terminal: the client writes, reads, changes the size, and leaves.
    pub fn terminals(&mut self) -> Result<(), End> {
        self.container(Spec::sleeping(), &Io::default(), |worker, container| {
            for _ in 0..=worker.random.below(ROW / 3) {
                let status = worker.random.below(256) as u32;
                let script = "stty -echo; echo ready; while read word && [ $word != end ]; do \
                              echo $word $(stty size); done; read status; exit $status";
                let fifos = Fifos::new("chaos");
                let mut stdout = fifos.stdout();
                let stdin = fifos.open_stdin();
                let spec = Spec::sh(script).terminal();
                worker.exec(container, &spec, &fifos.terminal(), |worker, exec| {
                    let stdin = stdin.file();
                    stdout.until(|bytes| bytes.ends_with(b"ready\r\n"));
                    for _ in 0..worker.random.below(6) {
                        let (width, height) = (20 + worker.random.below(200), 10 + worker.random.below(90));
                        worker.client.call(&format!("resize {}", exec.name()), || {
                            exec.resize(width as u32, height as u32)
                        })?;
                        feed(&stdin, b"word\n");
                        let line = stdout.until(|bytes| bytes.ends_with(b"\n"));
                        let expected = format!("word {height} {width}\r\n");
                        if line != expected.as_bytes() {
                            let line = String::from_utf8_lossy(&line).into_owned();
                            let what = format!("{}: {line:?} instead of {expected:?}", exec.name());
                            return Err(worker.client.fault(Fault::WrongBytes, &what));
                        }
                    }
                    feed(&stdin, format!("end\n{status}\n").as_bytes());
                    worker.shared.tally.add(Count::Streams, 1);
                    Ok(status)
                })?;
            }
            worker.client.kill(container, SIGKILL)?;
            Ok(128 + SIGKILL)
        })
    }
}
