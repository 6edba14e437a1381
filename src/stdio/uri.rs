//! Parses the client's stdio strings: an absolute path, `fifo://`, `file://`, `binary://`, `binary-v2://`, or an empty string.
//!
//! As in containerd-shim-runc-v2, the scheme of stdout also holds for stderr.

use std::path::{Path, PathBuf};

use crate::task::request::{Log, Stdio};
use crate::task::wiring::{Copied, Input, JournalCopy, Logger, Output, Sink, Wiring};
use crate::text;

/// The longest path, in bytes (Linux, `PATH_MAX`).
const MOST_OF_PATH: usize = 4096;
/// The longest URI of a logger, in bytes. Its query has the arguments of the logger, such as the labels of a container.
const MOST_OF_LOGGER: usize = 64 << 10;

/// A stdio string is not valid.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{stream} {text:?} is not valid: {rule}")]
pub struct InvalidStdio {
    stream: &'static str,
    text: String,
    rule: &'static str,
}

/// The kind of the file at a path.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// A FIFO, as clients make them.
    Fifo,
    /// A regular file.
    File,
    /// A character device.
    Device,
    /// A directory, a socket, …
    Other,
    /// The path does not exist.
    Missing,
}

/// The role of a process in its task.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Role {
    /// The init process. It gets the client's FIFOs themselves, and the unit's own stream to the journal.
    Init,
    /// An exec. Its background processes may keep its streams open without end, but the client waits for EOF. So the
    /// daemon copies the streams.
    Exec,
}

/// The parsed strings of the client.
struct Client {
    stdout: Option<Sink>,
    stderr: Option<Sink>,
    logger: Option<Logger>,
}

/// Decides the destinations of a process's streams. `kind` returns the kind of a path.
///
/// # Errors
/// A string is not valid, or its path can't be used.
pub fn wiring(
    stdio: &Stdio,
    log: Log,
    role: Role,
    kind: impl Fn(&Path) -> Kind,
) -> Result<Wiring, InvalidStdio> {
    for (stream, text) in [("stdin", &stdio.stdin), ("stdout", &stdio.stdout), ("stderr", &stdio.stderr)] {
        if text.contains('\0') {
            return Err(malformed(stream, text, "it contains a NUL"));
        } else if text.len() > MOST_OF_LOGGER {
            return Err(malformed(stream, text, "it is longer than 64 KiB"));
        } else if text.len() > MOST_OF_PATH && !is_logger(split(text).0) {
            return Err(malformed(stream, text, "it is longer than a path can be"));
        }
    }
    let stdin = input(&stdio.stdin, stdio.terminal, &kind)?;
    let client = client(stdio, &kind)?;
    let terminal = stdio.terminal;
    let given = client.stdout.is_some() || client.stderr.is_some();
    let way = |sink: Option<Sink>| way(sink, given, log, role, terminal);
    let logged = client.logger.is_some();
    Ok(Wiring {
        terminal,
        // A logger provides no input.
        stdin: if logged && !terminal { Input::Null } else { stdin },
        stdin_closed: false,
        stdout: way(client.stdout),
        stderr: if terminal { Output::Null } else { way(client.stderr) },
        logger: client.logger.filter(|_| log != Log::Journal),
        store_number: 0,
    })
}

/// How output reaches the client's sink or, if the client named none, its default destination. `given`: the client
/// named at least one of the two streams.
fn way(sink: Option<Sink>, given: bool, log: Log, role: Role, terminal: bool) -> Output {
    let copied = |client, journal| Output::Copied(Copied { client, journal });
    // The daemon must read a terminal, or its processes would block.
    let nowhere = if terminal { copied(None, JournalCopy::None) } else { Output::Null };
    match (log, sink) {
        (Log::Journal, Some(Sink::Fifo(path))) => copied(Some(Sink::EndOnly(path)), JournalCopy::Complete),
        (Log::Journal, _) => copied(None, JournalCopy::Complete),
        (Log::Tee, sink) => copied(sink, JournalCopy::Complete),
        (Log::Auto, Some(sink)) if role == Role::Init => {
            Output::Copied(Copied { client: Some(sink), journal: JournalCopy::Aside })
        }
        (Log::Auto | Log::Client | Log::None, Some(sink)) => match (sink, role) {
            (sink, _) if terminal => copied(Some(sink), JournalCopy::None),
            (Sink::Logger, _) => Output::Logger,
            (Sink::Fifo(path), Role::Init) => Output::Fifo(path),
            (sink, _) => copied(Some(sink), JournalCopy::None),
        },
        (Log::None, None) => nowhere,
        (Log::Auto | Log::Client, None) if given => nowhere,
        (Log::Client, None) if role == Role::Init && !terminal => Output::Journal,
        (Log::Auto | Log::Client, None) => copied(None, JournalCopy::Complete),
    }
}

