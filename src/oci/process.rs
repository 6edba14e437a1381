//! The process spec of an exec. It is checked, its `terminal` is set, and all other fields are passed on unchanged.

use std::fs::OpenOptions;
use std::io::Write;
use std::os::unix::fs::OpenOptionsExt;
use std::path::Path;

use serde::Deserialize;
use serde_json::value::RawValue;

use crate::path_error::{PathError, io_error};

use super::canonical::{Members, Others, Shape, canonical};

/// Why a process spec is refused, or can't be written.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The spec is not an OCI process.
    #[error("the spec of the exec is not a valid OCI process: {0}")]
    Malformed(#[from] serde_json::Error),
    /// The spec has no command.
    #[error("the spec of the exec has no args")]
    NoArgs,
    /// The file can't be written.
    #[error(transparent)]
    Io(#[from] PathError),
}

/// The process of an exec, as the client describes it.
#[derive(Debug)]
pub struct ProcessSpec {
    text: Vec<u8>,
    /// The command without its arguments, which are only in the text: there may be a million, and each needs much more memory
    /// here.
    pub program: String,
}

/// The fields of a process that are read or edited here.
pub const SHAPE: Shape = Shape::Struct(&[("args", Shape::List(&Shape::Text)), ("terminal", Shape::Value)]);

impl ProcessSpec {
    /// Reads a process spec. `terminal` of the request replaces the field of the spec, as in
    /// containerd-shim-runc-v2.
    ///
    /// # Errors
    /// The spec is not an OCI process, or has no command.
    pub fn read(spec: &[u8], terminal: bool) -> Result<Self, Error> {
        #[derive(Deserialize)]
        struct Args {
            #[serde(default)]
            args: Option<Vec<String>>,
        }
        let spec = canonical(spec, &SHAPE, Others::Kept)?;
        let mut fields: Members<Box<RawValue>> = serde_json::from_str(&spec)?;
        let Args { args } = serde_json::from_str(&spec)?;
        let program = args.and_then(|args| args.into_iter().next()).ok_or(Error::NoArgs)?;
        fields.insert("terminal", serde_json::value::to_raw_value(&terminal)?);
        Ok(Self { text: serde_json::to_vec(&fields)?, program })
    }

    /// The size of the file that [`Self::write`] writes, in bytes.
    pub fn bytes(&self) -> u64 {
        self.text.len() as u64
    }

    /// Writes the spec for the OCI runtime with mode 0600, because its environment may hold secrets.
    ///
    /// # Errors
    /// [`Error::Io`]
    pub fn write(&self, path: &Path) -> Result<(), Error> {
        let opened = OpenOptions::new().write(true).create(true).truncate(true).mode(0o600).open(path);
        Ok(opened.and_then(|mut file| file.write_all(&self.text)).map_err(io_error("write", path))?)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_requests_terminal_counts_and_all_else_stays() {
        let spec = br#"{"args":["sh"],"terminal":false,"future":{"n":18446744073709551615}}"#;
        let process = ProcessSpec::read(spec, true).unwrap();
        let text = String::from_utf8(process.text).unwrap();
        assert_eq!(text, r#"{"args":["sh"],"terminal":true,"future":{"n":18446744073709551615}}"#);
    }

    #[test]
    fn a_process_is_read_as_runc_reads_it() {
        let spec = br#"{"Args":["a"],"ARGS":["sh","-c"],"Terminal":true,"Cwd":"/"}"#;
        let process = ProcessSpec::read(spec, false).unwrap();
        assert_eq!(process.program, "sh");
        let text = String::from_utf8(process.text).unwrap();
        assert_eq!(text, r#"{"args":["sh","-c"],"terminal":false,"Cwd":"/"}"#);
    }

    #[test]
    fn an_invalid_process_is_refused() {
        for spec in ["", "[]", "{}", r#"{"args":[]}"#, r#"{"args":null}"#, r#"{"args":"sh"}"#] {
            assert!(ProcessSpec::read(spec.as_bytes(), false).is_err(), "{spec:?}");
        }
    }
}
