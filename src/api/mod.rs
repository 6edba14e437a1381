//! The edge to containerd: the only place, transport apart, that names ttrpc or protobuf types.

pub mod client;
pub mod convert;
pub mod events;
pub mod messages;
pub mod metrics;
pub mod status;
pub mod task;
