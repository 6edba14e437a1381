//! Tasks as a table (pure).

use serde_json::{Value, json};

use crate::text;

use super::Row;

/// The longest cell, in characters.
const MOST_CHARACTERS: usize = 80;

const HEADER: [&str; 9] = ["NAMESPACE", "ID", "UNIT", "POD", "IMAGE", "STATE", "PID", "MEMORY", "AGE"];

/// A line for each task, below a header.
pub fn table(rows: &[Row]) -> String {
    let mut lines = vec![HEADER.map(str::to_owned)];
    lines.extend(rows.iter().map(cells));
    let width = |column: usize| lines.iter().map(|line| line[column].chars().count()).max().unwrap_or(0);
    let widths: [usize; HEADER.len()] = std::array::from_fn(width);
    let mut text = String::new();
    for line in &lines {
        let cells = line.iter().zip(widths).map(|(cell, width)| format!("{cell:<width$}"));
        text += cells.collect::<Vec<_>>().join("  ").trim_end();
        text.push('\n');
    }
    text
}

fn cells(row: &Row) -> [String; HEADER.len()] {
    let optional = |text: &Option<String>| text.clone().unwrap_or_default();
    let state = match row.exit_status {
        Some(status) => format!("{} ({status})", row.state),
        None => row.state.clone(),
    };
    let cells = [
        row.namespace.clone(),
        row.short_id().to_owned(),
        row.unit.clone(),
        optional(&row.pod),
        optional(&row.image),
        state,
        row.pid.map(|pid| pid.to_string()).unwrap_or_default(),
        row.memory.map(bytes).unwrap_or_default(),
        row.age_sec.map(age).unwrap_or_default(),
    ];
    cells.map(|cell| match text::line(&cell, MOST_CHARACTERS) {
        empty if empty.is_empty() => "-".to_owned(),
        cell => cell,
    })
}

/// A size as systemctl writes it: `1.5M`.
pub(super) fn bytes(bytes: u64) -> String {
    let (mut value, mut unit) = (bytes, 'B');
    let mut tenths = 0;
    for next in ['K', 'M', 'G', 'T'] {
        if value < 1024 {
            break;
        }
        tenths = value % 1024 * 10 / 1024;
        (value, unit) = (value / 1024, next);
    }
    if tenths > 0 && value < 100 { format!("{value}.{tenths}{unit}") } else { format!("{value}{unit}") }
}

/// A duration by its two largest parts: `3d4h`.
pub(super) fn age(seconds: u64) -> String {
    let (days, hours, minutes) = (seconds / 86_400, seconds / 3600 % 24, seconds / 60 % 60);
    match (days, hours, minutes) {
        (0, 0, 0) => format!("{seconds}s"),
        (0, 0, minutes) => format!("{minutes}m{}s", seconds % 60),
        (0, hours, minutes) => format!("{hours}h{minutes}m"),
        (days, hours, _) => format!("{days}d{hours}h"),
    }
}

/// The table as JSON: an array of objects.
pub fn table_json(rows: &[Row]) -> Value {
    rows.iter().map(row_json).collect()
}

pub(super) fn row_json(row: &Row) -> Value {
    json!({
        "namespace": row.namespace,
        "id": row.id,
        "name": row.name,
        "unit": row.unit,
        "pod": row.pod,
        "image": row.image,
        "state": row.state,
        "exitStatus": row.exit_status,
        "pid": row.pid,
        "memoryBytes": row.memory,
        "ageSeconds": row.age_sec,
        "givenUp": row.is_given_up,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_table_has_a_line_for_each_task() {
        let rows = [
            Row {
                namespace: "k8s.io".to_owned(),
                id: "0123456789abcdef".repeat(4),
                unit: "containerd-k8s.io-0123456789ab.service".to_owned(),
                pod: Some("prod/shop".to_owned()),
                image: Some("evil\u{1b}]0;x\u{7}\nimage".to_owned()),
                state: "running".to_owned(),
                pid: Some(7),
                memory: Some(1_600_000),
                age_sec: Some(90_061),
                ..Row::default()
            },
            Row { state: "stopped".to_owned(), exit_status: Some(137), ..Row::default() },
        ];
        let text = table(&rows);
        let lines: Vec<Vec<&str>> = text.lines().map(|line| line.split_whitespace().collect()).collect();
        assert_eq!(lines[0], HEADER);
        let unit = "containerd-k8s.io-0123456789ab.service";
        let wanted =
            ["k8s.io", "0123456789ab", unit, "prod/shop", "evil]0;ximage", "running", "7", "1.5M", "1d1h"];
        assert_eq!(lines[1], wanted);
        assert_eq!(lines[2], ["-", "-", "-", "-", "-", "stopped", "(137)", "-", "-", "-"]);
    }

    #[test]
    fn sizes_and_ages_are_short() {
        for (number, text) in
            [(0, "0B"), (1023, "1023B"), (1536, "1.5K"), (104_857_600, "100M"), (5 << 30, "5G")]
        {
            assert_eq!(bytes(number), text);
        }
        for (seconds, text) in [(0, "0s"), (59, "59s"), (61, "1m1s"), (3660, "1h1m"), (266_400, "3d2h")] {
            assert_eq!(age(seconds), text);
        }
    }
}
