//! Parses arguments in the style of Go's flag package: `-x v`, `-x=v`, `--x v` (pure).

use std::ffi::OsString;

use crate::id::ProcessKey;
use crate::launch::contract::{self, Kind};
use crate::manual::{Given, TOOLS, Tool};

/// The command that the arguments name.
#[derive(Debug)]
pub enum Command {
    /// Show the usage.
    Help,
    /// Show the version.
    Version,
    /// Show what the runtime can do.
    Info(Flags),
    /// Tell containerd the address of the shim of a task.
    Start(Flags),
    /// Remove what is left of a task.
    Delete(Flags),
    /// Run the daemon.
    Serve,
    /// Wait for a call while the daemon is stopped.
    Wake,
    /// Print the names of all fault points (test builds only).
    #[cfg(feature = "faults")]
    Faults,
    /// A command for people, with its own arguments.
    Tool(&'static Tool, Given),
    /// Start a process inside of its unit.
    Launch {
        /// What the process is.
        kind: Kind,
        key: ProcessKey,
    },
}

/// The flags that containerd passes to every command.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Flags {
    pub namespace: String,
    /// The task.
    pub id: String,
    /// containerd's gRPC address.
    pub address: String,
    /// The bundle, for `delete`.
    pub bundle: String,
    /// The program for publishing events; not used, because events go over ttrpc.
    pub publish_binary: String,
    /// containerd's socket; not used.
    pub socket: String,
}

/// Why the arguments can't be parsed.
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
pub enum Error {
    /// An argument is not text. Names, addresses and paths of containerd are.
    #[error("argument {0:?} is not UTF-8 text")]
    NotText(OsString),
    /// There is no command.
    #[error("no command given")]
    NoCommand,
    /// A flag that does not exist.
    #[error("unknown flag {0}")]
    Flag(String),
    /// A flag without its value.
    #[error("flag {0} needs a value")]
    Value(String),
    /// A command that does not exist.
    #[error("unknown command {0:?}")]
    Command(String),
    /// The arguments of a command for people are wrong.
    #[error("{tool}: {problem}")]
    Tool {
        /// The command.
        tool: &'static str,
        /// The mistake.
        problem: String,
    },
    /// The arguments of `launch` are wrong.
    #[error("only systemd and the daemon run launch: launch {} NAMESPACE ID [EXEC]", Kind::ALL.map(Kind::word).join("|"))]
    Launch,
}

/// The commands whose help is the usage: people need not run them.
const WITHOUT_HELP: [&str; 6] = ["start", "delete", "serve", "launch", "wake", "help"];

/// The arguments as text.
///
/// # Errors
/// The first one that is not text.
pub fn texts(args: impl IntoIterator<Item = OsString>) -> Result<Vec<String>, Error> {
    args.into_iter().map(|arg| arg.into_string().map_err(Error::NotText)).collect()
}

/// Parses the arguments, without the name of the program.
///
/// # Errors
/// The argument that can't be parsed.
pub fn parse(args: &[String]) -> Result<Command, Error> {
    let mut flags = Flags::default();
    let mut args = args.iter().map(String::as_str).peekable();
    let mut special = None;
    while let Some(word) = args.next_if(|word| word.starts_with('-') && *word != "-" && *word != "--") {
        let name = word.strip_prefix("--").unwrap_or(&word[1..]);
        let (name, inline) = name.split_once('=').map_or((name, None), |(name, value)| (name, Some(value)));
        let place = match name {
            "h" | "help" => return Ok(Command::Help),
            "v" | "version" => {
                special = Some(Command::Version);
                continue;
            }
            "info" => {
                special = Some(Command::Info(Flags::default()));
                continue;
            }
            "debug" => continue,
            "namespace" => &mut flags.namespace,
            "id" => &mut flags.id,
            "address" => &mut flags.address,
            "bundle" => &mut flags.bundle,
            "publish-binary" => &mut flags.publish_binary,
            "socket" => &mut flags.socket,
            _ => return Err(Error::Flag(word.to_owned())),
        };
        let value = inline.or_else(|| args.next()).ok_or_else(|| Error::Value(word.to_owned()))?;
        value.clone_into(place);
    }
    match special {
        Some(Command::Info(_)) => return Ok(Command::Info(flags)),
        Some(command) => return Ok(command),
        None => {}
    }
    match args.next() {
        None => Err(Error::NoCommand),
        Some("start") => Ok(Command::Start(flags)),
        Some("delete") => Ok(Command::Delete(flags)),
        Some("serve") => Ok(Command::Serve),
        Some("wake") => Ok(Command::Wake),
        Some("help") => match args.next() {
            None => Ok(Command::Help),
            Some(word) if WITHOUT_HELP.contains(&word) => Ok(Command::Help),
            Some(word) => tool(word, &["--help".to_owned()]),
        },
        #[cfg(feature = "faults")]
        Some("faults") => Ok(Command::Faults),
        Some("launch") => {
            let launch = contract::parse(&args.collect::<Vec<_>>());
            launch.map(|(kind, key)| Command::Launch { kind, key }).ok_or(Error::Launch)
        }
        Some(other) => tool(other, &args.map(str::to_owned).collect::<Vec<_>>()),
    }
}

