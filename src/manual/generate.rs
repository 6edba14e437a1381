//! Files of the repository that are written from the table of commands and from docs/.

use std::fmt::Write;
use std::fs;
use std::path::Path;

use super::references::{Doc, with_references};
use super::{NAME, TOOLS, Tool, completion, roff, sentence};

/// Whom the commands are for.
const FOR_PEOPLE: &str =
    "containerd and systemd run this program; nobody has to. These commands are for people.";

/// docs/commands.md.
fn commands() -> String {
    let mut text = "# Commands\n\n<!-- Written by `make manual` from src/manual/. -->\n".to_owned();
    // Writing to a string does not fail.
    let _ = writeln!(text, "\n{FOR_PEOPLE}");
    for tool in TOOLS {
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
        let _ = write!(text, "\n{}\n{}", options_of(tool), exit_codes_of(tool));
    }
    text
}

/// The table of a command's options.
fn options_of(tool: &Tool) -> String {
    let rows = tool.all_options().map(|option| format!("| `{}` | {} |\n", option.spelling(), option.text));
    "| Option | |\n|---|---|\n".to_owned() + &rows.collect::<String>()
}

/// The table of a command's exit codes.
fn exit_codes_of(tool: &Tool) -> String {
    let rows = tool.exits.iter().map(|(code, meaning)| format!("| {code} | {meaning} |\n"));
    "| Exit code | |\n|---|---|\n".to_owned() + &rows.collect::<String>()
}

/// The man page of section 1.
fn manual_of_commands() -> String {
    let synopses: Vec<String> = TOOLS.iter().map(|tool| tool.synopsis()).collect();
    let mut text = format!(
        "# Commands\n\n## Synopsis\n\n```\n{}\n```\n\n## Description\n\n{FOR_PEOPLE}\n",
        synopses.join("\n")
    );
    for tool in TOOLS {
        let _ = write!(text, "\n## {}\n\n{}\n", tool.name, sentence(tool.summary));
        for paragraph in tool.text {
            let _ = write!(text, "\n{paragraph}\n");
        }
        let (options, exit_codes) = (options_of(tool), exit_codes_of(tool));
        let _ = write!(text, "\n### Options\n\n{options}\n### Exit codes\n\n{exit_codes}");
    }
    text += "\n## See also\n\ncontainerd-shim-systemd-v1(5), containerd-shim-systemd-v1(7), systemctl(1), journalctl(1)\n";
    text
}

/// The pages of docs/ that are in the manual, and their sections there.
const PAGES: [(&str, u8); 5] = [
    ("options.md", 5),
    ("properties.md", 5),
    ("restarts.md", 7),
    ("resources.md", 7),
    ("troubleshooting.md", 7),
];

fn docs() -> Vec<Doc> {
    PAGES.into_iter().map(|(name, section)| Doc { name, section, text: doc(name) }).collect()
}

/// The pages of docs/ in a section of the manual, where they are sections of a page.
fn docs_in(section: u8) -> String {
    let docs = docs();
    let demote = |text: String| text.replace("\n## ", "\n### ").replacen("# ", "## ", 1);
    let pages = docs.iter().filter(|doc| doc.section == section);
    pages.map(|doc| demote(with_references(doc, &docs))).collect::<Vec<_>>().join("\n")
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
    [usage, &docs_in(7), more].join("\n")
}

fn options() -> String {
    ["# Options\n", &docs_in(5)].join("\n")
}

/// Each file with the text that it must contain.
fn files() -> Vec<(String, String)> {
    let page = |section, summary, text: &str| {
        (format!("packaging/man/{NAME}.{section}"), roff::page(NAME, section, summary, text))
    };
    let shell = |name, text| (format!("packaging/completion/{NAME}.{name}"), text);
    vec![
        ("docs/commands.md".to_owned(), commands()),
        page(1, "show and check containers that are systemd units", &manual_of_commands()),
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
