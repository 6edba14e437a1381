//! The results of the benchmark as a page with plots: one file, SVG, no script (pure).

use std::fmt::Write;

use serde_json::Value;

const COLOURS: [&str; 2] = ["#2a6fb0", "#c9822b"];
const WIDTH: f64 = 860.0;
/// Where the bars begin; labels are left of it.
const LEFT: f64 = 330.0;
/// Space for the number behind the longest bar.
const RIGHT: f64 = 90.0;
const BAR: f64 = 13.0;
const ROW: f64 = 2.0 * BAR + 12.0;
const TOP: f64 = 58.0;
const CURVES_HEIGHT: f64 = 320.0;

const STYLE: &str = "body{font:15px/1.5 sans-serif;max-width:900px;margin:2em auto;padding:0 1em;color:#222}\
    table{border-collapse:collapse}td{padding:.1em 1em .1em 0}svg{width:100%;height:auto;margin:1em 0}";

/// The median, the 10th and the 90th percentile. All three are the same for a single number.
#[derive(Clone, Copy)]
struct Range {
    low: f64,
    middle: f64,
    high: f64,
}

/// A label and a range for each side.
struct Row {
    label: String,
    sides: [Option<Range>; 2],
}

/// A page with all plots and the facts of the machine.
pub fn page(results: &Value) -> String {
    let mut page = String::from("<!DOCTYPE html>\n<html lang=\"en\">\n<head>\n<meta charset=\"utf-8\"/>\n");
    let _ = writeln!(
        page,
        "<title>Benchmark</title>\n<style>{STYLE}</style>\n</head>\n<body>\n<h1>Benchmark</h1>"
    );
    page.push_str(
        "<p>Bars go from the 10th to the 90th percentile, their line is the median.</p>\n<table>\n",
    );
    for fact in ["date", "lane", "kernel", "systemd", "containerd", "runc", "processors"] {
        let value = match &results[fact] {
            Value::String(text) => escaped(text),
            other => escaped(&other.to_string()),
        };
        let _ = writeln!(page, "<tr><td>{fact}</td><td>{value}</td></tr>");
    }
    page.push_str("</table>\n");
    for plot in [Some(picture(results)), memory(results)].into_iter().flatten().chain(others(results)) {
        page.push_str(&plot);
    }
    page.push_str("</body>\n</html>\n");
    page
}

/// The total times of all kinds of processes: the plot for README.
pub fn picture(results: &Value) -> String {
    let totals = parts(results).filter_map(|part| {
        let line = lines(part).find(|line| line["name"] == "total, ms")?;
        Some(row(part["part"].as_str()?, line))
    });
    bars("Time from the first call to the last, ms", &names(results), &totals.collect::<Vec<_>>())
}

/// CPU time and throughput.
fn others(results: &Value) -> impl Iterator<Item = String> {
    let wanted = |name: &str| name.starts_with("CPU of") || name == "output";
    parts(results).filter_map(move |part| {
        let name = part["part"].as_str().filter(|name| wanted(name))?;
        let rows = lines(part).filter_map(|line| Some(row(line["name"].as_str()?, line)));
        Some(bars(name, &names(results), &rows.collect::<Vec<_>>()))
    })
}

/// Memory over the number of containers.
fn memory(results: &Value) -> Option<String> {
    let part = parts(results).find(|part| part["part"] == "memory kept")?;
    let curve = |side: usize| -> Vec<(f64, f64)> {
        let values = lines(part).map(|line| &line["runtimes"][side]["value"]);
        let point =
            |value: &Value| Some((value["containers"].as_f64()?, value["pss_kib"].as_f64()? / 1024.0));
        values.filter_map(point).collect()
    };
    Some(curves(
        "Memory of the runtime (Pss) by number of containers, MiB",
        &names(results),
        &[curve(0), curve(1)],
    ))
}

fn parts(results: &Value) -> impl Iterator<Item = &Value> {
    results["parts"].as_array().into_iter().flatten()
}

fn lines(part: &Value) -> impl Iterator<Item = &Value> {
    part["lines"].as_array().into_iter().flatten()
}

/// The names of both runtimes, from the first line that has them.
fn names(results: &Value) -> [String; 2] {
    let line = parts(results).flat_map(lines).next();
    [0, 1].map(|side| {
        let name = line.and_then(|line| line["runtimes"][side]["runtime"].as_str());
        name.unwrap_or_default().to_string()
    })
}

fn row(label: &str, line: &Value) -> Row {
    Row { label: label.to_string(), sides: [0, 1].map(|side| range(&line["runtimes"][side]["value"])) }
}

/// `{"p10_ms": …, "median_ms": …, "p90_ms": …}`, in any unit.
fn range(value: &Value) -> Option<Range> {
    let values = value.as_object()?;
    let of = |name: &str| values.iter().find(|(key, _)| key.starts_with(name))?.1.as_f64();
    Some(Range { low: of("p10_")?, middle: of("median_")?, high: of("p90_")? })
}

