//! Becomes another program.

use std::ffi::{CString, OsStr};
use std::io;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::process::CommandExt;
use std::process::Command;

use nix::unistd::execve;

/// Becomes the program of a command, with these arguments and this environment. Otherwise as [`CommandExt::exec`], which lets a
/// shell read a program of an unknown format (execvp(3)), such as a program for another machine.
///
/// # Errors
/// Returns only an error: a text contains NUL, or the kernel can't execute the program.
pub fn exec<'a>(
    command: &mut Command,
    arguments: impl Iterator<Item = &'a OsStr>,
    environment: impl Iterator<Item = &'a OsStr>,
) -> io::Error {
    let text = |text: &OsStr| CString::new(text.as_bytes());
    let all = |texts: Result<Vec<_>, _>| texts.map_err(io::Error::from);
    let program = text(command.get_program()).map_err(io::Error::from);
    let (arguments, environment) = (all(arguments.map(text).collect()), all(environment.map(text).collect()));
    let (program, arguments, environment) = match (program, arguments, environment) {
        (Ok(program), Ok(arguments), Ok(environment)) => (program, arguments, environment),
        (Err(error), ..) | (_, Err(error), _) | (.., Err(error)) => return error,
    };
    let execute = move || match execve(&program, &arguments, &environment) {
        Ok(never) => match never {},
        Err(errno) => Err(errno.into()),
    };
    // SAFETY: `exec` runs the closure in this process, not in the child of a fork, so the closure may allocate memory.
    unsafe { command.pre_exec(execute) };
    command.exec()
}
