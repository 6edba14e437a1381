//! Signals by the names that images give them (pure).

/// The real-time signals that the C library does not use itself. containerd and systemd count from the first of them.
const RTMIN: i32 = 34;
const RTMAX: i32 = 64;

/// A text that names no signal.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error(
    "{text:?} is not a signal: use a name like \"SIGTERM\" or \"RTMIN+3\", or a number from 1 to {RTMAX}"
)]
pub struct Unknown {
    text: String,
}

/// The number of a signal: from its name, with or without `SIG`, or from its number.
///
/// # Errors
/// There is no such signal.
pub fn parse(text: &str) -> Result<i32, Unknown> {
    let upper = text.trim().to_ascii_uppercase();
    let name = upper.strip_prefix("SIG").unwrap_or(&upper);
    let offset = |text: &str| text.parse::<u8>().ok().map(i32::from);
    let number = if let Some(rest) = name.strip_prefix("RTMIN") {
        if rest.is_empty() { Some(RTMIN) } else { rest.strip_prefix('+').and_then(offset).map(|n| RTMIN + n) }
    } else if let Some(rest) = name.strip_prefix("RTMAX") {
        if rest.is_empty() { Some(RTMAX) } else { rest.strip_prefix('-').and_then(offset).map(|n| RTMAX - n) }
    } else {
        let named =
            || format!("SIG{name}").parse().ok().map(|signal: nix::sys::signal::Signal| signal as i32);
        upper.parse().ok().or_else(named)
    };
    let in_range = |number: &i32| {
        let real_time = name.starts_with("RT");
        (if real_time { RTMIN } else { 1 }..=RTMAX).contains(number)
    };
    number.filter(in_range).ok_or_else(|| Unknown { text: text.chars().take(80).collect() })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn signals_go_by_name_and_by_number() {
        for (text, number) in [
            ("SIGQUIT", 3),
            ("QUIT", 3),
            ("sigquit", 3),
            ("3", 3),
            ("SIGTERM", 15),
            ("SIGRTMIN+3", 37),
            ("RTMIN", 34),
            ("RTMAX-1", 63),
            ("SIGRTMAX", 64),
            ("64", 64),
        ] {
            assert_eq!(parse(text), Ok(number), "{text}");
        }
    }

    #[test]
    fn an_invalid_signal_is_refused() {
        for text in
            ["", "SIG", "0", "65", "-1", "SIGFOO", "RTMIN-1", "RTMIN+31", "RTMAX-31", "RTMIN+", "9 9", "SIG9"]
        {
            assert!(parse(text).is_err(), "{text}");
        }
    }
}
