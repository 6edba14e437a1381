//! Medians and spread, as a table to read and as JSON to keep.

use std::fmt::Write;
use std::time::Duration;

use serde_json::{Value, json};

use super::arguments::Arguments;
use super::common::process;
use super::cpu::Cpu;
use super::journal::{self, Costs};
use super::latency::Times;
use super::logs;
use super::memory::Kept;
use super::start::Cost;
use super::stats::Stats;
use super::throughput::Rates;

/// The name of the total time of processes that run at the same time.
pub const PER_PROCESS: &str = "total: the round, by process";

pub struct Report {
    runtimes: [String; 2],
    iterations: usize,
    execs: usize,
    at_once: usize,
    parts: Vec<Part>,
    start: Option<Cost>,
}

/// A heading and its lines.
pub struct Part {
    heading: String,
    /// The two sides, if they are not the runtimes.
    sides: Option<[&'static str; 2]>,
    lines: Vec<Line>,
}

/// A line of the table: two sides, and the ratio of the first to the second.
pub struct Line {
    name: String,
    texts: [String; 2],
    values: [Value; 2],
    medians: [f64; 2],
    /// Times may be too short for a ratio.
    is_comparable: bool,
    target: Option<Target>,
    /// The ratio of the first side to the second for each sample, if the sides were measured alternately.
    ratios: Option<Ratios>,
}

struct Ratios {
    spread: Spread,
    samples: usize,
}

impl Ratios {
    fn of([ours, other]: [&[f64]; 2]) -> Option<Ratios> {
        let pairs = ours.iter().zip(other).filter(|(_, other)| **other > 0.0);
        let ratios: Vec<f64> = pairs.map(|(ours, other)| ours / other).collect();
        (!ratios.is_empty()).then(|| Ratios { spread: Spread::of(&ratios), samples: ratios.len() })
    }
}

/// Times below this measure the clock and the scheduler.
const COMPARABLE_MS: f64 = 0.1;

/// The target of the first side, relative to the second.
#[derive(Clone, Copy)]
pub enum Target {
    AtMost(f64),
    AtLeast(f64),
    /// The first side may take this many milliseconds longer.
    LongerByAtMost(f64),
}

impl Target {
    fn is_met(self, [first, second]: [f64; 2]) -> bool {
        match self {
            Target::AtMost(most) => first / second <= most,
            Target::AtLeast(least) => first / second >= least,
            Target::LongerByAtMost(most) => first - second <= most,
        }
    }

    fn text(self, medians: [f64; 2]) -> String {
        let sign = if self.is_met(medians) { "met" } else { "missed" };
        match self {
            Target::AtMost(most) => format!("≤ {most:.2} {sign}"),
            Target::AtLeast(least) => format!("≥ {least:.2} {sign}"),
            Target::LongerByAtMost(most) => {
                format!("{:+.3} ms ≤ {most:.0} ms {sign}", medians[0] - medians[1])
            }
        }
    }

    fn json(self, medians: [f64; 2]) -> Value {
        let (name, bound) = match self {
            Target::AtMost(most) => ("at_most", most),
            Target::AtLeast(least) => ("at_least", least),
            Target::LongerByAtMost(most) => ("longer_by_at_most_ms", most),
        };
        json!({name: bound, "met": self.is_met(medians)})
    }
}

/// The median, and the tenth and ninetieth percentiles.
#[derive(Clone, Copy)]
pub struct Spread {
    p10: f64,
    median: f64,
    p90: f64,
}

impl Spread {
    fn of(samples: &[f64]) -> Spread {
        let mut sorted = samples.to_vec();
        sorted.sort_by(f64::total_cmp);
        let at = |share: f64| sorted[((sorted.len() - 1) as f64 * share).round() as usize];
        Spread { p10: at(0.1), median: at(0.5), p90: at(0.9) }
    }

    pub fn of_times(samples: &[Duration]) -> Spread {
        Spread::of(&samples.iter().map(|sample| sample.as_secs_f64() * 1000.0).collect::<Vec<_>>())
    }

    pub fn text(self) -> String {
        format!("{:.2} ({:.2}–{:.2})", self.median, self.p10, self.p90)
    }

    /// `unit` is the unit of the numbers.
    fn json(self, unit: &str) -> Value {
        let Spread { p10, median, p90 } = self;
        [("p10", p10), ("median", median), ("p90", p90)]
            .map(|(name, value)| (format!("{name}_{unit}"), json!(round(value))))
            .into_iter()
            .collect()
    }
}

impl Line {
    fn of_times(name: &str, samples: [&Vec<Duration>; 2]) -> Line {
        let spreads = samples.map(|samples| Spread::of_times(samples));
        let line = Line::of_spreads(format!("{name}, ms"), spreads, "ms");
        let numbers = samples.map(|samples| samples.iter().map(Duration::as_secs_f64).collect::<Vec<_>>());
        let ratios = Ratios::of([&numbers[0], &numbers[1]]);
        Line { is_comparable: spreads[1].median >= COMPARABLE_MS, ratios, ..line }
    }

