//! Medians and spread, as a table to read and as JSON to keep.

use std::fmt::Write;
use std::time::Duration;

use serde_json::{Value, json};

use super::arguments::Arguments;
use super::common::process;
use super::latency::Times;
use super::memory::Kept;
use super::start::Cost;

pub struct Report {
    runtimes: [String; 2],
    parallel_at_once: usize,
    serial: [Times<Vec<Duration>>; 2],
    parallel: [Times<Vec<Duration>>; 2],
    memory: [Vec<Kept>; 2],
    start: Option<Cost>,
}

/// The middle and the tenth from either end, in milliseconds.
#[derive(Clone, Copy)]
struct Spread {
    p10: f64,
    median: f64,
    p90: f64,
}

impl Spread {
    fn of(samples: &[Duration]) -> Spread {
        let mut sorted: Vec<f64> = samples.iter().map(|sample| sample.as_secs_f64() * 1000.0).collect();
        sorted.sort_by(f64::total_cmp);
        let at = |share: f64| sorted[((sorted.len() - 1) as f64 * share).round() as usize];
        Spread { p10: at(0.1), median: at(0.5), p90: at(0.9) }
    }

    fn text(self) -> String {
        format!("{:.2} ({:.2}–{:.2})", self.median, self.p10, self.p90)
    }

    fn json(self) -> Value {
        json!({"p10_ms": round(self.p10), "median_ms": round(self.median), "p90_ms": round(self.p90)})
    }
}

/// A line of the table: two runtimes, and the first over the second.
struct Line {
    name: String,
    texts: [String; 2],
    values: [Value; 2],
    ratio: f64,
}

impl Line {
    fn of_times(name: &str, samples: [&Vec<Duration>; 2]) -> Line {
        let spreads = samples.map(|samples| Spread::of(samples));
        Line {
            name: format!("{name}, ms"),
            texts: spreads.map(Spread::text),
            values: spreads.map(Spread::json),
            ratio: spreads[0].median / spreads[1].median,
        }
    }

    fn of_memory(kept: [&Kept; 2]) -> Line {
        let each = |kept: &Kept| kept.pss_kib as f64 / kept.containers as f64;
        Line {
            name: format!("Pss with {}, KiB", kept[0].containers),
            texts: kept.map(|kept| {
                format!("{} in {} processes, {:.0} each", kept.pss_kib, kept.processes, each(kept))
            }),
            values: kept.map(|kept| json!({"pss_kib": kept.pss_kib, "processes": kept.processes})),
            ratio: kept[0].pss_kib as f64 / kept[1].pss_kib as f64,
        }
    }

    fn json(&self, runtimes: &[String; 2]) -> Value {
        let [ours, other] = &self.values;
        json!({"name": self.name, "ratio": round(self.ratio), "runtimes": [
            {"runtime": runtimes[0], "value": ours},
            {"runtime": runtimes[1], "value": other},
        ]})
    }
}

impl Report {
    pub fn new(
        arguments: &Arguments,
        serial: [Times<Vec<Duration>>; 2],
        parallel: [Times<Vec<Duration>>; 2],
        memory: [Vec<Kept>; 2],
        start: Option<Cost>,
    ) -> Report {
        let (runtimes, parallel_at_once) = (arguments.runtimes.clone(), arguments.parallel);
        Report { runtimes, parallel_at_once, serial, parallel, memory, start }
    }

    /// The parts of the report: a heading and its lines.
    fn parts(&self) -> Vec<(String, Vec<Line>)> {
        let [ours, other] = &self.memory;
        let memory = ours.iter().zip(other).map(|(ours, other)| Line::of_memory([ours, other])).collect();
        let at_once = format!("{} at once (total: the round, by container)", self.parallel_at_once);
        vec![
            ("one after the other".to_string(), lines(&self.serial)),
            (at_once, lines(&self.parallel)),
            ("memory kept".to_string(), memory),
        ]
    }

    pub fn table(&self) -> String {
        let mut table =
            format!("{:<18} {:>36} {:>36} {:>7}\n", "", self.runtimes[0], self.runtimes[1], "ratio");
        for (heading, lines) in self.parts() {
            let _ = writeln!(table, "{heading}"); // to a String, this can't fail
            for Line { name, texts: [ours, other], ratio, .. } in lines {
                let _ = writeln!(table, "  {name:<16} {ours:>36} {other:>36} {ratio:>7.2}");
            }
        }
        if let Some(cost) = &self.start {
            let (cpu, elapsed) = (Spread::of(&cost.cpu).text(), Spread::of(&cost.elapsed).text());
            let _ = writeln!(
                table,
                "one call of start\n  {:<16} {cpu:>36}\n  {:<16} {elapsed:>36}",
                "CPU, ms", "elapsed, ms"
            );
        }
        table
    }

    pub fn json(&self) -> String {
        let parts: Vec<Value> = self
            .parts()
            .iter()
            .map(|(heading, lines)| {
                let lines: Vec<Value> = lines.iter().map(|line| line.json(&self.runtimes)).collect();
                json!({"part": heading, "lines": lines})
            })
            .collect();
        let start = self.start.as_ref().map(
            |cost| json!({"cpu": Spread::of(&cost.cpu).json(), "elapsed": Spread::of(&cost.elapsed).json()}),
        );
        let report = json!({
            "date": first_line("date", &["--utc", "--iso-8601=seconds"]),
            "lane": std::env::var("E2E_LANE").unwrap_or_else(|_| "host".to_string()),
            "kernel": first_line("uname", &["-r"]),
            "systemd": first_line("systemctl", &["--version"]),
            "containerd": first_line("containerd", &["--version"]),
            "runc": first_line("runc", &["--version"]),
            "processors": std::thread::available_parallelism().map_or(0, usize::from),
            "containers_one_after_the_other": self.serial[0].total.len(),
            "containers_at_once": self.parallel_at_once,
            "parts": parts,
            "start": start,
        });
        format!("{report:#}\n")
    }
}

fn lines(times: &[Times<Vec<Duration>>; 2]) -> Vec<Line> {
    let [ours, other] = times;
    vec![
        Line::of_times("create", [&ours.create, &other.create]),
        Line::of_times("start", [&ours.start, &other.start]),
        Line::of_times("wait", [&ours.wait, &other.wait]),
        Line::of_times("delete", [&ours.delete, &other.delete]),
        Line::of_times("total", [&ours.total, &other.total]),
    ]
}

fn first_line(program: &str, args: &[&str]) -> String {
    process::run(program, args).text().lines().next().unwrap_or_default().to_string()
}

/// Three digits after the point are more than is known.
fn round(value: f64) -> f64 {
    (value * 1000.0).round() / 1000.0
}
