//! All information about one task (pure).

use std::fmt::Write;
use std::path::Path;

use serde_json::{Value, json};

use crate::probe::{Properties, property};
use crate::task::Task;
use crate::task::lifecycle::Lifecycle;
use crate::task::outbox::{Outbox, Owed, TaskEvent};
use crate::task::process::Process;
use crate::task::request::Log;
use crate::task::wiring::{Copied, Input, JournalCopy, Output, Sink};
use crate::text;

use super::table::{age, bytes, row_json};
use super::{Row, in_shell};

/// The longest value, in characters.
const MOST_CHARACTERS: usize = 400;

/// The information for a person: sections of `name: value` lines.
pub fn details(row: &Row, unit: Option<&Properties>, record: Result<&Task, &str>) -> String {
    let mut page = Page::default();
    page.section("Task");
    page.line("Namespace", &row.namespace);
    page.line("Id", &row.id);
    page.line("Name", &row.name);
    page.optional("Pod", row.pod.as_deref());
    page.optional("Image", row.image.as_deref());
    page.line("State", &row.state);
    page.optional("Exit status", row.exit_status.map(|status| status.to_string()).as_deref());
    page.optional("Process", row.pid.map(|pid| pid.to_string()).as_deref());
    page.optional("Memory", row.memory.map(bytes).as_deref());
    page.optional("Age", row.age_sec.map(age).as_deref());

    page.section("Unit");
    page.line("Name", &row.unit);
    match unit {
        None => page.line("State", "not loaded"),
        Some(unit) => {
            for name in ["Description", "Result", "Slice", "ControlGroup", "TasksCurrent", "FreezerState"] {
                page.optional(name, property(unit, name));
            }
            let state = ["ActiveState", "SubState"].map(|name| property(unit, name).unwrap_or_default());
            page.line("State", &format!("{} ({})", state[0], state[1]));
        }
    }
    match record {
        Ok(task) => of_record(&mut page, task),
        Err(reason) => {
            page.section("Record");
            page.line("Unknown", reason);
        }
    }
    page.section("More");
    let unit = in_shell(&row.unit);
    for command in ["systemctl status", "journalctl -u", "systemctl show"] {
        page.line("Command", &format!("{command} {unit}"));
    }
    page.0
}

fn of_record(page: &mut Page, task: &Task) {
    page.section("Record");
    page.line("Phase", &phase(&task.init));
    page.line("Bundle", &task.request.bundle.to_string_lossy());
    page.line("OCI runtime", &task.runtime.binary.to_string_lossy());
    page.line("State of the OCI runtime", &task.runtime.root.to_string_lossy());
    page.line("containerd", &task.containerd.grpc_address);
    page.optional("Cgroup", task.cgroup().map(|path| path.to_string_lossy()).as_deref());
    let kills = task.init.phase.container().map_or(0, |container| container.oom_kills);
    page.line("Out of memory", &format!("{kills} processes killed"));
    for property in &task.properties {
        page.line("Property", &format!("{}={}", property.name, property.value));
    }
    for (flag, meaning) in [
        (task.notify, "may notify systemd"),
        (task.given_up, "containerd has given the task up"),
        (task.is_leftover, "Create has failed, and its cleanup is not complete"),
        (task.rootfs_on_host, "its rootfs is mounted on the host"),
    ] {
        page.optional("Note", flag.then_some(meaning));
    }

    page.section("Streams");
    page.line("Log", log(task.runtime.log));
    page.line("Terminal", if task.init.wiring.terminal { "yes" } else { "no" });
    let stdio = &task.init.stdio;
    for (name, asked, leads) in [
        ("stdin", &stdio.stdin, input(&task.init.wiring.stdin)),
        ("stdout", &stdio.stdout, output(&task.init.wiring.stdout)),
        ("stderr", &stdio.stderr, output(&task.init.wiring.stderr)),
    ] {
        let asked = if asked.is_empty() { "nothing" } else { asked };
        page.line(name, &format!("{leads}; the client named {asked}"));
    }
    page.optional("Logger", task.init.logger.as_ref().map(|unit| unit.as_str()));

    page.section(&format!("Execs: {}", task.execs.len()));
    for (id, exec) in &task.execs {
        page.line(id.as_str(), &format!("{} in {}", phase(exec), exec.unit));
    }
    let owed: Vec<&Owed> = task.outbox.since(&Outbox::default()).collect();
    page.section(&format!("Events that containerd has not accepted: {}", owed.len()));
    for owed in owed {
        page.line("Event", &event(&owed.event));
    }
}

