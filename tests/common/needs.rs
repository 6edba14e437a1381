//! Tests that not every run can serve: they are skipped, and counted as skipped.

/// Ends a test early when this run can't serve what it needs.
macro_rules! needs {
    ($($need:ident),+) => {
        $(if let Some(reason) = crate::common::node::Need::$need.missing() {
            crate::common::needs::skip(crate::common::needs::name_of(|| ()), &reason);
            return;
        })+
    };
}

/// Past libtest's capture, so that a run shows what it has not checked.
pub fn skip(test: &str, reason: &str) {
    use std::io::Write;
    // One write, so that no other thread's line gets into it.
    let line = format!("SKIP {test}: {reason}\n");
    let _ = std::io::stderr().write_all(line.as_bytes());
}

/// The path of the function that a closure was written in.
pub fn name_of<T>(_closure: T) -> &'static str {
    let name = std::any::type_name::<T>().trim_end_matches("::{{closure}}");
    name.split_once("::").map_or(name, |(_, path)| path)
}
