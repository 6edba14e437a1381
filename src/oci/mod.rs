//! The OCI side: the bundle, the runtime and its options, the rootfs.

pub mod bundle;
pub mod canonical;
pub mod command;
pub mod containerd;
pub mod criu;
pub mod devices;
pub mod features;
pub mod metadata;
pub mod mount;
pub mod mount_options;
pub mod namespaces;
pub mod options;
pub mod pod;
pub mod pod_files;
pub mod process;
pub mod resources;
pub mod runtime;
pub mod sealed;
pub mod signal;