fn client(stdio: &Stdio, kind: &impl Fn(&Path) -> Kind) -> Result<Client, InvalidStdio> {
    match split(&stdio.stdout) {
        (None | Some("fifo"), _) => Ok(Client {
            stdout: output("stdout", &stdio.stdout, kind)?,
            stderr: if stdio.terminal { None } else { output("stderr", &stdio.stderr, kind)? },
            logger: None,
        }),
        (Some("file"), path) => {
            let path = file_path(path)
                .ok_or_else(|| malformed("stdout", &stdio.stdout, "file:// needs an absolute path"))?;
            let sink = match kind(&path) {
                Kind::Other => {
                    return Err(malformed(
                        "stdout",
                        &stdio.stdout,
                        "it is neither a regular file, a device nor missing",
                    ));
                }
                // Writes to a log file may block, and the reader of a FIFO may not read: so a FIFO is no log file.
                Kind::Fifo => Sink::Fifo(path),
                found => Sink::File { path, create: found != Kind::Device },
            };
            Ok(Client { stdout: Some(sink.clone()), stderr: Some(sink), logger: None })
        }
        (scheme, rest) if is_logger(scheme) => {
            let logger = logger(rest, scheme == Some("binary-v2")).ok_or_else(|| {
                malformed("stdout", &stdio.stdout, "binary:// needs an absolute path, then ?key=value")
            })?;
            if kind(&logger.program) != Kind::File {
                return Err(malformed("stdout", &stdio.stdout, "the logger program does not exist"));
            }
            Ok(Client { stdout: Some(Sink::Logger), stderr: Some(Sink::Logger), logger: Some(logger) })
        }
        (Some(_), _) => Err(malformed(
            "stdout",
            &stdio.stdout,
            "the schemes are fifo, file, binary and binary-v2 (unknown STDIO scheme)",
        )),
    }
}

fn malformed(stream: &'static str, text: &str, rule: &'static str) -> InvalidStdio {
    InvalidStdio { stream, text: text.chars().take(200).collect(), rule }
}

/// The scheme and the rest. A plain path has no scheme.
fn split(text: &str) -> (Option<&str>, &str) {
    match text.split_once("://") {
        Some((scheme, rest)) if !scheme.contains('/') => (Some(scheme), rest),
        Some(_) | None => (None, text),
    }
}

fn is_logger(scheme: Option<&str>) -> bool {
    matches!(scheme, Some("binary" | "binary-v2"))
}

/// The path of a stream that has no scheme but `fifo`. The file of any other scheme is not opened as if it were the stream: a logger's
/// program would get the output at its end.
fn plain<'a>(stream: &'static str, text: &'a str) -> Result<&'a str, InvalidStdio> {
    match split(text) {
        (None | Some("fifo"), path) => Ok(path),
        (Some(_), _) => {
            Err(malformed(stream, text, "the only scheme is fifo; that of stdout also holds for stderr"))
        }
    }
}

fn input(text: &str, terminal: bool, kind: &impl Fn(&Path) -> Kind) -> Result<Input, InvalidStdio> {
    let path = plain("stdin", text)?;
    if path.is_empty() {
        return Ok(Input::Null);
    }
    match (Path::new(path).is_absolute(), kind(Path::new(path))) {
        (true, Kind::Fifo) => Ok(Input::Fifo(path.into())),
        (true, Kind::File | Kind::Device) if !terminal => Ok(Input::File(path.into())),
        (true, Kind::Missing) => Err(malformed("stdin", text, "the FIFO does not exist")),
        (_, _) if terminal => {
            Err(malformed("stdin", text, "with a terminal, it must be the absolute path of a FIFO"))
        }
        (_, _) => Err(malformed(
            "stdin",
            text,
            "it must be the absolute path of a FIFO, a regular file or a device",
        )),
    }
}

