//! A file in memory for the output of a program.

use std::fs::File;
use std::io::{self, Read, Seek};

use nix::fcntl::{FcntlArg, SealFlag, fcntl};
use nix::sys::memfd::{MFdFlags, memfd_create};

use crate::text;

/// How much a program can write to standard error, in bytes. A script that traces itself writes much, and may end when a write fails.
/// The file takes memory for what is written only.
const MESSAGE_BYTES: u32 = 1 << 20;

/// How much of the end of it people see, in characters.
const MESSAGE_CHARACTERS: usize = 1024;

/// A file in memory that can't grow. A program that writes more gets an error. With a pipe, the program would wait, or end
/// if nobody reads; with a usual file, a process that it leaves behind could fill the memory.
///
/// # Errors
/// The kernel makes no such file.
pub fn bounded_file(name: &str, bytes: u32) -> io::Result<File> {
    let file = File::from(memfd_create(name, MFdFlags::MFD_CLOEXEC | MFdFlags::MFD_ALLOW_SEALING)?);
    file.set_len(bytes.into())?;
    fcntl(&file, FcntlArg::F_ADD_SEALS(SealFlag::F_SEAL_GROW | SealFlag::F_SEAL_SHRINK))?;
    Ok(file)
}

/// What a program writes to standard error. Empty if the kernel makes no file for it.
#[derive(Debug)]
pub struct Messages(Option<File>);

impl Messages {
    /// A place for the messages of one program.
    pub fn new() -> Self {
        Self(bounded_file("messages", MESSAGE_BYTES).ok())
    }

    /// The file, for the program.
    pub fn file(&self) -> Option<File> {
        self.0.as_ref().and_then(|file| file.try_clone().ok())
    }

    /// The end of the messages, as one line.
    pub fn text(self) -> String {
        let mut bytes = Vec::new();
        if let Some(mut file) = self.0 {
            // What was read before an error counts.
            let _ = file.rewind().and_then(|()| file.read_to_end(&mut bytes));
        }
        // The file has its full size from the start. The program may write at a position of its own.
        let written = bytes.iter().rposition(|byte| *byte != 0).map_or(0, |last| last + 1);
        bytes.truncate(written);
        text::end(&String::from_utf8_lossy(&bytes), MESSAGE_CHARACTERS)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::Write;
    use std::process::Command;

    #[test]
    fn the_end_of_the_messages_is_one_line() {
        let messages = Messages::new();
        let script = "echo one >&2; printf '\\033[31mtwo\\n' >&2";
        let mut shell = Command::new("/bin/sh");
        assert!(shell.args(["-c", script]).stderr(messages.file().unwrap()).status().unwrap().success());
        assert_eq!(messages.text(), "one [31mtwo");
        assert_eq!(Messages::new().text(), "");
    }

    #[test]
    fn a_program_that_writes_without_end_takes_no_more_memory() {
        let messages = Messages::new();
        let mut file = messages.file().unwrap();
        let written = file.write_all(&vec![b'x'; 2 << 20]);
        assert!(written.is_err());
        assert!(file.metadata().unwrap().len() == u64::from(MESSAGE_BYTES));
        assert_eq!(messages.text(), "x".repeat(MESSAGE_CHARACTERS));
    }
}
