//! Runs a program in a pseudo-terminal, as a person's terminal does.

use std::fs::{self, File};
use std::io::Write;
use std::os::fd::AsRawFd;
use std::process::{Child, Command};

use nix::pty::{OpenptyResult, openpty};

use super::process;
use super::stdio::Reader;
use super::wait;

pub struct Pty {
    program: Child,
    keyboard: File,
    screen: Reader,
    path: String,
}

impl Pty {
    /// Runs a program in a terminal of this size.
    pub fn run(args: &[&str], width: u32, height: u32) -> Pty {
        let OpenptyResult { master, slave } = openpty(None, None).expect("open a pseudo-terminal");
        let path = format!("/proc/self/fd/{}", slave.as_raw_fd());
        let path = fs::read_link(path).expect("the name of a terminal").to_string_lossy().into_owned();
        set_size(&path, width, height);
        let end = || slave.try_clone().expect("one more end of the terminal");
        // Only a program with a session of its own gets signals for a resize and for control-C.
        let program = Command::new("setsid")
            .args(["--ctty", "--wait"])
            .args(args)
            .env("TERM", "dumb")
            .stdin(end())
            .stdout(end())
            .stderr(end())
            .spawn()
            .unwrap_or_else(|error| panic!("run {args:?} in a terminal: {error}"));
        let keyboard = File::from(master.try_clone().expect("one more end of the terminal"));
        Pty { program, keyboard, screen: Reader::of(File::from(master), "the screen"), path }
    }

    pub fn enter(&mut self, text: &str) {
        self.keyboard.write_all(text.as_bytes()).expect("type");
    }

    /// Waits until the output has the text; returns all output since the last call.
    pub fn until(&mut self, text: &str) -> String {
        let shown = |bytes: &[u8]| String::from_utf8_lossy(bytes).contains(text);
        String::from_utf8_lossy(&self.screen.until(shown)).into_owned()
    }

    pub fn resize(&self, width: u32, height: u32) {
        set_size(&self.path, width, height);
    }

    /// Waits for the program to end; returns its exit code.
    pub fn code(&mut self) -> Option<i32> {
        wait::until("the end of a program in a terminal", || {
            self.program.try_wait().expect("wait for a program")
        })
        .code()
    }
}

impl Drop for Pty {
    fn drop(&mut self) {
        // The end of the terminal ends most programs. This ends the others.
        let _ = self.program.kill();
        let _ = self.program.wait();
    }
}

fn set_size(terminal: &str, width: u32, height: u32) {
    let (width, height) = (width.to_string(), height.to_string());
    process::succeed("stty", &["-F", terminal, "cols", &width, "rows", &height]);
}
