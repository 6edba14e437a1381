//! The Debian package, with apt and dpkg: installation, upgrade under load, downgrade, removal, purge. The RPM with rpm.
//!
//! Runs as root in the testbed, in a guest that has no other copy of the program. Every test begins without the package.

#[path = "../common/mod.rs"]
mod common;

mod downgrade;
mod install;
mod package;
mod remove;
mod rpm;
mod upgrade;
