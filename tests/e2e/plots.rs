//! The page of the benchmark: a browser can show it.

use serde_json::{Value, json};

use crate::common::plots;

/// Results of the form that the benchmark writes, with characters that HTML reserves.
fn results() -> Value {
    let times = |median: f64| json!({"p10_ms": median / 2.0, "median_ms": median, "p90_ms": median * 2.0});
    let line = |name: &str, ours: Value, other: Value| {
        json!({"name": name, "ratio": 0.5, "runtimes": [
            {"runtime": "io.containerd.systemd.v1", "value": ours},
            {"runtime": "<io.containerd.runc.v2> & \"others\"", "value": other},
        ]})
    };
    let kept = |containers: u32, kib: u32| json!({"containers": containers, "pss_kib": kib, "processes": 1});
    json!({"date": "2026-01-01", "lane": "nspawn", "processors": 2, "parts": [
        {"part": "execs, <one> & another", "lines": [line("total, ms", times(40.0), times(50.0))]},
        {"part": "CPU of an exec, by process", "lines": [line("PID 1, ms", times(4.0), times(0.0))]},
        {"part": "output", "lines": [line("FIFO, MB/s", times(900.0), Value::Null)]},
        {"part": "memory kept", "lines": [line("1", kept(1, 4000), kept(1, 18000)), line("50", kept(50, 5000), kept(50, 200_000))]},
    ]})
}

/// The elements of a document, in order. Panics if they are not nested as XML wants it.
fn elements(document: &str) -> Vec<String> {
    let (mut open, mut all) = (Vec::new(), Vec::new());
    for part in document.split('<').skip(1) {
        let (tag, text) = part.split_once('>').unwrap_or_else(|| panic!("a tag does not end: {part}"));
        assert!(!text.contains('>'), "a bare > in {text:?}");
        let entities = text.matches('&').count() + tag.matches('&').count();
        let known = ["&amp;", "&lt;", "&gt;", "&quot;"].map(|entity| part.matches(entity).count());
        assert_eq!(entities, known.iter().sum::<usize>(), "a bare & in {part:?}");
        assert_eq!(tag.matches('"').count() % 2, 0, "an attribute does not end: {tag:?}");
        if let Some(name) = tag.strip_prefix('/') {
            assert_eq!(open.pop().as_deref(), Some(name), "at </{name}>");
        } else if !tag.starts_with('!') {
            let name = tag.split([' ', '/']).next().unwrap_or_default().to_string();
            all.push(name.clone());
            if !tag.ends_with('/') {
                open.push(name);
            }
        }
    }
    assert_eq!(open, [""; 0], "these elements do not end");
    all
}

fn count(elements: &[String], name: &str) -> usize {
    elements.iter().filter(|element| *element == name).count()
}

#[test]
fn the_page_of_the_benchmark_is_well_formed_and_loads_no_other_file() {
    let page = plots::page(&results());
    let elements = elements(&page);
    assert_eq!(count(&elements, "svg"), 4, "times, memory, CPU, throughput");
    assert_eq!(count(&elements, "polyline"), 2, "memory of each runtime");
    for name in ["script", "link", "img", "iframe"] {
        assert_eq!(count(&elements, name), 0, "{name}");
    }
    let addresses: Vec<&str> = page.matches("http").collect();
    assert_eq!(addresses.len(), page.matches("xmlns=\"http://www.w3.org/2000/svg\"").count());
    assert!(!page.contains("NaN") && !page.contains("inf"), "{page}");
}

#[test]
fn the_picture_for_the_readme_has_both_runtimes_and_their_medians() {
    let picture = plots::picture(&results());
    elements(&picture);
    for text in ["io.containerd.systemd.v1", ">40.0</text>", ">50.0</text>"] {
        assert!(picture.contains(text), "{text} is not in {picture}");
    }
}

#[test]
fn a_run_that_measured_nothing_has_a_page_too() {
    let page = plots::page(&json!({"parts": []}));
    elements(&page);
    assert!(!page.contains("NaN") && !page.contains("inf"), "{page}");
}
