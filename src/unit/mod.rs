//! The systemd adapter: the only place that names zbus types.
//!
//! [`name`], [`properties`], [`annotation`], [`gvariant`], [`limits`], [`main_process`] and `signals` are pure. [`bus`] has the
//! connection, which `socket` opens, [`manager`] makes calls over it, [`watch`] turns signals into [`observations`], `backlog` waits
//! for those that have arrived, [`refs`] keeps units loaded, [`policy`] finds settings of administrators that break units, [`service_d`] and `exec_flags` protect
//! units from drop-ins for all services, [`notify`] speaks to systemd as a service does, [`fd_store`] has systemd keep
//! descriptors, [`error`] has what can go wrong. [`systemd`] has the traits that operations use.

pub mod annotation;
mod backlog;
pub mod bus;
pub mod bus_config;
mod drop_ins;
pub mod error;
mod exec_flags;
#[cfg(test)]
pub mod fake;
#[cfg(test)]
mod fake_bus;
pub mod fd_store;
pub mod gvariant;
mod holder;
pub mod job;
pub mod limits;
pub mod main_process;
pub mod manager;
pub mod name;
pub mod notify;
pub mod observations;
mod obstacle;
pub mod policy;
pub mod properties;
pub mod refs;
pub mod relay;
pub mod search_path;
pub mod service_d;
pub mod signals;
mod socket;
pub mod systemd;
pub mod watch;
pub mod wire;