fn output(
    stream: &'static str,
    text: &str,
    kind: &impl Fn(&Path) -> Kind,
) -> Result<Option<Sink>, InvalidStdio> {
    let path = plain(stream, text)?;
    if path.is_empty() {
        return Ok(None);
    }
    match (Path::new(path).is_absolute(), kind(Path::new(path))) {
        (true, Kind::Fifo) => Ok(Some(Sink::Fifo(path.into()))),
        (true, Kind::File | Kind::Device) => Ok(Some(Sink::File { path: path.into(), create: false })),
        (true, Kind::Missing) => Err(malformed(stream, text, "there is neither a FIFO nor a file")),
        (_, _) => {
            Err(malformed(stream, text, "it must be the absolute path of a FIFO, a regular file or a device"))
        }
    }
}

fn file_path(rest: &str) -> Option<PathBuf> {
    let path = PathBuf::from(decode(without_host(rest).split('?').next()?)?);
    (path.is_absolute() && path.file_name().is_some()).then_some(path)
}

/// Removes the one host name that a URI of this machine may have (RFC 8089, 2). containerd-shim-runc-v2 removes any other, too,
/// which hides that a slash is missing: `file://var/log/web` would write to `/log/web`.
fn without_host(rest: &str) -> &str {
    rest.strip_prefix("localhost").filter(|path| path.starts_with('/')).unwrap_or(rest)
}

/// Parses a logger. Its arguments are each key of the query and the key's first value, even if empty.
fn logger(rest: &str, strict: bool) -> Option<Logger> {
    let rest = without_host(rest);
    let (path, query) = rest.split_once('?').unwrap_or((rest, ""));
    let program = PathBuf::from(decode(path)?);
    let mut seen = Vec::new();
    let mut args = Vec::new();
    for pair in query.split('&').filter(|pair| !pair.is_empty()) {
        let (key, value) = pair.split_once('=').unwrap_or((pair, ""));
        let key = decode(&key.replace('+', " "))?;
        if !seen.contains(&key) {
            seen.push(key.clone());
            args.extend([key, decode(&value.replace('+', " "))?]);
        }
    }
    program.is_absolute().then_some(Logger { program, args, strict })
}

