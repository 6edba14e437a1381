//! Large output and input of init processes and execs, with and without terminals, compared byte for byte.

use std::sync::mpsc::{self, Receiver, Sender};
use std::{io, thread};

use super::client::End;
use super::common::container::{Container, Io};
use super::common::spec::Spec;
use super::common::stdio::{Fifos, Opening, Reader};
use super::common::task::{Process, SIGKILL};
use super::common::wait;
use super::tally::{Count, Fault};
use super::work::Worker;

/// The direction of the data.
#[derive(Clone, Copy, Debug, PartialEq)]
enum Way {
    /// The process writes.
    Out,
    /// The process writes what it reads, until its stdin is closed.
    Both,
    /// The process writes, to a terminal.
    TerminalOut,
    /// A terminal echoes its input.
    TerminalBoth,
}

/// The client's ends.
struct Streams {
    way: Way,
    fifos: Fifos,
    stdout: Reader,
    _stderr: Reader,
    stdin: Option<Opening>,
}

/// A thread that writes to stdin.
struct Feeding {
    /// stdin is open until this is dropped.
    keep: Option<Sender<()>>,
    done: Receiver<io::Result<()>>,
}

impl Way {
    const ALL: [Way; 4] = [Way::Out, Way::Both, Way::TerminalOut, Way::TerminalBoth];

    fn has_terminal(self) -> bool {
        matches!(self, Way::TerminalOut | Way::TerminalBoth)
    }

    fn reads(self) -> bool {
        matches!(self, Way::Both | Way::TerminalBoth)
    }
}

impl Streams {
    fn new(way: Way) -> Streams {
        let fifos = Fifos::new("chaos");
        let (stdout, stderr) = (fifos.stdout(), fifos.stderr());
        let stdin = way.reads().then(|| fifos.open_stdin());
        Streams { way, fifos, stdout, _stderr: stderr, stdin }
    }

    fn io(&self) -> Io {
        let io = if self.way.has_terminal() { self.fifos.terminal() } else { self.fifos.io() };
        if self.way.reads() { io } else { Io { stdin: String::new(), ..io } }
    }
}

impl<'a> Worker<'a> {
    /// An init process, or some execs, each with a random direction.
    pub fn output(&mut self) -> Result<(), End> {
        if self.random.chance(2) {
            let way = self.random.pick(&Way::ALL);
            let mut streams = Streams::new(way);
            let (spec, io) = (self.spec(way), streams.io());
            return self.container(spec, &io, |worker, container| worker.flow(container, &mut streams));
        }
        let host = self.shared.bulk.bind(Spec::sleeping());
        self.container(host, &Io::default(), |worker, container: &Container<'a>| {
            for _ in 0..=worker.random.below(3) {
                let way = worker.random.pick(&Way::ALL);
                let mut streams = Streams::new(way);
                let (spec, io) = (worker.spec(way), streams.io());
                worker.exec(container, &spec, &io, |worker, exec| worker.flow(exec, &mut streams))?;
            }
            worker.client.kill(container, SIGKILL)?;
            Ok(128 + SIGKILL)
        })
    }

    fn spec(&self, way: Way) -> Spec {
        let bulk = &self.shared.bulk;
        let script = match way {
            Way::Out => bulk.script(),
            Way::Both => "exec cat".to_string(),
            Way::TerminalOut => format!("stty -opost; {}", bulk.script()),
            Way::TerminalBoth => format!("stty raw -echo; echo ready; exec head -c {}", bulk.bytes()),
        };
        let spec = bulk.bind(Spec::sh(&script));
        if way.has_terminal() { spec.terminal() } else { spec }
    }

    /// Transfers all data; then the process ends.
    fn flow(&mut self, process: &Process<'a>, streams: &mut Streams) -> Result<u32, End> {
        let (way, bulk) = (streams.way, self.shared.bulk.clone());
        self.doing(&format!("{way:?} of {}", process.name()));
        if way == Way::TerminalBoth {
            streams.stdout.until(|bytes| bytes == b"ready\n");
        }
        let mut feeding = streams.stdin.take().map(|stdin| self.feed(stdin));
        let mut closed = Ok(());
        let checked = bulk.check_while(&mut streams.stdout, bulk.bytes(), || {
            if let Some(feeding) = &mut feeding {
                // All data has come back: let the process end.
                closed = self.close(process, way, feeding);
            }
        });
        self.shared.tally.add(Count::Streams, 1);
        self.shared.tally.add(Count::Bytes, bulk.bytes() as u64);
        closed?;
        let fault = |what: String| {
            self.client.fault(Fault::WrongBytes, &format!("{way:?} of {}: {what}", process.name()))
        };
        checked.map_err(fault)?;
        match feeding.map(|feeding| feeding.done.recv_timeout(wait::LIMIT)) {
            None | Some(Ok(Ok(()))) => Ok(0),
            Some(Ok(Err(error))) => Err(fault(format!("write to stdin: {error}"))),
            Some(Err(error)) => Err(fault(format!("the writer to stdin is stuck: {error}"))),
        }
    }

    /// Writes to stdin in a thread, because reader and writer may block each other.
    fn feed(&self, stdin: Opening) -> Feeding {
        let bulk = self.shared.bulk.clone();
        let stdin = stdin.file();
        let ((keep, kept), (told, done)) = (mpsc::channel::<()>(), mpsc::channel());
        thread::spawn(move || {
            let written = bulk.try_feed(&stdin);
            // Keep the client's end open until CloseIO has been called: then the sender is dropped.
            let _ = kept.recv();
            drop(stdin);
            // The life may have ended with a fault.
            let _ = told.send(written);
        });
        Feeding { keep: Some(keep), done }
    }

    fn close(&self, process: &Process<'a>, way: Way, feeding: &mut Feeding) -> Result<(), End> {
        if way == Way::Both {
            self.client.call(&format!("close stdin of {}", process.name()), || process.close_stdin())?;
        }
        feeding.keep = None;
        Ok(())
    }
}
