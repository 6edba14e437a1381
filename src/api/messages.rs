//! Messages generated from `proto/`.

#[allow(clippy::all, clippy::unwrap_used)]
mod generated {
    include!(concat!(env!("OUT_DIR"), "/proto/mod.rs"));
}

pub use generated::bootstrap::{BootstrapParams, BootstrapResult};
pub use generated::cri;
pub use generated::linux_runtime::{
    CheckpointOptions as LinuxCheckpointOptions, CreateOptions as LinuxCreateOptions,
    RuncOptions as LinuxRuncOptions,
};
pub use generated::options::Options as SystemdOptions;
pub use generated::runtimeoptions::Options as GenericOptions;