    /// Numbers of any unit. The name contains the unit.
    pub fn of_numbers(name: &str, samples: [&Vec<f64>; 2]) -> Line {
        let spreads = samples.map(|samples| Spread::of(samples));
        let ratios = Ratios::of(samples.map(Vec::as_slice));
        let line = Line::of_spreads(name.to_string(), spreads, "n");
        Line { is_comparable: spreads[1].median >= COMPARABLE_MS, ratios, ..line }
    }

    /// Values that only one side has.
    pub fn of_one(name: &str, samples: &[Duration]) -> Line {
        let spread = Spread::of_times(samples);
        let mut line = Line::of_spreads(name.to_string(), [spread, spread], "ms");
        (line.texts[1], line.values[1], line.is_comparable) = (String::new(), Value::Null, false);
        line
    }

    fn of_rates(Rates { way, rates }: &Rates) -> Line {
        let spreads = rates.each_ref().map(|rates| Spread::of(rates));
        let line = Line::of_spreads(format!("{}, MB/s", way.name()), spreads, "mb_s");
        let line = Line { ratios: Ratios::of(rates.each_ref().map(Vec::as_slice)), ..line };
        line.target(Some(Target::AtLeast(1.0)))
    }

    /// The medians of rounds that alternate between the sides.
    fn of_ratios<'t>(name: &str, rounds: [impl Iterator<Item = &'t [Duration]>; 2]) -> Line {
        let [ours, other] = rounds.map(|rounds| rounds.map(|round| Spread::of_times(round).median));
        let ratios = Spread::of(&ours.zip(other).map(|(ours, other)| ours / other).collect::<Vec<_>>());
        Line {
            name: name.to_string(),
            texts: [ratios.text(), String::new()],
            values: [ratios.json("ratio"), Value::Null],
            medians: [ratios.median, 1.0],
            is_comparable: true,
            target: None,
            ratios: None,
        }
    }

    fn of_spreads(name: String, spreads: [Spread; 2], unit: &str) -> Line {
        Line {
            name,
            texts: spreads.map(Spread::text),
            values: spreads.map(|spread| spread.json(unit)),
            medians: spreads.map(|spread| spread.median),
            is_comparable: true,
            target: None,
            ratios: None,
        }
    }

    fn of_memory(kept: [&Kept; 2]) -> Line {
        let each = |kept: &Kept| kept.pss_kib as f64 / kept.containers as f64;
        Line {
            name: format!("Pss with {}, KiB", kept[0].containers),
            texts: kept.map(|kept| {
                format!("{} in {} processes, {:.0} each", kept.pss_kib, kept.processes, each(kept))
            }),
            values: kept.map(|kept| {
                json!({"containers": kept.containers, "pss_kib": kept.pss_kib, "processes": kept.processes})
            }),
            medians: kept.map(|kept| kept.pss_kib as f64),
            is_comparable: true,
            target: None,
            ratios: None,
        }
    }

    pub fn target(self, target: Option<Target>) -> Line {
        Line { target, ..self }
    }

    fn ratio(&self) -> Option<f64> {
        self.is_comparable.then(|| self.medians[0] / self.medians[1])
    }

    fn judged<T>(&self, judge: impl Fn(Target, [f64; 2]) -> T) -> Option<T> {
        self.target.map(|target| judge(target, self.medians))
    }

    fn text(&self) -> String {
        let Line { name, texts: [ours, other], .. } = self;
        let ratio = self.ratio().map(|ratio| format!("{ratio:.2}")).unwrap_or_default();
        let target = self.judged(Target::text).unwrap_or_default();
        let line = format!("  {name:<46} {ours:>36} {other:>36} {ratio:>7}  {target}");
        line.trim_end().to_string()
    }

    fn json(&self, runtimes: [&str; 2]) -> Value {
        let [ours, other] = &self.values;
        let (ratio, target) = (self.ratio().map(round), self.judged(Target::json));
        let spread = self.ratios.as_ref().filter(|_| self.is_comparable);
        let spread = spread.map(|Ratios { spread: Spread { p10, p90, .. }, samples }| {
            json!({"p10": round(*p10), "p90": round(*p90), "samples": samples})
        });
        json!({"name": self.name, "ratio": ratio, "spread": spread, "target": target, "runtimes": [
            {"runtime": runtimes[0], "value": ours},
            {"runtime": runtimes[1], "value": other},
        ]})
    }
}

impl Part {
    /// The lives of processes, whose first call is named `create`.
    pub fn of_times(heading: &str, create: &str, times: &[Times; 2], target: Option<Target>) -> Part {
        let [ours, other] = times;
        let lines = vec![
            Line::of_times(create, [&ours.create, &other.create]),
            Line::of_times("start", [&ours.start, &other.start]),
            Line::of_times("wait", [&ours.wait, &other.wait]),
            Line::of_times("delete", [&ours.delete, &other.delete]),
            Line::of_times("total", [&ours.total, &other.total]).target(target),
        ];
        Part::new(heading, lines)
    }

