//! The systemd adapter: the only place that names zbus types.
//!
//! [`name`], [`properties`], [`annotation`], [`gvariant`] and [`main_process`] are pure. [`proxy`] makes calls,
//! [`watch`] turns signals into observations, [`notify`] speaks to systemd as a service does, [`error`] has
//! what can go wrong.

pub mod annotation;
pub mod error;
pub mod gvariant;
mod job;
pub mod main_process;
pub mod name;
pub mod notify;
pub mod properties;
pub mod proxy;
pub mod refs;
mod types;
pub mod watch;
