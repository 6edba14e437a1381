//! Everything that happens without a call of containerd.

pub mod cleanup;
pub mod floods;
mod freezer;
mod kernel;
pub mod limits;
mod missed_ends;
pub mod oom;
pub mod removal;
pub mod slices;
pub mod systemd;

pub use cleanup::Cleanup;
pub use kernel::Cgroups;
pub use systemd::Units;
