//! The systemd adapter: the only place that names zbus types.
//!
//! [`name`], [`properties`], [`annotation`], [`gvariant`], [`limits`], [`main_process`] and `signals` are pure. [`proxy`],
//! `control` and [`reading`] make calls, [`watch`] turns signals into [`observations`], [`notify`] speaks to systemd as a
//! service does, [`fd_store`] has systemd keep descriptors, [`error`] has what can go wrong. [`systemd`] is what operations see of all this.

mod account;
pub mod annotation;
mod control;
pub mod error;
#[cfg(test)]
pub mod fake;
pub mod fd_store;
pub mod gvariant;
mod holder;
mod job;
pub mod limits;
pub mod main_process;
pub mod name;
pub mod notify;
pub mod observations;
pub mod properties;
pub mod proxy;
pub mod reading;
pub mod refs;
pub mod relay;
pub mod signals;
pub mod systemd;
mod types;
pub mod watch;
