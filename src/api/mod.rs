//! The boundary to containerd. Only this module, `transport` and the commands in `cli` use types of ttrpc and protobuf.

pub mod client;
pub mod convert;
pub mod dispatch;
pub mod envelope;
pub mod events;
pub mod messages;
pub mod metrics;
pub mod pod;
pub mod sandbox;
pub mod status;
pub mod task;
