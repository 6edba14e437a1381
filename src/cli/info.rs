//! `-info`: prints the version and the features of the runtime, for containerd.

use std::process::{Command, Stdio};

use containerd_shim_protos::types::introspection::{RuntimeInfo, RuntimeVersion};
use protobuf::well_known_types::any::Any;
use protobuf::{Message, MessageField};

use crate::api::convert;
use crate::id::Namespace;

use super::arguments::Global;
use super::{Failure, print, read_stdin};

const FEATURES: &str = "types.containerd.io/opencontainers/runtime-spec/1/features/Features";

pub(super) fn run(global: &Global) -> Result<(), Failure> {
    let input = read_stdin()?;
    let options = Any::parse_from_bytes(&input)
        .map_err(|error| Failure(format!("can't decode the options on standard input: {error}")))?;
    let source = convert::options(Some(&options)).map_err(Failure::new)?;
    let given = MessageField::from_option((!options.type_url.is_empty()).then_some(options));
    let features =
        features(source, global).map(|value| Any { type_url: FEATURES.to_owned(), value, ..Any::default() });
    let info = RuntimeInfo {
        name: "io.containerd.systemd.v1".to_owned(),
        version: MessageField::some(RuntimeVersion {
            version: env!("CARGO_PKG_VERSION").to_owned(),
            ..RuntimeVersion::default()
        }),
        options: given,
        features: MessageField::from_option(features),
        ..RuntimeInfo::default()
    };
    print(&info.write_to_bytes().map_err(Failure::new)?)
}

/// The output of the OCI runtime for `features`; `None` if the OCI runtime is too old for this command.
fn features(source: crate::oci::options::Source, global: &Global) -> Option<Vec<u8>> {
    let namespace = Namespace::new(&global.namespace).or_else(|_| Namespace::new("default")).ok()?;
    let path = std::env::var("PATH").unwrap_or_default();
    let runtime = source.read().ok()?.resolve(&namespace, &path).ok()?;
    let output = Command::new(runtime.binary)
        .arg("features")
        .stdin(Stdio::null())
        .stderr(Stdio::null())
        .output()
        .ok()?;
    let is_json = serde_json::from_slice::<serde::de::IgnoredAny>(&output.stdout).is_ok();
    (output.status.success() && is_json).then_some(output.stdout)
}
