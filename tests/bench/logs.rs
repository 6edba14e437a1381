//! The price of the journal's copy of a container's output: containers that write one line to their client, with the default of
//! the option `Log`, and with `Log = "client"`, alternately.

use super::container::Init;
use super::latency::{Rounds, Times, measure as alternately};
use super::output::Output;
use crate::common::node::Node;
use crate::common::options;

/// The two sides.
pub const SIDES: [&str; 2] = ["with the journal's copy", "Log = \"client\""];

const MODES: [&str; 2] = ["", "client"];

/// Measures whole lives of containers.
pub fn measure(node: &Node, runtime: &str, count: usize) -> [Times; 2] {
    alternately(Rounds::new(count), |index| {
        let output = Some(Output::new(false));
        let options = options::log(MODES[index]);
        vec![Init::with_options(node, runtime, &["/bin/echo", "hello"], output, options)]
    })
}
