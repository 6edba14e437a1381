//! `-info`: prints the version and the features of the runtime, for containerd.

use containerd_shim_protos::types::introspection::{RuntimeInfo, RuntimeVersion};
use protobuf::well_known_types::any::Any;
use protobuf::{Message, MessageField};

use crate::api::convert;
use crate::id::Namespace;
use crate::oci::features;
use crate::oci::options::OptionsSource;

use super::arguments::Flags;
use super::{Failure, print, read_stdin, say};

const FEATURES: &str = "types.containerd.io/opencontainers/runtime-spec/1/features/Features";

pub(super) fn run(flags: &Flags) -> Result<(), Failure> {
    let input = read_stdin()?;
    let options = Any::parse_from_bytes(&input)
        .map_err(|error| Failure(format!("can't decode the options on standard input: {error}")))?;
    let source = convert::options(Some(&options)).map_err(Failure::new)?;
    let given = MessageField::from_option((!options.type_url.is_empty()).then_some(options));
    let features =
        features(source, flags).map(|value| Any { type_url: FEATURES.to_owned(), value, ..Any::default() });
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

/// The features of the OCI runtime; `None`, with a warning on standard error, if they are not known. containerd's clients
/// then offer nothing that depends on them, such as user namespaces and recursive read-only mounts.
fn features(source: OptionsSource, flags: &Flags) -> Option<Vec<u8>> {
    let namespace = Namespace::new(&flags.namespace).or_else(|_| Namespace::new("default")).ok()?;
    let path = std::env::var("PATH").unwrap_or_default();
    let read = || -> Result<Vec<u8>, Failure> {
        let runtime = source.read().and_then(|options| options.resolve(&namespace, &path));
        features::read(runtime.map_err(Failure::new)?.binary).map_err(Failure::new)
    };
    read().map_err(|error| say(&format!("the features of the OCI runtime are not known: {error}"))).ok()
}
