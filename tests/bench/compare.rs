//! Compares ratios with those of the previous version. These are in `kept.json`, which is a copy of `target/bench.json`.

use std::fmt::Write;

use serde_json::Value;

const KEPT: &str = include_str!("kept.json");

/// A change of a ratio below this share has no meaning, however small the spread is.
const LEAST_CHANGE: f64 = 0.05;

/// A ratio and its standard error.
#[derive(Clone, Copy, Debug)]
struct Ratio {
    ratio: f64,
    /// The standard error of the median, for a normal distribution: 80 % of the samples are between p10 and p90.
    error: f64,
    /// Whether a greater value is better.
    is_rate: bool,
}

impl Ratio {
    fn of(line: &Value) -> Option<Ratio> {
        let number = |name: &str| line["spread"][name].as_f64();
        let (p10, p90, samples) = (number("p10")?, number("p90")?, number("samples")?);
        let error = 1.25 * (p90 - p10) / 2.56 / samples.max(1.0).sqrt();
        let is_rate = line["target"].get("at_least").is_some();
        Some(Ratio { ratio: line["ratio"].as_f64()?, error, is_rate })
    }

    /// How much worse this is than `kept`. `None` if the difference may be chance.
    fn worse_than(self, kept: Ratio) -> Option<f64> {
        let change = if self.is_rate { kept.ratio - self.ratio } else { self.ratio - kept.ratio };
        let chance = 2.0 * self.error.hypot(kept.error);
        (change > chance.max(LEAST_CHANGE * kept.ratio)).then_some(change)
    }
}

/// All lines by name. A name begins with that of the part.
fn lines(results: &Value) -> impl Iterator<Item = (String, &Value)> {
    let parts = results["parts"].as_array().into_iter().flatten();
    parts.flat_map(|part| {
        let lines = part["lines"].as_array().into_iter().flatten();
        let name = |line: &Value| Some(format!("{}: {}", part["part"].as_str()?, line["name"].as_str()?));
        lines.filter_map(move |line| Some((name(line)?, line)))
    })
}

/// The lines that are worse than before, as text.
pub fn text(results: &Value) -> String {
    let kept: Value = serde_json::from_str(KEPT).expect("kept.json is JSON");
    let mut text = String::new();
    let mut compared = 0;
    for (name, line) in lines(results) {
        let before = lines(&kept).find(|(other, _)| *other == name).and_then(|(_, line)| Ratio::of(line));
        let (Some(now), Some(before)) = (Ratio::of(line), before) else { continue };
        compared += 1;
        if let Some(change) = now.worse_than(before) {
            // Writing to a String does not fail.
            let _ = writeln!(
                text,
                "  {name}: {:.2} ± {:.2}, was {:.2} ± {:.2} (worse by {change:.2})",
                now.ratio, now.error, before.ratio, before.error
            );
        }
    }
    let date = kept["date"].as_str().unwrap_or("an unknown date");
    match (compared, text.is_empty()) {
        (0, _) => "no line to compare with the kept ratios\n".to_string(),
        (_, true) => format!("{compared} ratios compared with those of {date}: none got worse\n"),
        (_, false) => format!("worse than the ratios of {date}, of {compared} that were compared:\n{text}"),
    }
}
