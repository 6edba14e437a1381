//! What a client's stdio strings mean: an absolute path, `fifo://`, `file://`, `binary://`,
//! `binary-v2://`, or nothing.
//!
//! As in containerd-shim-runc-v2 the scheme is taken from stdout, and stderr follows it.

use std::path::{Path, PathBuf};

use crate::task::request::Stdio;
use crate::task::wiring::{Input, Logger, Output, Wiring};

/// Strings that mean nothing.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{stream} {text:?} is not valid: {rule}")]
pub struct Malformed {
    stream: &'static str,
    text: String,
    rule: &'static str,
}

/// What a path leads to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// A FIFO, as clients make them.
    Fifo,
    /// A regular file.
    File,
    /// A directory, a socket, …
    Other,
    /// Nothing.
    Missing,
}

/// Says where the streams of a process without a terminal lead. `kind` looks at a path.
///
/// # Errors
/// A string that means nothing, or a path that can't be used.
pub fn wiring(stdio: &Stdio, kind: impl Fn(&Path) -> Kind) -> Result<Wiring, Malformed> {
    let check = |stream, text: &str| {
        let rule = if text.contains('\0') {
            "it contains a NUL"
        } else if text.len() > 4096 {
            "it is longer than a path can be"
        } else {
            return Ok(());
        };
        Err(malformed(stream, text, rule))
    };
    check("stdin", &stdio.stdin)?;
    check("stdout", &stdio.stdout)?;
    check("stderr", &stdio.stderr)?;
    let stdin = input(&stdio.stdin, &kind)?;
    let wiring = |stdout, stderr| Ok(Wiring { stdin: stdin.clone(), stdout, stderr, logger: None });
    match split(&stdio.stdout) {
        (None | Some("fifo"), "") if stdio.stderr.is_empty() => wiring(Output::Journal, Output::Journal),
        (None | Some("fifo"), _) => {
            wiring(output("stdout", &stdio.stdout, &kind)?, output("stderr", &stdio.stderr, &kind)?)
        }
        (Some("file"), path) => {
            let path = file_path(path)
                .ok_or_else(|| malformed("stdout", &stdio.stdout, "file:// needs an absolute path"))?;
            if kind(&path) == Kind::Other {
                return Err(malformed("stdout", &stdio.stdout, "it is neither a regular file nor missing"));
            }
            let file = Output::File { path, create: true };
            wiring(file.clone(), file)
        }
        (Some(scheme @ ("binary" | "binary-v2")), rest) => {
            let logger = logger(rest, scheme == "binary-v2").ok_or_else(|| {
                malformed("stdout", &stdio.stdout, "binary:// needs an absolute path, then ?key=value")
            })?;
            if kind(&logger.program) != Kind::File {
                return Err(malformed("stdout", &stdio.stdout, "there is no such logger program"));
            }
            Ok(Wiring {
                stdin: Input::Null,
                stdout: Output::Logger,
                stderr: Output::Logger,
                logger: Some(logger),
            })
        }
        (Some(_), _) => Err(malformed(
            "stdout",
            &stdio.stdout,
            "the schemes are fifo, file, binary and binary-v2 (unknown STDIO scheme)",
        )),
    }
}

fn malformed(stream: &'static str, text: &str, rule: &'static str) -> Malformed {
    Malformed { stream, text: text.chars().take(200).collect(), rule }
}

/// Scheme and rest; a plain path has no scheme.
fn split(text: &str) -> (Option<&str>, &str) {
    match text.split_once("://") {
        Some((scheme, rest)) if !scheme.contains('/') => (Some(scheme), rest),
        Some(_) | None => (None, text),
    }
}

fn input(text: &str, kind: &impl Fn(&Path) -> Kind) -> Result<Input, Malformed> {
    let (_, path) = split(text);
    if path.is_empty() {
        return Ok(Input::Null);
    }
    match (Path::new(path).is_absolute(), kind(Path::new(path))) {
        (true, Kind::Fifo) => Ok(Input::Fifo(path.into())),
        (true, Kind::Missing) => Err(malformed("stdin", text, "there is no such FIFO")),
        (_, _) => Err(malformed("stdin", text, "it must be the absolute path of a FIFO")),
    }
}