/// The beginning of a plot: title and legend.
fn opened(title: &str, names: &[String; 2], height: f64) -> String {
    let mut svg = format!(
        "<svg xmlns=\"http://www.w3.org/2000/svg\" viewBox=\"0 0 {WIDTH} {height:.0}\" role=\"img\" \
         font-family=\"sans-serif\" font-size=\"13\">\n<rect width=\"{WIDTH}\" height=\"{height:.0}\" fill=\"#fff\"/>\n"
    );
    let _ = writeln!(svg, "<text x=\"8\" y=\"20\" font-size=\"16\">{}</text>", escaped(title));
    for (index, (name, colour)) in names.iter().zip(COLOURS).enumerate() {
        let x = 8.0 + 240.0 * index as f64;
        let _ = writeln!(svg, "<rect x=\"{x}\" y=\"31\" width=\"12\" height=\"12\" fill=\"{colour}\"/>");
        let _ = writeln!(svg, "<text x=\"{}\" y=\"42\">{}</text>", x + 18.0, escaped(name));
    }
    svg
}

fn bars(title: &str, names: &[String; 2], rows: &[Row]) -> String {
    let mut svg = opened(title, names, TOP + ROW * rows.len() as f64);
    let highest = rows.iter().flat_map(|row| row.sides.iter().flatten()).map(|range| range.high);
    let scale = (WIDTH - LEFT - RIGHT) / highest.fold(f64::MIN_POSITIVE, f64::max);
    for (index, Row { label, sides }) in rows.iter().enumerate() {
        let y = TOP + ROW * index as f64;
        let (x, middle) = (LEFT - 8.0, y + BAR + 4.0);
        let _ = writeln!(svg, "<text x=\"{x}\" y=\"{middle}\" text-anchor=\"end\">{}</text>", escaped(label));
        for (side, range) in sides.iter().enumerate() {
            let Some(Range { low, middle, high }) = range else { continue };
            let y = y + BAR * side as f64;
            let [low, at, high] = [low, middle, high].map(|value| LEFT + value.max(0.0) * scale);
            let (colour, height, below) = (COLOURS[side], BAR - 2.0, y + BAR - 3.0);
            let _ = writeln!(
                svg,
                "<rect x=\"{LEFT}\" y=\"{y}\" width=\"{:.1}\" height=\"{height}\" fill=\"{colour}\" opacity=\"0.35\"/>\n\
                 <rect x=\"{low:.1}\" y=\"{y}\" width=\"{:.1}\" height=\"{height}\" fill=\"{colour}\"/>\n\
                 <rect x=\"{at:.1}\" y=\"{y}\" width=\"2\" height=\"{height}\" fill=\"#111\"/>\n\
                 <text x=\"{:.1}\" y=\"{below}\" font-size=\"11\">{middle:.1}</text>",
                at - LEFT,
                (high - low).max(1.0),
                high.max(at) + 6.0,
            );
        }
    }
    svg.push_str("</svg>\n");
    svg
}

fn curves(title: &str, names: &[String; 2], curves: &[Vec<(f64, f64)>; 2]) -> String {
    let mut svg = opened(title, names, CURVES_HEIGHT);
    let points = || curves.iter().flatten();
    let most = |of: fn(&(f64, f64)) -> f64| points().map(of).fold(f64::MIN_POSITIVE, f64::max);
    let (most_x, most_y) = (most(|point| point.0), most(|point| point.1));
    let (left, bottom) = (60.0, CURVES_HEIGHT - 30.0);
    let at = |(x, y): (f64, f64)| {
        (left + x / most_x * (WIDTH - left - RIGHT), bottom - y / most_y * (bottom - TOP - 10.0))
    };
    let _ = writeln!(
        svg,
        "<path d=\"M{left} {TOP} V{bottom} H{}\" fill=\"none\" stroke=\"#888\"/>",
        WIDTH - RIGHT
    );
    for (curve, colour) in curves.iter().zip(COLOURS) {
        let path: Vec<String> =
            curve.iter().map(|point| at(*point)).map(|(x, y)| format!("{x:.1},{y:.1}")).collect();
        let _ = writeln!(
            svg,
            "<polyline points=\"{}\" fill=\"none\" stroke=\"{colour}\" stroke-width=\"2\"/>",
            path.join(" ")
        );
        for (containers, mebibytes) in curve {
            let (x, y) = at((*containers, *mebibytes));
            let _ = writeln!(
                svg,
                "<circle cx=\"{x:.1}\" cy=\"{y:.1}\" r=\"4\" fill=\"{colour}\"/>\n\
                 <text x=\"{:.1}\" y=\"{:.1}\" font-size=\"11\">{mebibytes:.1}</text>\n\
                 <text x=\"{x:.1}\" y=\"{}\" font-size=\"11\" text-anchor=\"middle\">{containers}</text>",
                x + 8.0,
                y - 6.0,
                bottom + 18.0,
            );
        }
    }
    svg.push_str("</svg>\n");
    svg
}

/// Text for HTML and XML.
fn escaped(text: &str) -> String {
    text.replace('&', "&amp;").replace('<', "&lt;").replace('>', "&gt;").replace('"', "&quot;")
}
