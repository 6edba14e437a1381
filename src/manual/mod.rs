//! The commands for people: their names, options and texts.
//!
//! This is the one source of `--help`, of the parsing of arguments, of the man page, of docs/commands.md and of shell
//! completion. The last three are files in the repository; a test says when they are out of date.

#[cfg(test)]
mod completion;
#[cfg(test)]
mod generate;
#[cfg(test)]
mod markdown;
#[cfg(test)]
mod references;
#[cfg(test)]
mod roff;

use std::fmt::Write;

use crate::config::NAME;

/// A command for people.
#[derive(Debug)]
pub struct Tool {
    pub name: &'static str,
    /// Its positional arguments, as in a synopsis.
    pub words: &'static str,
    /// The most words that it takes.
    pub most_words: usize,
    /// What it does, in one line without a full stop.
    pub summary: &'static str,
    /// What it does, in paragraphs.
    pub text: &'static [&'static str],
    /// Its options, without `--help`.
    pub options: &'static [Opt],
    /// Its exit codes.
    pub exits: &'static [(u8, &'static str)],
}

/// An option of a command.
#[derive(Debug)]
pub struct Opt {
    /// `n` of `-n`.
    pub short: Option<char>,
    /// `namespace` of `--namespace`.
    pub long: &'static str,
    /// `NAMESPACE`, if it takes a value.
    pub value: Option<&'static str>,
    /// What it does, in one line.
    pub text: &'static str,
}

const JSON: Opt = Opt { short: None, long: "json", value: None, text: "write JSON" };
const NAMESPACE: Opt = Opt {
    short: Some('n'),
    long: "namespace",
    value: Some("NAMESPACE"),
    text: "only tasks of this namespace of containerd",
};
const HELP: Opt = Opt { short: Some('h'), long: "help", value: None, text: "show this text" };

const FAILED: (u8, &str) = (1, "it failed, and standard error says why");
const MISUSED: (u8, &str) = (2, "wrong arguments");

pub const DOCTOR: Tool = Tool {
    name: "doctor",
    words: "",
    most_words: 0,
    summary: "say what is wrong on this machine, and what to do about it",
    text: &[
        "Checks systemd, cgroups, the journal, D-Bus, containerd and its configuration, the OCI runtime, limits, the space for \
         records, the daemon's units and their drop-ins, the daemon's health, records, bundles and leftovers. Each check is one \
         line: its result (ok, warning, error or unknown), its name, what was found, and what to do.",
        "doctor changes nothing, starts nothing, and does not need the daemon. Every user can run it; what only root \
         may see is unknown to others.",
    ],
    options: &[JSON],
    exits: &[
        (0, "no check found an error; there may be warnings"),
        (1, "a check found an error: containers can't be started, or the daemon does not serve them"),
        MISUSED,
    ],
};

pub const PS: Tool = Tool {
    name: "ps",
    words: "",
    most_words: 0,
    summary: "list the tasks of this runtime with their units",
    text: &[
        "One line for each task: namespace, id, unit, pod, image, state, process, memory and age. An id of 64 hex \
         digits is cut to its first 12. The image is known if the client names it (Kubernetes does).",
        "The list comes from systemd and from the records of the daemon, which does not have to run. Only root can read \
         the records: other users see no tasks without a unit, and a task that was created and not started counts as \
         running.",
        "--in-use leaves out tasks that containerd has given up and what a failed Create has left: no client has them any \
         more, and the daemon removes them. It fails if a record can't be read. The packages use this option to find \
         out whether a removal is allowed.",
    ],
    options: &[
        NAMESPACE,
        Opt { short: None, long: "in-use", value: None, text: "only tasks that a client has" },
        Opt { short: Some('q'), long: "quiet", value: None, text: "write only ids, in full" },
        JSON,
    ],
    exits: &[(0, "the list is complete, as far as this user may look"), FAILED, MISUSED],
};

pub const INSPECT: Tool = Tool {
    name: "inspect",
    words: "ID",
    most_words: 1,
    summary: "show all that is known of a task",
    text: &[
        "Shows a task's unit, record, streams, execs, and the events that containerd has not accepted. ID is the id of \
         a container or the beginning of one, also as NAMESPACE/ID; or it is the name of a container or of a unit.",
        "Only root can read records; other users see what systemd knows.",
        "--json writes the task as ps does, the properties of its unit, and its record as it is on disk. The form of the \
         record is not stable: it can be another one in the next version.",
    ],
    options: &[NAMESPACE, JSON],
    exits: &[(0, "the task was found"), (1, "there is no such task, or there are several"), MISUSED],
};

/// All commands for people.
pub const TOOLS: [&Tool; 3] = [&DOCTOR, &PS, &INSPECT];

/// The parsed arguments of a command.
#[derive(Debug, Default, PartialEq, Eq)]
pub struct Given {
    options: Vec<(&'static str, String)>,
    /// The positional arguments.
    pub words: Vec<String>,
}

impl Given {
    /// True if the option was given.
    pub fn has(&self, long: &str) -> bool {
        self.options.iter().any(|(name, _)| *name == long)
    }