    pub fn of_cpu([ours, other]: &[Cpu; 2]) -> Part {
        let lines = vec![
            Line::of_times("the shim's own", [&ours.shim, &other.shim]),
            Line::of_times("all processes", [&ours.machine, &other.machine]),
        ];
        Part::new("CPU of an exec", lines)
    }

    pub fn of_stats([ours, other]: &[Stats; 2]) -> Part {
        let lines = vec![
            Line::of_times("a call", [&ours.call, &other.call]),
            Line::of_times("the shim's own CPU", [&ours.shim, &other.shim]),
        ];
        Part::new("statistics", lines)
    }

    pub fn of_throughput(rates: &[Rates]) -> Part {
        Part::new("output", rates.iter().map(Line::of_rates).collect())
    }

    pub fn of_memory([ours, other]: &[Vec<Kept>; 2]) -> Part {
        let lines = ours.iter().zip(other).map(|(ours, other)| Line::of_memory([ours, other])).collect();
        Part::new("memory kept", lines)
    }

    /// Two configurations of one daemon.
    pub fn of_journal(costs: &[Costs; 2]) -> Part {
        let [ours, other] = costs;
        let rounds = costs.each_ref().map(|costs| costs.totals.chunks(journal::CONTAINERS));
        let lines = vec![
            Line::of_times("total per container", [&ours.totals, &other.totals])
                .target(Some(Target::AtMost(1.02))),
            Line::of_ratios("the same, by round", rounds),
            Line::of_times("the daemon's CPU for it", [&ours.container_cpu.shim, &other.container_cpu.shim]),
            Line::of_times("all CPU for it", [&ours.container_cpu.machine, &other.container_cpu.machine]),
            Line::of_times("a call of State", [&ours.calls, &other.calls])
                .target(Some(Target::LongerByAtMost(1.0))),
            Line::of_times("the daemon's CPU for it", [&ours.call_cpu, &other.call_cpu]),
        ];
        Part { sides: Some(journal::SIDES), ..Part::new("connections that outlive the daemon", lines) }
    }

    pub fn of_logs(times: &[Times; 2]) -> Part {
        let heading = "containers that write one line";
        let part = Part::of_times(heading, "create", times, Some(Target::AtMost(1.03)));
        Part { sides: Some(logs::SIDES), ..part }
    }

    pub fn new(heading: &str, lines: Vec<Line>) -> Part {
        Part { heading: heading.to_string(), sides: None, lines }
    }
}

impl Report {
    pub fn new(arguments: &Arguments, parts: Vec<Part>, start: Option<Cost>) -> Report {
        let Arguments { iterations, execs, parallel: at_once, .. } = *arguments;
        Report { runtimes: arguments.runtimes.clone(), iterations, execs, at_once, parts, start }
    }

    pub fn table(&self) -> String {
        let [ours, other] = &self.runtimes;
        let mut table = format!("{:<48} {ours:>36} {other:>36} {:>7}  target\n", "", "ratio");
        for Part { heading, sides, lines } in &self.parts {
            let sides = sides.map(|[ours, other]| format!("{ours:>25} {other:>36}")).unwrap_or_default();
            let _ = writeln!(table, "{}", format!("{heading:<59} {sides}").trim_end()); // to a String, this can't fail
            for line in lines {
                let _ = writeln!(table, "{}", line.text());
            }
        }
        if let Some(cost) = &self.start {
            let _ = writeln!(table, "one call of start");
            for (name, times) in [("CPU, ms", &cost.cpu), ("elapsed, ms", &cost.elapsed)] {
                let _ = writeln!(table, "  {name:<46} {:>36}", Spread::of_times(times).text());
            }
        }
        table
    }

    pub fn json(&self) -> Value {
        let part = |Part { heading, sides, lines }: &Part| {
            let sides = sides.unwrap_or(self.runtimes.each_ref().map(String::as_str));
            let lines: Vec<Value> = lines.iter().map(|line| line.json(sides)).collect();
            json!({"part": heading, "lines": lines})
        };
        let times = |times: &[Duration]| Spread::of_times(times).json("ms");
        let start =
            self.start.as_ref().map(|cost| json!({"cpu": times(&cost.cpu), "elapsed": times(&cost.elapsed)}));
        json!({
            "date": first_line("date", &["--utc", "--iso-8601=seconds"]),
            "lane": std::env::var("E2E_LANE").unwrap_or_else(|_| "host".to_string()),
            "kernel": first_line("uname", &["-r"]),
            "systemd": first_line("systemctl", &["--version"]),
            "containerd": first_line("containerd", &["--version"]),
            "runc": first_line("runc", &["--version"]),
            "processors": std::thread::available_parallelism().map_or(0, usize::from),
            "containers_one_after_the_other": self.iterations,
            "execs_one_after_the_other": self.execs,
            "at_once": self.at_once,
            "parts": self.parts.iter().map(part).collect::<Vec<Value>>(),
            "start": start,
        })
    }
}

fn first_line(program: &str, args: &[&str]) -> String {
    process::run(program, args).text().lines().next().unwrap_or_default().to_string()
}

/// Rounds to three digits after the point. More digits would be noise.
fn round(value: f64) -> f64 {
    (value * 1000.0).round() / 1000.0
}
