//! A browser shows the page of the benchmark. `run-page` runs these tests on the machine itself: no guest has a browser.

use std::fs;
use std::path::Path;
use std::process::{Command, Output};

use serde_json::Value;

use crate::common::plots;

/// The results that `tests/bench/kept.json` keeps, so the page is one that `make bench` has written.
fn page() -> String {
    let results: Value = serde_json::from_str(include_str!("../bench/kept.json")).unwrap();
    plots::page(&results)
}

/// Opens a page. `arguments` say what the browser does with it.
fn open(dir: &Path, page: &str, arguments: &[&str]) -> Output {
    let file = dir.join("page.html");
    fs::write(&file, page).unwrap();
    Command::new("timeout")
        .args([
            "120",
            "chromium",
            "--headless",
            "--disable-gpu",
            "--disable-dev-shm-usage",
            "--window-size=1000,3000",
        ])
        // The tests run as root. Chromium's sandbox does not.
        .arg("--no-sandbox")
        .arg(format!("--user-data-dir={}", dir.join("profile").display()))
        .args(["--enable-logging=stderr", "--log-level=0"])
        .args(arguments)
        .arg(format!("file://{}", file.display()))
        .output()
        .unwrap()
}

/// What the page has written to the console.
fn console(output: &Output) -> Vec<String> {
    let log = String::from_utf8_lossy(&output.stderr);
    log.lines().filter(|line| line.contains("CONSOLE")).map(str::to_owned).collect()
}

#[test]
fn it_reads_the_whole_page_without_an_error_on_the_console() {
    needs!(Browser);
    let dir = tempfile::tempdir().unwrap();
    let page = page();
    let output = open(dir.path(), &page, &["--dump-dom"]);
    assert!(output.status.success(), "{output:?}");
    let shown = String::from_utf8_lossy(&output.stdout);
    for element in ["<svg", "<rect", "<text", "<polyline", "<td>"] {
        let (written, shown) = (page.matches(element).count(), shown.matches(element).count());
        assert!(written > 0 && shown == written, "{shown} of {written} {element} are shown");
    }
    assert_eq!(console(&output), [""; 0]);

    let wrong = page.replace("</body>", "<script>console.error('wrong')</script></body>");
    assert_ne!(page, wrong);
    let found = console(&open(dir.path(), &wrong, &["--dump-dom"]));
    assert_eq!(found.len(), 1, "an error of a page is found");
}

#[test]
fn it_draws_the_page() {
    needs!(Browser);
    let dir = tempfile::tempdir().unwrap();
    let picture = dir.path().join("picture.png");
    let size = |page: &str| {
        let argument = format!("--screenshot={}", picture.display());
        let output = open(dir.path(), page, &[&argument]);
        assert!(output.status.success(), "{output:?}");
        let size = fs::metadata(&picture).unwrap().len();
        fs::remove_file(&picture).unwrap();
        size
    };
    let (empty, drawn) = (size("<!doctype html><title>empty</title>"), size(&page()));
    assert!(drawn > 4 * empty, "the picture has {drawn} bytes, that of an empty page has {empty}");
}