/// A command for people, with its arguments.
fn tool(name: &str, arguments: &[String]) -> Result<Command, Error> {
    let tool = TOOLS.into_iter().find(|tool| tool.name == name);
    let tool = tool.ok_or_else(|| Error::Command(name.chars().take(80).collect()))?;
    let given = tool.parse(arguments).map_err(|problem| Error::Tool { tool: tool.name, problem })?;
    Ok(Command::Tool(tool, given))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read(line: &str) -> Result<Command, Error> {
        parse(&line.split_whitespace().map(str::to_owned).collect::<Vec<_>>())
    }

    #[test]
    fn containerds_calls_are_understood_in_every_spelling() {
        for line in [
            "-namespace default -address /run/c.sock -publish-binary /usr/bin/containerd -id web start",
            "--namespace=default -address=/run/c.sock --publish-binary /usr/bin/containerd -debug -id web start",
        ] {
            let Ok(Command::Start(flags)) = read(line) else { unreachable!("{line}") };
            assert_eq!((flags.namespace.as_str(), flags.id.as_str()), ("default", "web"));
            assert_eq!(flags.address, "/run/c.sock");
        }
    }

    #[test]
    fn mistakes_are_named() {
        let error = |line| read(line).expect_err(line);
        assert_eq!(error(""), Error::NoCommand);
        assert_eq!(error("-nope start"), Error::Flag("-nope".to_owned()));
        assert_eq!(error("-id"), Error::Value("-id".to_owned()));
        assert_eq!(error("stat"), Error::Command("stat".to_owned()));
        for line in ["launch container default ../x", "launch exec default x", "launch container d x e"] {
            assert_eq!(error(line), Error::Launch, "{line}");
        }
        let launch = "launch container|exec|logger|criu|mount|checkpoint NAMESPACE ID [EXEC]";
        assert!(error("launch foo").to_string().ends_with(launch));
        assert_eq!(error("help docter"), Error::Command("docter".to_owned()));
        assert_eq!(error("ps --jsno").to_string(), "ps: unknown option --jsno");
    }

    #[test]
    fn an_argument_that_is_not_text_is_a_mistake() {
        use std::os::unix::ffi::OsStringExt;
        let args = |last: &[u8]| [OsString::from("inspect"), OsString::from_vec(last.to_vec())];
        assert_eq!(texts(args(b"web")), Ok(vec!["inspect".to_owned(), "web".to_owned()]));
        let error = texts(args(b"web\xff")).expect_err("not text");
        assert_eq!(error.to_string(), r#"argument "web\xFF" is not UTF-8 text"#);
    }

    #[test]
    fn people_get_help_and_version() {
        assert!(matches!(read("-h"), Ok(Command::Help)));
        assert!(matches!(read("-v"), Ok(Command::Version)));
        assert!(matches!(read("doctor --json"), Ok(Command::Tool(tool, _)) if tool.name == "doctor"));
        let helped = |line| matches!(read(line), Ok(Command::Tool(tool, given)) if tool.name == "ps" && given.has("help"));
        assert!(helped("help ps") && helped("ps --help"));
        assert!(matches!(read("help"), Ok(Command::Help)) && matches!(read("help serve"), Ok(Command::Help)));
        assert!(matches!(read("-info"), Ok(Command::Info(_))));
    }
}
