//! Parses command lines of the benchmark and of the chaos: flags, each with a value.

use std::process::ExitCode;
use std::str::FromStr;

/// Calls `set` for each flag and its value. If the user asks for help, or a flag is wrong, prints a message and returns
/// the exit code of the program.
pub fn read(
    program: &str,
    usage: &str,
    mut words: impl Iterator<Item = String>,
    mut set: impl FnMut(&str, &str) -> Result<(), String>,
) -> Result<(), ExitCode> {
    while let Some(word) = words.next() {
        if ["--help", "-h"].contains(&word.as_str()) {
            println!("{usage}");
            return Err(ExitCode::SUCCESS);
        }
        let value = words.next().ok_or_else(|| format!("{word} needs a value"));
        if let Err(what) = value.and_then(|value| set(&word, &value)) {
            eprintln!("{program}: {what}\n{usage}");
            return Err(ExitCode::from(2));
        }
    }
    Ok(())
}

/// A number above zero.
pub fn count<T: FromStr + Default + PartialOrd>(text: &str) -> Result<T, String> {
    match text.parse() {
        Ok(count) if count > T::default() => Ok(count),
        _ => Err(format!("{text:?} is not a count")),
    }
}
