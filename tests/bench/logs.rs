//! The price of the journal's copy of a container's output: containers that write one line to their client, with the default of
//! the option `Log`, and with `Log = "client"`, alternately.

use prost::Message as _;
use prost_types::Any;

use super::container::Init;
use super::latency::{Rounds, Times, measure as alternately};
use super::output::Output;
use crate::common::node::Node;

/// The two sides.
pub const SIDES: [&str; 2] = ["with the journal's copy", "Log = \"client\""];

const MODES: [&str; 2] = ["", "client"];

/// The field of `containerd.systemd.v1.Options` that this uses.
#[derive(Clone, PartialEq, prost::Message)]
struct LogOption {
    #[prost(string, tag = "7")]
    log: String,
}

fn options(mode: &str) -> Any {
    let option = LogOption { log: mode.to_string() };
    Any { type_url: "containerd.systemd.v1.Options".to_string(), value: option.encode_to_vec() }
}

/// Measures whole lives of containers.
pub fn measure(node: &Node, runtime: &str, count: usize) -> [Times; 2] {
    alternately(Rounds::new(count), |index| {
        let output = Some(Output::new(false));
        vec![Init::with_options(node, runtime, &["/bin/echo", "hello"], output, options(MODES[index]))]
    })
}