/// Decodes percent-encoding (RFC 3986, 2.1). `None` if the result is not text.
fn decode(text: &str) -> Option<String> {
    let mut bytes = Vec::with_capacity(text.len());
    let mut rest = text.as_bytes();
    while let Some((&byte, tail)) = rest.split_first() {
        if byte == b'%' {
            let (digits, tail) = tail.split_first_chunk()?;
            bytes.push(text::hex_byte(*digits)?);
            rest = tail;
        } else {
            bytes.push(byte);
            rest = tail;
        }
    }
    String::from_utf8(bytes).ok().filter(|text| !text.contains('\0'))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read(stdout: &str, stderr: &str) -> Result<Wiring, InvalidStdio> {
        read_as(Log::Auto, Role::Init, false, stdout, stderr)
    }

    fn read_as(
        log: Log,
        role: Role,
        terminal: bool,
        stdout: &str,
        stderr: &str,
    ) -> Result<Wiring, InvalidStdio> {
        let (stdout, stderr) = (stdout.to_owned(), stderr.to_owned());
        let stdio = Stdio { stdin: String::new(), stdout, stderr, terminal };
        wiring(&stdio, log, role, |path| match path.to_str() {
            Some(path) if path.starts_with("/fifo") => Kind::Fifo,
            Some(path) if path.starts_with("/bin") || path == "/file" => Kind::File,
            Some(path) if path.starts_with("/dev") => Kind::Device,
            Some("/dir") => Kind::Other,
            _ => Kind::Missing,
        })
    }

    #[test]
    fn empty_stdio_means_the_journal() {
        let journal = copied(None, JournalCopy::Complete);
        for (log, output) in [(Log::Auto, journal), (Log::Client, Output::Journal)] {
            let wiring = read_as(log, Role::Init, false, "", "").unwrap();
            assert_eq!((&wiring.stdout, &wiring.stderr), (&output, &output));
            assert_eq!(wiring.stdin, Input::Null);
        }
    }

    #[test]
    fn one_stream_alone_leaves_the_other_null() {
        assert_eq!(read("/fifo", "").unwrap().stderr, Output::Null);
        assert_eq!(read("", "/fifo").unwrap().stdout, Output::Null);
        let client = read_as(Log::Client, Role::Init, false, "fifo:///fifo", "").unwrap();
        assert_eq!(client.stdout, Output::Fifo("/fifo".into()));
    }

    #[test]
    fn a_program_is_no_file_for_output() {
        let of = |stdin: &str, stdout: &str, stderr: &str| {
            let [stdin, stdout, stderr] = [stdin, stdout, stderr].map(str::to_owned);
            let stdio = Stdio { stdin, stdout, stderr, terminal: false };
            wiring(&stdio, Log::Auto, Role::Exec, |_| Kind::File).map_err(|error| error.stream)
        };
        for scheme in ["binary", "binary-v2", "file", "x", ""] {
            let text = format!("{scheme}:///bin/log");
            assert_eq!(of("", "", &text).unwrap_err(), "stderr", "{text}");
            assert_eq!(of("", "/file", &text).unwrap_err(), "stderr", "{text}");
            assert_eq!(of(&text, "/file", "").unwrap_err(), "stdin", "{text}");
        }
        assert!(of("fifo:///file", "fifo:///file", "fifo:///file").is_ok());
    }

    #[test]
    fn a_logger_may_have_more_arguments_than_a_path_has_bytes() {
        let of =
            |scheme: &str, length: usize| read(&format!("{scheme}:///bin/log?a={}", "x".repeat(length)), "");
        assert!(of("binary", 20_000).is_ok() && of("binary-v2", 20_000).is_ok());
        for error in [of("binary", 70_000), of("file", 5000), of("fifo", 5000)] {
            assert!(error.unwrap_err().to_string().contains("it is longer than"));
        }
    }

    #[test]
    fn a_file_takes_both_streams_through_one_pipe() {
        let wiring = read("file:///var/log/a%20b.log", "/ignored").unwrap();
        let file = Sink::File { path: "/var/log/a b.log".into(), create: true };
        assert_eq!(wiring.stdout, aside(file));
        assert_eq!(wiring.stderr, wiring.stdout);
        assert_eq!(read("file://localhost/var/log/a%20b.log", "").unwrap(), wiring);
    }

    #[test]
    fn files_and_devices_are_streams_too() {
        let file = |path: &str| Sink::File { path: path.into(), create: false };
        let streams = read("/file", "/dev/null").unwrap();
        assert_eq!((streams.stdout, streams.stderr), (aside(file("/file")), aside(file("/dev/null"))));
        assert_eq!(read("file:///dev/null", "").unwrap().stdout, aside(file("/dev/null")));
        let input = |stdin: &str, terminal| {
            let stdio = Stdio { stdin: stdin.to_owned(), terminal, ..Stdio::default() };
            let kind = |path: &Path| match path.to_str() {
                Some("/file") => Kind::File,
                Some("/dev/null") => Kind::Device,
                _ => Kind::Other,
            };
            wiring(&stdio, Log::Auto, Role::Init, kind).map(|wiring| wiring.stdin)
        };
        for path in ["/file", "/dev/null"] {
            assert_eq!(input(path, false).unwrap(), Input::File(path.into()));
            assert!(input(path, true).unwrap_err().to_string().contains("with a terminal"));
        }
        assert!(input("/dir", false).is_err());
    }

    fn copied(client: Option<Sink>, journal: JournalCopy) -> Output {
        Output::Copied(Copied { client, journal })
    }

    fn aside(client: Sink) -> Output {
        Output::Copied(Copied { client: Some(client), journal: JournalCopy::Aside })
    }

    #[test]
    fn the_daemon_stands_between_an_exec_and_its_client() {
        let wiring = read_as(Log::Auto, Role::Exec, false, "/fifo1", "/fifo2").unwrap();
        assert_eq!(wiring.stdout, copied(Some(Sink::Fifo("/fifo1".into())), JournalCopy::None));
        assert_eq!(wiring.stderr, copied(Some(Sink::Fifo("/fifo2".into())), JournalCopy::None));
        let wiring = read_as(Log::Auto, Role::Exec, false, "", "").unwrap();
        assert_eq!(
            (wiring.stdout, wiring.stderr),
            (copied(None, JournalCopy::Complete), copied(None, JournalCopy::Complete))
        );
    }

    #[test]
    fn a_terminal_is_always_read_and_has_one_output() {
        for log in [Log::Auto, Log::Client, Log::Journal, Log::Tee, Log::None] {
            let wiring = read_as(log, Role::Init, true, "/fifo", "").unwrap();
            assert!(matches!(wiring.stdout, Output::Copied(_)) && wiring.stderr == Output::Null);
        }
        assert_eq!(
            read_as(Log::None, Role::Init, true, "", "").unwrap().stdout,
            copied(None, JournalCopy::None)
        );
    }

    #[test]
    fn the_log_mode_decides_where_output_goes() {
        let fifo = || Some(Sink::Fifo("/fifo".into()));
        let stdout = |log, stdout| read_as(log, Role::Init, false, stdout, "").unwrap().stdout;
        assert_eq!(stdout(Log::Auto, "/fifo"), aside(Sink::Fifo("/fifo".into())));
        assert_eq!(stdout(Log::Client, "/fifo"), Output::Fifo("/fifo".into()));
        assert_eq!(stdout(Log::Auto, ""), copied(None, JournalCopy::Complete));
        assert_eq!(stdout(Log::Client, ""), Output::Journal);
        assert_eq!(stdout(Log::Tee, "/fifo"), copied(fifo(), JournalCopy::Complete));
        assert_eq!(
            stdout(Log::Journal, "/fifo"),
            copied(Some(Sink::EndOnly("/fifo".into())), JournalCopy::Complete)
        );
        assert_eq!(stdout(Log::Journal, ""), copied(None, JournalCopy::Complete));
        assert_eq!(stdout(Log::None, "/fifo"), Output::Fifo("/fifo".into()));
        assert_eq!(stdout(Log::None, ""), Output::Null);
    }

    #[test]
    fn a_logger_whose_output_goes_to_the_journal_alone_is_not_started() {
        assert!(read_as(Log::Journal, Role::Init, false, "binary:///bin/log", "").unwrap().logger.is_none());
        let tee = read_as(Log::Tee, Role::Init, false, "binary:///bin/log", "").unwrap();
        assert!(tee.logger.is_some());
        assert_eq!(
            (&tee.stdout, &tee.stderr),
            (&copied(Some(Sink::Logger), JournalCopy::Complete), &tee.stdout)
        );
    }

    #[test]
    fn a_logger_gets_its_query_as_arguments() {
        let wiring = read("binary:///bin/log?a=1&b&a=2&c=x%2Fy", "").unwrap();
        let logger = wiring.logger.unwrap();
        assert_eq!((logger.program.to_str(), logger.strict), (Some("/bin/log"), false));
        assert_eq!(logger.args, ["a", "1", "b", "", "c", "x/y"]);
        assert!(read("binary-v2:///bin/log", "").unwrap().logger.unwrap().strict);
        assert_eq!(read("binary://localhost/bin/log?a", "").unwrap().logger.unwrap().program, logger.program);
    }

    #[test]
    fn stdio_that_can_not_be_used_is_refused_and_named() {
        for stdout in [
            "/dir",
            "/missing",
            "relative",
            "file://",
            "file:///dir",
            "file://var/log/a.log",
            "file://localhostile/a.log",
            "file:///var/log/%+f.log",
            "binary://x",
            "binary:///missing",
            "ttrpc+unix://x",
            "/a\0b",
        ] {
            let error = read(stdout, "").unwrap_err();
            assert!(error.to_string().contains("stdout"), "{error}");
        }
    }
}
