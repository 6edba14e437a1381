//! A report for a person, and one for a program (pure).

use std::fmt::Write;

use serde_json::{Value, json};

use crate::text;

use super::{Check, Status};

/// The longest line of the report, in characters.
const MOST_CHARACTERS: usize = 1000;

/// One line for each check, and a summary.
pub fn text(checks: &[Check]) -> String {
    let width = checks.iter().map(|check| check.name.len()).max().unwrap_or(0);
    let mut report = String::new();
    for check in checks {
        let separator = if check.advice.is_empty() { "" } else { ": " };
        let line = format!("{}{separator}{}", check.found, check.advice);
        let line = text::line(&line, MOST_CHARACTERS);
        // Writing to a string does not fail.
        let _ = writeln!(report, "{:<8} {:<width$}  {line}", check.status.word(), check.name);
    }
    let _ = writeln!(report, "\n{}", summary(checks));
    report
}

fn summary(checks: &[Check]) -> String {
    let [errors, warnings, unknown] =
        [Status::Error, Status::Warning, Status::Unknown].map(|status| count(checks, status));
    let few = |count, one: &str| format!("{count} {one}{}", if count == 1 { "" } else { "s" });
    let mut line = match (errors, warnings) {
        (0, 0) => "nothing to do".to_owned(),
        _ => format!("{}, {}", few(errors, "error"), few(warnings, "warning")),
    };
    if unknown > 0 {
        let _ = write!(line, "; {} could not be made", few(unknown, "check"));
    }
    line
}

/// The same report as JSON.
pub fn json(checks: &[Check]) -> Value {
    let entry = |check: &Check| {
        json!({
            "name": check.name,
            "status": check.status.word(),
            "found": check.found,
            "advice": check.advice,
        })
    };
    json!({
        "version": env!("CARGO_PKG_VERSION"),
        "errors": count(checks, Status::Error),
        "warnings": count(checks, Status::Warning),
        "unknown": count(checks, Status::Unknown),
        "checks": checks.iter().map(entry).collect::<Vec<_>>(),
    })
}

fn count(checks: &[Check], status: Status) -> usize {
    checks.iter().filter(|check| check.status == status).count()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_check_is_one_line_of_plain_characters() {
        let checks = [
            Check::ok("systemd", "systemd 257"),
            Check::error("unit", "evil\u{1b}[31m\nname", "remove\u{202e} it"),
        ];
        let report = text(&checks);
        assert_eq!(report.lines().count(), 4, "{report}");
        assert!(report.contains("error    unit     evil[31mname: remove it\n"), "{report}");
        assert!(report.ends_with("\n1 error, 0 warnings\n"), "{report}");
        assert!(text(&checks[..1]).ends_with("nothing to do\n"));
    }

    #[test]
    fn the_report_for_programs_counts() {
        let report = json(&[Check::warning("run", "full", "clear it"), Check::ok("bus", "answers")]);
        assert_eq!((report["errors"].as_u64(), report["warnings"].as_u64()), (Some(0), Some(1)));
        assert_eq!(report["checks"][0]["advice"], "clear it");
    }
}
