//! What happens without a call of containerd's.

pub mod slices;
