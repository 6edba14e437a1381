//! Logs go to the journal with structured fields, or to stderr outside of systemd. No thread waits for the journal.
//!
//! `CONTAINERD_SHIM_SYSTEMD_LOG` sets what is logged: a level, or a list `target=level,…`. The default is `info`.

pub mod journal;
mod sender;

use std::io::Write;
use std::path::Path;

use tracing::level_filters::LevelFilter;
use tracing_subscriber::filter::Targets;
use tracing_subscriber::layer::SubscriberExt;
use tracing_subscriber::util::SubscriberInitExt;

use journal::Journal;

const VARIABLE: &str = "CONTAINERD_SHIM_SYSTEMD_LOG";

/// Writes a message to stderr, for what runs before there is a log, or without one.
pub fn say(text: &str) {
    // An error can't be reported anywhere.
    let _ = writeln!(std::io::stderr(), "{}: {}", env!("CARGO_PKG_NAME"), text.trim_end());
}

/// Sets up logging for this process. The daemon calls it once.
pub fn init() {
    let wanted = std::env::var(VARIABLE).ok().filter(|text| !text.is_empty());
    let parsed = wanted.as_deref().map(str::parse::<Targets>);
    let (filter, error) = match parsed {
        Some(Ok(filter)) => (Some(filter), None),
        Some(Err(error)) => (None, Some(error)),
        None => (None, None),
    };
    let filter = filter.unwrap_or_else(|| Targets::new().with_default(LevelFilter::INFO));
    let registry = tracing_subscriber::registry().with(filter);
    let under_systemd = std::env::var_os("JOURNAL_STREAM").is_some();
    let journal = Journal::new(Path::new(journal::SOCKET), env!("CARGO_PKG_NAME"));
    match journal.ok().filter(|_| under_systemd) {
        Some(journal) => registry.with(journal).init(),
        None => registry.with(tracing_subscriber::fmt::layer().with_writer(std::io::stderr)).init(),
    }
    if let Some(error) = error {
        let value = wanted.unwrap_or_default();
        tracing::warn!(%error, "{VARIABLE}={value:?} is neither a level nor a list of target=level; logging at level info");
    }
}