/// The phase in containerd's words, with the process and how it ended.
fn phase<P: Lifecycle>(process: &Process<P>) -> String {
    let exit = process.exit().map(|exit| format!(", exit status {}", exit.status));
    let pid = process.pid().map(|pid| format!(", process {pid}"));
    format!("{}{}{}", process.word(), pid.unwrap_or_default(), exit.unwrap_or_default())
}

/// The value of the option `Log`.
fn log(log: Log) -> &'static str {
    match log {
        Log::Auto => "auto",
        Log::Client => "client",
        Log::Journal => "journal",
        Log::Tee => "tee",
        Log::None => "none",
    }
}

/// Where standard input comes from.
fn input(input: &Input) -> String {
    match input {
        Input::Null => "nowhere".to_owned(),
        Input::Fifo(path) => of_client(path),
        Input::File(path) => path.display().to_string(),
    }
}

/// Where standard output or standard error goes.
fn output(output: &Output) -> String {
    match output {
        Output::Null => "nowhere".to_owned(),
        Output::Journal => "the journal".to_owned(),
        Output::Fifo(path) => of_client(path),
        Output::Logger => "the logger".to_owned(),
        Output::Copied(Copied { client, journal }) => {
            let client = client.as_ref().map(sink);
            let journal = match journal {
                JournalCopy::None => None,
                JournalCopy::Complete | JournalCopy::Aside => Some("the journal".to_owned()),
            };
            match (client, journal) {
                (Some(client), Some(journal)) => format!("{client}, and {journal}"),
                (one, other) => one.or(other).unwrap_or_else(|| "nowhere".to_owned()),
            }
        }
    }
}

fn sink(sink: &Sink) -> String {
    match sink {
        Sink::Fifo(path) => of_client(path),
        Sink::EndOnly(path) => format!("{} (only its end)", of_client(path)),
        Sink::File { path, .. } => path.display().to_string(),
        Sink::Logger => "the logger".to_owned(),
    }
}

fn of_client(fifo: &Path) -> String {
    format!("the client's FIFO {}", fifo.display())
}

/// An event in words, with its process.
fn event(event: &TaskEvent) -> String {
    let process = |pid: &Option<u32>| pid.map(|pid| format!(", process {pid}")).unwrap_or_default();
    match event {
        TaskEvent::Created { pid } => format!("created{}", process(pid)),
        TaskEvent::Started { pid } => format!("started, process {pid}"),
        TaskEvent::Paused => "paused".to_owned(),
        TaskEvent::Resumed => "resumed".to_owned(),
        TaskEvent::OutOfMemory => "out of memory".to_owned(),
        TaskEvent::Exited { pid, exit } => format!("ended, process {pid}, exit status {}", exit.status),
        TaskEvent::ExecAdded { exec } => format!("exec {exec} added"),
        TaskEvent::ExecStarted { exec, pid } => format!("exec {exec} started, process {pid}"),
        TaskEvent::ExecExited { exec, pid, exit } => {
            format!("exec {exec} ended, process {pid}, exit status {}", exit.status)
        }
        TaskEvent::Deleted { pid, exit } => format!("deleted{}, exit status {}", process(pid), exit.status),
    }
}

#[derive(Default)]
struct Page(String);

