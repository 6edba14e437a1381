//! The boundary to containerd. Besides `transport` and the commands in `cli`, no other module names ttrpc or protobuf
//! types.

pub mod client;
pub mod convert;
pub mod events;
pub mod messages;
pub mod metrics;
pub mod pod;
pub mod sandbox;
pub mod status;
pub mod task;
