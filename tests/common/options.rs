//! Options of the runtime that several programs of the tests use.

use prost::Message as _;
use prost_types::Any;

/// The field of `containerd.systemd.v1.Options` that is used here.
#[derive(Clone, PartialEq, prost::Message)]
struct Options {
    #[prost(string, tag = "7")]
    log: String,
}

/// The option `Log` in the runtime's own message. Empty: the default.
pub fn log(mode: &str) -> Any {
    let options = Options { log: mode.to_string() };
    Any { type_url: "containerd.systemd.v1.Options".to_string(), value: options.encode_to_vec() }
}
