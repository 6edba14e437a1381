//! Logs: structured into the journal where there is one, to stderr for a person.
//!
//! The level is `info` and comes from `CONTAINERD_SHIM_SYSTEMD_LOG`: a level, or `target=level,…`.

use tracing::level_filters::LevelFilter;
use tracing_subscriber::filter::Targets;
use tracing_subscriber::layer::SubscriberExt;
use tracing_subscriber::util::SubscriberInitExt;

/// Sets the process's subscriber. Called once, by the daemon.
pub fn init() {
    let asked =
        std::env::var("CONTAINERD_SHIM_SYSTEMD_LOG").ok().and_then(|text| text.parse::<Targets>().ok());
    let filter = asked.unwrap_or_else(|| Targets::new().with_default(LevelFilter::INFO));
    let registry = tracing_subscriber::registry().with(filter);
    let under_systemd = std::env::var_os("JOURNAL_STREAM").is_some();
    match tracing_journald::layer() {
        // Fields become journal fields by their own name: NAMESPACE would be too general.
        Ok(journal) if under_systemd => registry.with(journal.with_field_prefix(Some("SHIM".into()))).init(),
        Ok(_) | Err(_) => registry.with(tracing_subscriber::fmt::layer().with_writer(std::io::stderr)).init(),
    }
}
