//! The throughput of a process's output to the client. Also checks that all of it arrives.

use super::common::container::{Container, Io};
use super::common::node::Node;
use super::common::spec::Spec;
use super::container::Init;
use super::exec::Exec;
use super::latency::{Process, in_turn};
use super::output::{Drained, Output};

/// The number of measurements of each kind of output for each runtime.
pub const ROUNDS: usize = 10;

/// A terminal is slower, so it gets less output by this factor.
const TERMINAL_SHARE: u64 = 10;

const BLOCK: u64 = 64 * 1024;

/// The kind of output: through a FIFO or a terminal.
#[derive(Clone, Copy, Debug)]
pub enum Way {
    Init,
    Exec,
    InitTerminal,
    ExecTerminal,
}

impl Way {
    pub const ALL: [Way; 4] = [Way::Init, Way::Exec, Way::InitTerminal, Way::ExecTerminal];

    pub fn name(self) -> &'static str {
        match self {
            Way::Init => "of an init",
            Way::Exec => "of an exec",
            Way::InitTerminal => "init's terminal",
            Way::ExecTerminal => "exec's terminal",
        }
    }

    fn has_terminal(self) -> bool {
        matches!(self, Way::InitTerminal | Way::ExecTerminal)
    }
}

/// Megabytes (of 10^6 bytes) a second, from the first byte to the last.
pub struct Rates {
    pub way: Way,
    pub rates: [Vec<f64>; 2],
}

pub fn measure(node: &Node, runtimes: &[String; 2], megabytes: u64) -> Vec<Rates> {
    let living = runtimes.each_ref().map(|runtime| {
        node.container("throughput", Spec::sleeping()).runtime(runtime).started(&Io::default())
    });
    Way::ALL
        .into_iter()
        .map(|way| {
            let mut rates = [Vec::new(), Vec::new()];
            in_turn(ROUNDS, |_, index| {
                rates[index].push(rate(node, &runtimes[index], &living[index], way, megabytes));
            });
            Rates { way, rates }
        })
        .collect()
}

fn rate(node: &Node, runtime: &str, living: &Container, way: Way, megabytes: u64) -> f64 {
    let terminal = way.has_terminal();
    let bytes = megabytes * 1_000_000 / if terminal { TERMINAL_SHARE } else { 1 };
    let blocks = bytes.div_ceil(BLOCK);
    let output = Output::new(terminal);
    // A raw terminal passes bytes on as they are.
    let prepare = if terminal { "stty raw -echo && " } else { "" };
    let script = format!("{prepare}exec dd if=/dev/zero bs={BLOCK} count={blocks} 2>/dev/null");
    let args = ["/bin/sh", "-c", &script];
    let Drained { bytes, elapsed } = match way {
        Way::Init | Way::InitTerminal => {
            let mut init = Init::new(node, runtime, &args, Some(output));
            flow(&mut init, Init::output)
        }
        Way::Exec | Way::ExecTerminal => {
            let mut exec = Exec::new(node, living, &args, output);
            flow(&mut exec, |exec| &mut exec.output)
        }
    };
    assert_eq!(bytes, blocks * BLOCK, "what dd has written {way:?} arrives");
    bytes as f64 / 1e6 / elapsed.as_secs_f64()
}

fn flow<P: Process>(process: &mut P, output: impl Fn(&mut P) -> &mut Output) -> Drained {
    process.create();
    process.start();
    let drained = output(process).drain();
    assert_eq!(process.waiting()(), 0, "dd succeeds");
    process.delete();
    drained
}