fn output(stream: &'static str, text: &str, kind: &impl Fn(&Path) -> Kind) -> Result<Output, Malformed> {
    let (_, path) = split(text);
    if path.is_empty() {
        return Ok(Output::Null);
    }
    match (Path::new(path).is_absolute(), kind(Path::new(path))) {
        (true, Kind::Fifo) => Ok(Output::Fifo(path.into())),
        (true, Kind::File) => Ok(Output::File { path: path.into(), create: false }),
        (true, Kind::Missing) => Err(malformed(stream, text, "there is neither a FIFO nor a file")),
        (_, _) => Err(malformed(stream, text, "it must be the absolute path of a FIFO or a regular file")),
    }
}

fn file_path(rest: &str) -> Option<PathBuf> {
    let path = PathBuf::from(decode(rest.split('?').next()?)?);
    (path.is_absolute() && path.file_name().is_some()).then_some(path)
}

/// The arguments are each key of the query and its first value, also an empty one.
fn logger(rest: &str, strict: bool) -> Option<Logger> {
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

/// Percent-decoding (RFC 3986, 2.1); nothing if it gives no text.
fn decode(text: &str) -> Option<String> {
    let mut bytes = Vec::with_capacity(text.len());
    let mut rest = text.as_bytes();
    while let Some((&byte, tail)) = rest.split_first() {
        if byte == b'%' {
            let digits = std::str::from_utf8(tail.get(..2)?).ok()?;
            bytes.push(u8::from_str_radix(digits, 16).ok()?);
            rest = &tail[2..];
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

    fn read(stdout: &str, stderr: &str) -> Result<Wiring, Malformed> {
        let stdio = Stdio { stdout: stdout.to_owned(), stderr: stderr.to_owned(), ..Stdio::default() };
        wiring(&stdio, |path| match path.to_str() {
            Some(path) if path.starts_with("/fifo") => Kind::Fifo,
            Some(path) if path.starts_with("/bin") || path == "/file" => Kind::File,
            Some("/dir") => Kind::Other,
            _ => Kind::Missing,
        })
    }

    #[test]
    fn nothing_means_the_journal() {
        let wiring = read("", "").unwrap();
        assert_eq!(
            (wiring.stdout, wiring.stderr, wiring.stdin),
            (Output::Journal, Output::Journal, Input::Null)
        );
    }

    #[test]
    fn one_stream_alone_leaves_the_other_null() {
        assert_eq!(read("/fifo", "").unwrap().stderr, Output::Null);
        assert_eq!(read("", "/fifo").unwrap().stdout, Output::Null);
        assert_eq!(read("fifo:///fifo", "").unwrap().stdout, Output::Fifo("/fifo".into()));
    }

    #[test]
    fn a_file_takes_both_streams_through_one_pipe() {
        let wiring = read("file:///var/log/a%20b.log", "/ignored").unwrap();
        assert_eq!(wiring.stdout, Output::File { path: "/var/log/a b.log".into(), create: true });
        assert_eq!(wiring.own_pipes(), [pipe()]);
    }

    fn pipe() -> &'static str {
        crate::task::wiring::pipe::STDOUT
    }

    #[test]
    fn a_logger_gets_its_query_as_arguments() {
        let wiring = read("binary:///bin/log?a=1&b&a=2&c=x%2Fy", "").unwrap();
        let logger = wiring.logger.unwrap();
        assert_eq!((logger.program.to_str(), logger.strict), (Some("/bin/log"), false));
        assert_eq!(logger.args, ["a", "1", "b", "", "c", "x/y"]);
        assert!(read("binary-v2:///bin/log", "").unwrap().logger.unwrap().strict);
    }

    #[test]
    fn what_can_not_be_used_is_refused_and_named() {
        for stdout in [
            "/dir",
            "/missing",
            "relative",
            "file://",
            "file:///dir",
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
