//! `doctor`, `ps` and `inspect`: commands for people.

use crate::doctor::{self, Facts, Status};
use crate::manual::{Given, Tool};
use crate::probe;
use crate::task::Task;
use crate::text;
use crate::unit::name::PREFIX;
use crate::view::{self, Row, Survey};

use super::{Failure, block_on, show};

/// Runs a command. Returns false if `doctor` found an error.
pub(super) fn run(tool: &Tool, given: &Given) -> Result<bool, Failure> {
    if given.has("help") {
        return show(&tool.help()).map(|()| true);
    }
    match tool.name {
        "doctor" => doctor(given),
        "ps" => ps(given).map(|()| true),
        _ => inspect(given).map(|()| true),
    }
}

fn doctor(given: &Given) -> Result<bool, Failure> {
    let facts = block_on(Facts::collect())?;
    let checks = doctor::examine(&facts);
    let report = if given.has("json") { pretty(&doctor::json(&checks)) } else { doctor::text(&checks) };
    show(&report)?;
    Ok(checks.iter().all(|check| check.status != Status::Error))
}

fn ps(given: &Given) -> Result<(), Failure> {
    let survey = Survey::collect();
    let mut rows = rows(&survey)?;
    if let Some(namespace) = given.value("namespace") {
        rows.retain(|row| row.namespace == namespace);
    }
    if given.has("in-use") {
        all_are_readable(&survey)?;
        rows.retain(|row| !row.is_given_up);
    }
    let report = if given.has("json") {
        pretty(&view::table_json(&rows))
    } else if given.has("quiet") {
        rows.iter().map(|row| format!("{}\n", text::line(&row.id, usize::MAX))).collect()
    } else {
        view::table(&rows)
    };
    show(&report)
}

/// One of the two sources is enough: systemd may not answer, and only root may read records.
fn rows(survey: &Survey) -> Result<Vec<Row>, Failure> {
    match (&survey.units, &survey.records) {
        (Err(units), Err(records)) => Err(Failure(format!("can't list tasks: {units}; {records}"))),
        _ => Ok(view::rows(survey)),
    }
}

/// Fails if a task may be missing in the list: a task without a loaded unit only has a record.
fn all_are_readable(survey: &Survey) -> Result<(), Failure> {
    let records =
        survey.records.as_ref().map_err(|unknown| Failure(format!("can't list tasks: {unknown}")))?;
    match records.iter().find_map(|(_, task)| task.as_ref().err()) {
        None => Ok(()),
        Some(reason) => Err(Failure(format!("can't list all tasks: {reason}"))),
    }
}

fn inspect(given: &Given) -> Result<(), Failure> {
    let survey = Survey::collect();
    let rows = rows(&survey)?;
    let word = given.words.first().map(String::as_str).unwrap_or_default();
    let found = view::find(&rows, given.value("namespace"), word);
    let row = match found[..] {
        [row] => row,
        [] => {
            let word = text::line(word, 80);
            return Err(Failure(format!(
                "no task has an id, name or unit {word:?}: see containerd-shim-systemd-v1 ps"
            )));
        }
        _ => {
            let some: Vec<String> =
                found.iter().take(10).map(|row| format!("{}/{}", row.namespace, row.id)).collect();
            let word = text::line(word, 80);
            return Err(Failure(format!(
                "{word:?} matches {} tasks: {}; give more of the id, or -n NAMESPACE",
                found.len(),
                some.join(", ")
            )));
        }
    };
    let unit =
        survey.units.as_ref().ok().and_then(|units| {
            units.iter().find(|unit| probe::property(unit, "Id") == Some(row.unit.as_str()))
        });
    let record = record(&survey, row);
    let record = record.as_ref().map(|task| *task).map_err(String::as_str);
    let report = match given.has("json") {
        true => pretty(&view::details_json(row, unit, record)),
        false => view::details(row, unit, record),
    };
    show(&report)
}

fn record<'a>(survey: &'a Survey, row: &Row) -> Result<&'a Task, String> {
    let records = survey.records.as_ref().map_err(|unknown| format!("{unknown}; run inspect as root"))?;
    let tasks = records.iter().filter_map(|(_, task)| task.as_ref().ok());
    let mut tasks = tasks.filter(|task| task.unit().as_str() == row.unit);
    tasks.next().ok_or_else(|| match records.iter().any(|(_, task)| task.is_err()) {
        true => "no record that can be read names this unit; its record may be one of those that can't be read: see doctor"
            .to_owned(),
        false => format!("no record names this unit, although its name begins with {PREFIX}"),
    })
}

/// JSON escapes control characters by itself; those that change the direction of text are escaped here.
fn pretty(value: &serde_json::Value) -> String {
    let text = format!("{value:#}\n");
    let escape = |c: char| match c {
        '\n' => "\n".to_owned(),
        c if text::is_unfit(c) => {
            let mut units = [0; 2];
            c.encode_utf16(&mut units).iter().map(|unit| format!("\\u{unit:04x}")).collect()
        }
        c => c.to_string(),
    };
    text.chars().map(escape).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn tasks_in_use_are_only_listed_if_all_records_can_be_read() {
        use crate::probe::Unknown;
        let with = |records| all_are_readable(&Survey { units: Ok(vec![]), records, now_usec: 0 });
        with(Ok(vec![])).unwrap();
        let broken = with(Ok(vec![("/run/x".into(), Err("record /run/x has version 9".to_owned()))]));
        assert!(broken.unwrap_err().to_string().contains("version 9"));
        with(Err(Unknown::Forbidden("/run/x".to_owned()))).unwrap_err();
    }

    #[test]
    fn a_record_that_can_not_be_read_may_be_that_of_the_task() {
        let reason = |records| {
            let survey = Survey { units: Ok(vec![]), records: Ok(records), now_usec: 0 };
            record(&survey, &Row::default()).unwrap_err()
        };
        assert!(reason(vec![]).contains("although its name begins with containerd-"));
        assert!(reason(vec![("/run/x".into(), Err("version 9".to_owned()))]).contains("see doctor"));
    }

    #[test]
    fn json_has_no_character_that_changes_a_terminal() {
        let value = serde_json::json!({"name": "a\u{1b}[2J\u{202e}b\u{85}"});
        let text = pretty(&value);
        assert!(!text.chars().any(|c| c != '\n' && text::is_unfit(c)), "{text:?}");
        assert_eq!(serde_json::from_str::<serde_json::Value>(&text).unwrap(), value);
    }
}