impl Page {
    fn section(&mut self, title: &str) {
        let separator = if self.0.is_empty() { "" } else { "\n" };
        // Writing to a string does not fail.
        let _ = writeln!(self.0, "{separator}{title}");
    }

    fn line(&mut self, name: &str, value: &str) {
        let (name, value) = (text::line(name, MOST_CHARACTERS), text::line(value, MOST_CHARACTERS));
        let _ = writeln!(self.0, "  {name}: {value}");
    }

    fn optional(&mut self, name: &str, value: Option<&str>) {
        if let Some(value) = value.filter(|value| !value.is_empty()) {
            self.line(name, value);
        }
    }
}

/// The information for a program: the row, the unit's properties and the unchanged record.
pub fn details_json(row: &Row, unit: Option<&Properties>, record: Result<&Task, &str>) -> Value {
    let record = match record {
        Ok(task) => serde_json::to_value(task).unwrap_or_default(),
        Err(_) => Value::Null,
    };
    json!({"task": row_json(row), "unit": unit, "record": record})
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::probe::properties;

    #[test]
    fn the_record_is_shown_in_words() {
        let mut task: Task = serde_json::from_slice(include_bytes!("../../fuzz/corpus/record/task")).unwrap();
        task.init.stdio.stdout = "/f".to_owned();
        task.init.wiring.stdout =
            Output::Copied(Copied { client: Some(Sink::Fifo("/f".into())), journal: JournalCopy::Aside });
        task.outbox.push(TaskEvent::Started { pid: 7 }, 5);
        let exit = crate::task::lifecycle::Exit { status: 3, at_usec: 6 };
        task.outbox.push(TaskEvent::Deleted { pid: None, exit }, 6);
        let page = details(&Row::default(), None, Ok(&task));
        for line in [
            "  Log: auto\n",
            "  stdin: nowhere; the client named nothing\n",
            "  stdout: the client's FIFO /f, and the journal; the client named /f\n",
            "Events that containerd has not accepted: 2\n  Event: started, process 7\n  Event: deleted, exit status 3\n",
        ] {
            assert!(page.contains(line), "{line}: {page}");
        }
        assert!(!page.contains(['{', '"']), "{page}");
    }

    #[test]
    fn destinations_have_words() {
        let copied = |client, journal| output(&Output::Copied(Copied { client, journal }));
        let file = || Some(Sink::File { path: "/log".into(), create: true });
        assert_eq!(copied(None, JournalCopy::Complete), "the journal");
        assert_eq!(copied(file(), JournalCopy::Complete), "/log, and the journal");
        assert_eq!(copied(Some(Sink::Logger), JournalCopy::None), "the logger");
        assert_eq!(copied(None, JournalCopy::None), "nowhere");
        let end = Some(Sink::EndOnly("/f".into()));
        assert_eq!(
            copied(end, JournalCopy::Complete),
            "the client's FIFO /f (only its end), and the journal"
        );
        assert_eq!(output(&Output::Fifo("/f".into())), "the client's FIFO /f");
        assert_eq!(input(&Input::File("/in".into())), "/in");
    }

    #[test]
    fn without_the_record_the_unit_is_shown() {
        let row = Row { unit: r"containerd-a\x2db-web.service".to_owned(), ..Row::default() };
        let unit = properties(&[
            ("Description", "web\u{1b}[2J"),
            ("ActiveState", "active"),
            ("SubState", "running"),
        ]);
        let page = details(&row, Some(&unit), Err("run inspect as root"));
        assert!(
            page.contains("  Description: web[2J\n") && page.contains("  State: active (running)\n"),
            "{page}"
        );
        assert!(page.contains("  Unknown: run inspect as root\n"), "{page}");
        assert!(page.contains(r"journalctl -u containerd-a\\x2db-web.service"), "{page}");
        assert_eq!(details_json(&row, None, Err(""))["record"], Value::Null);
    }
}
