//! Requirements of tests. A test is skipped, and counted as skipped, if the run does not meet its requirements.

/// Ends a test early if this run does not meet a requirement.
macro_rules! needs {
    ($($need:ident),+) => {
        $(if let Some(reason) = crate::common::node::Need::$need.missing() {
            crate::common::needs::skip(crate::common::needs::name_of(|| ()), &reason);
            return;
        })+
    };
}

/// Prints without libtest's capture, so that a run shows what it has not checked.
pub fn skip(test: &str, reason: &str) {
    use std::io::Write;
    // One write, so that no line of another thread is printed within it.
    let line = format!("SKIP {test}: {reason}\n");
    let _ = std::io::stderr().write_all(line.as_bytes());
}

/// The path of the function that contains a closure.
pub fn name_of<T>(_closure: T) -> &'static str {
    let name = std::any::type_name::<T>().trim_end_matches("::{{closure}}");
    name.split_once("::").map_or(name, |(_, path)| path)
}
