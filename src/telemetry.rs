//! Logs: structured into the journal where there is one, to stderr for a person.
//!
//! The level is `info` and comes from `CONTAINERD_SHIM_SYSTEMD_LOG` (the syntax of `RUST_LOG`).

use tracing_subscriber::EnvFilter;
use tracing_subscriber::layer::SubscriberExt;
use tracing_subscriber::util::SubscriberInitExt;

/// Sets the process's subscriber. Called once, by the daemon.
pub fn init() {
    let filter =
        EnvFilter::try_from_env("CONTAINERD_SHIM_SYSTEMD_LOG").unwrap_or_else(|_| EnvFilter::new("info"));
    let registry = tracing_subscriber::registry().with(filter);
    let under_systemd = std::env::var_os("JOURNAL_STREAM").is_some();
    match tracing_journald::layer() {
        // Fields become journal fields by their own name: NAMESPACE would be too general.
        Ok(journal) if under_systemd => registry.with(journal.with_field_prefix(Some("SHIM".into()))).init(),
        Ok(_) | Err(_) => registry.with(tracing_subscriber::fmt::layer().with_writer(std::io::stderr)).init(),
    }
}