    /// The value of an option; the last one counts.
    pub fn value(&self, long: &str) -> Option<&str> {
        self.options.iter().rev().find(|(name, _)| *name == long).map(|(_, value)| value.as_str())
    }
}

impl Tool {
    /// Parses its arguments as getopt_long(3) does: options may be anywhere, and `--` ends them.
    ///
    /// # Errors
    /// A sentence that names the argument.
    pub fn parse(&self, arguments: &[String]) -> Result<Given, String> {
        let mut given = Given::default();
        let mut arguments = arguments.iter();
        while let Some(argument) = arguments.next() {
            if argument == "--" {
                given.words.extend(arguments.by_ref().cloned());
            } else if let Some(long) = argument.strip_prefix("--") {
                let (name, inline) =
                    long.split_once('=').map_or((long, None), |(name, value)| (name, Some(value)));
                let option = self.all_options().find(|option| option.long == name);
                let option = option.ok_or_else(|| format!("unknown option --{name}"))?;
                let value = match (option.value, inline) {
                    (None, Some(_)) => return Err(format!("option --{name} takes no value")),
                    (None, None) => String::new(),
                    (Some(_), Some(value)) => value.to_owned(),
                    (Some(_), None) => {
                        arguments.next().ok_or_else(|| format!("option --{name} needs a value"))?.clone()
                    }
                };
                given.options.push((option.long, value));
            } else if let Some(letters) = argument.strip_prefix('-').filter(|letters| !letters.is_empty()) {
                let mut letters = letters.chars();
                while let Some(letter) = letters.next() {
                    let option = self.all_options().find(|option| option.short == Some(letter));
                    let option = option.ok_or_else(|| format!("unknown option -{letter}"))?;
                    let value = match option.value {
                        None => String::new(),
                        Some(_) => {
                            let rest: String = letters.by_ref().collect();
                            let value = if rest.is_empty() { arguments.next().cloned() } else { Some(rest) };
                            value.ok_or_else(|| format!("option -{letter} needs a value"))?
                        }
                    };
                    given.options.push((option.long, value));
                }
            } else {
                given.words.push(argument.clone());
            }
        }
        if given.has(HELP.long) {
            return Ok(given);
        }
        match given.words.get(self.most_words) {
            Some(word) => Err(format!("unexpected argument {word:?}")),
            None if given.words.len() < self.most_words => Err(format!("{} is missing", self.words)),
            None => Ok(given),
        }
    }

    fn all_options(&self) -> impl Iterator<Item = &'static Opt> {
        self.options.iter().chain([&HELP])
    }

    /// `NAME doctor [--json]`
    pub fn synopsis(&self) -> String {
        let mut line = format!("{NAME} {}", self.name);
        if !self.options.is_empty() {
            line += " [OPTION…]";
        }
        if !self.words.is_empty() {
            line = format!("{line} {}", self.words);
        }
        line
    }

    /// The text of `--help`.
    pub fn help(&self) -> String {
        let mut text = format!("{}\n\n{}\n", self.synopsis(), sentence(self.summary));
        for paragraph in self.text {
            let _ = write!(text, "\n{}", wrap(paragraph, 80));
        }
        text += "\nOptions:\n";
        let all: Vec<&Opt> = self.all_options().collect();
        let width = all.iter().map(|option| option.spelling().chars().count()).max().unwrap_or(0);
        for option in all {
            let _ = writeln!(text, "  {:<width$}  {}", option.spelling(), option.text);
        }
        text += "\nExit codes:\n";
        for (code, meaning) in self.exits {
            let _ = writeln!(text, "  {code}  {meaning}");
        }
        text
    }
}

impl Opt {
    /// `-n, --namespace=NAMESPACE`
    pub fn spelling(&self) -> String {
        let short = self.short.map(|letter| format!("-{letter}, ")).unwrap_or_default();
        let value = self.value.map(|value| format!("={value}")).unwrap_or_default();
        format!("{short}--{}{value}", self.long)
    }
}

fn sentence(summary: &str) -> String {
    let mut letters = summary.chars();
    let first = letters.next().map(|letter| letter.to_uppercase().collect::<String>()).unwrap_or_default();
    format!("{first}{}.", letters.as_str())
}

/// Lines of at most `width` characters, each with its line break.
fn wrap(text: &str, width: usize) -> String {
    let (mut lines, mut length) = (String::new(), 0);
    for word in text.split_whitespace() {
        let more = word.chars().count();
        if length > 0 && length + 1 + more > width {
            lines.push('\n');
            length = 0;
        } else if length > 0 {
            lines.push(' ');
            length += 1;
        }
        lines += word;
        length += more;
    }
    lines.push('\n');
    lines
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(tool: &Tool, line: &str) -> Result<Given, String> {
        tool.parse(&line.split_whitespace().map(str::to_owned).collect::<Vec<_>>())
    }

    #[test]
    fn options_are_understood_in_every_spelling() {
        for line in ["-n k8s.io web", "-nk8s.io web", "web --namespace k8s.io", "--namespace=k8s.io -- web"] {
            let given = parse(&INSPECT, line).unwrap();
            assert_eq!(
                (given.value("namespace"), given.words.as_slice()),
                (Some("k8s.io"), &["web".to_owned()][..])
            );
        }
        let given = parse(&PS, "-qn a --json -n b").unwrap();
        assert_eq!(
            (given.has("quiet"), given.has("json"), given.value("namespace")),
            (true, true, Some("b"))
        );
        assert!(parse(&INSPECT, "--help").unwrap().has("help"));
    }

    #[test]
    fn mistakes_are_named() {
        for (tool, line, error) in [
            (&PS, "--jsno", "unknown option --jsno"),
            (&PS, "-x", "unknown option -x"),
            (&PS, "--json=yes", "option --json takes no value"),
            (&PS, "-n", "option -n needs a value"),
            (&PS, "web", "unexpected argument \"web\""),
            (&INSPECT, "", "ID is missing"),
            (&INSPECT, "a b", "unexpected argument \"b\""),
        ] {
            assert_eq!(parse(tool, line), Err(error.to_owned()));
        }
    }

    #[test]
    fn help_has_every_option_and_fits_a_terminal() {
        for tool in TOOLS {
            let help = tool.help();
            assert!(help.lines().all(|line| line.chars().count() <= 100), "{help}");
            assert!(tool.options.iter().all(|option| help.contains(&option.spelling())), "{help}");
        }
    }
}
