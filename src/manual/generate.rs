//! Files of the repository that are written from the table of commands and from docs/.

use std::fmt::Write;
use std::fs;
use std::path::Path;

use super::{NAME, TOOLS, completion, roff, sentence};

/// docs/commands.md, from which the man page of section 1 is made.
fn commands() -> String {
    let mut text = "# Commands\n\n<!-- Written by `make manual` from src/manual/. -->\n".to_owned();
    text += "\ncontainerd and systemd run this program; nobody has to. These commands are for people.\n";
    for tool in TOOLS {
        // Writing to a string does not fail.
        let _ = write!(
            text,
            "\n## {}\n\n```\n{}\n```\n\n{}\n",
            tool.name,
            tool.synopsis(),
            sentence(tool.summary)
        );
        for paragraph in tool.text {
            let _ = write!(text, "\n{}", super::wrap(paragraph, 120));
        }
        let _ = write!(text, "\n| Option | |\n|---|---|\n");
        for option in tool.all_options() {
            let _ = writeln!(text, "| `{}` | {} |", option.spelling(), option.text);
        }
        let _ = write!(text, "\n| Exit code | |\n|---|---|\n");
        for (code, meaning) in tool.exits {
            let _ = writeln!(text, "| {code} | {meaning} |");
        }
    }
    text
}

fn doc(name: &str) -> String {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("docs").join(name);
    let text = fs::read_to_string(&path).expect("read a page of docs");
    // A comment is for developers who change the page.
    let without = |text: &str| match (text.find("<!--"), text.find("-->")) {
        (Some(start), Some(end)) => format!("{}{}", &text[..start], &text[end + 3..]),
        _ => text.to_owned(),
    };
    without(&text)
}

/// The man page of section 7: what the runtime is, and how it behaves.
fn overview() -> String {
    let usage = "# Overview\n\n## Description\n\nA containerd runtime in which every container is a systemd unit. Name the \
         runtime io.containerd.systemd.v1, and the containers that `ctr`, nerdctl, Docker or Kubernetes start become \
         transient services:\n\n```\nctr run --runtime io.containerd.systemd.v1 IMAGE NAME\nsystemctl status \
         containerd-default-NAME\njournalctl -u containerd-default-NAME\n```\n\nThe unit of a container is \
         `containerd-<namespace>-<id>.service`; an id of 64 hex digits is cut to its first 12.\n\n";
    let more = "\n## See also\n\ncontainerd-shim-systemd-v1(1), containerd-shim-systemd-v1(5), systemctl(1), journalctl(1), \
         systemd.resource-control(5)\n";
    // In the man page, the pages of docs/ are sections.
    let demote = |text: String| text.replace("\n## ", "\n### ").replacen("# ", "## ", 1);
    [
        usage.to_owned(),
        demote(doc("restarts.md")),
        demote(doc("resources.md")),
        demote(doc("troubleshooting.md")),
        more.to_owned(),
    ]
    .join("\n")
}

fn options() -> String {
    let demote = |text: String| text.replace("\n## ", "\n### ").replacen("# ", "## ", 1);
    ["# Options\n".to_owned(), demote(doc("options.md")), demote(doc("properties.md"))].join("\n")
}

/// Each file with the text that it must contain.
fn files() -> Vec<(String, String)> {
    let page = |section, summary, text: &str| {
        (format!("packaging/man/{NAME}.{section}"), roff::page(NAME, section, summary, text))
    };
    let shell = |name, text| (format!("packaging/completion/{NAME}.{name}"), text);
    let without_comment = commands().replace("<!-- Written by `make manual` from src/manual/. -->\n", "");
    vec![
        ("docs/commands.md".to_owned(), commands()),
        page(1, "show and check containers that are systemd units", &without_comment),
        page(5, "options and annotations of the runtime", &options()),
        page(7, "containerd runtime in which every container is a systemd unit", &overview()),
        shell("bash", completion::bash()),
        shell("zsh", completion::zsh()),
        shell("fish", completion::fish()),
    ]
}

#[test]
fn manual_files_are_up_to_date() {
    for (name, text) in files() {
        let path = Path::new(env!("CARGO_MANIFEST_DIR")).join(&name);
        if std::env::var_os("UPDATE_MANUAL").is_some() {
            fs::create_dir_all(path.parent().unwrap()).unwrap();
            fs::write(&path, &text).expect("write a page");
        }
        assert!(
            fs::read_to_string(&path).is_ok_and(|found| found == text),
            "{name} is out of date: run 'make manual'"
        );
    }
}
