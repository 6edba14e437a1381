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
    let parsed = wanted.as_deref().map(filter);
    let is_wrong = parsed.as_ref().is_some_and(Option::is_none);
    let filter = parsed.flatten().unwrap_or_else(|| Targets::new().with_default(LevelFilter::INFO));
    let registry = tracing_subscriber::registry().with(filter);
    let under_systemd = std::env::var_os("JOURNAL_STREAM").is_some();
    let journal = Journal::new(Path::new(journal::SOCKET), env!("CARGO_PKG_NAME"));
    match journal.ok().filter(|_| under_systemd) {
        Some(journal) => registry.with(journal).init(),
        None => registry.with(tracing_subscriber::fmt::layer().with_writer(std::io::stderr)).init(),
    }
    if is_wrong {
        let value = wanted.unwrap_or_default();
        tracing::warn!(
            "{VARIABLE}={value:?} is neither a level (error, warn, info, debug, trace, off) nor a list of target=level; logging at level info"
        );
    }
}

/// Reads a level, or a list of `target=level`. `None` for another text: as a filter, a level with a mistake would be the name of a
/// target, and everything else would not be logged.
fn filter(text: &str) -> Option<Targets> {
    let is_level = |part: &str| !part.is_empty() && part.parse::<LevelFilter>().is_ok();
    let is_known = |part: &str| part.contains('=') || is_level(part.trim());
    text.split(',').all(is_known).then(|| text.parse().ok()).flatten()
}

#[cfg(test)]
mod tests {
    use super::filter;

    #[test]
    fn a_level_with_a_mistake_is_no_target() {
        for right in ["debug", "INFO", "off", "zbus=trace", "info,zbus=trace", "info, zbus=debug"] {
            assert!(filter(right).is_some(), "{right}");
        }
        for wrong in ["dbg", "", "info,dbg", "foo=bar=x", "zbus=loud", "zbus"] {
            assert!(filter(wrong).is_none(), "{wrong}");
        }
    }
}
