//! Fuzz targets: one function for each kind of input from outside. It checks the rules that must hold for every input.
//!
//! `make fuzz` runs the functions under libFuzzer (`fuzz/`). The unit tests run them over the inputs in
//! `fuzz/corpus/`, with any toolchain. A function returns normally for every input, and panics if a rule is broken.

mod bus;
mod client;
mod disk;
mod go;
#[cfg(test)]
mod models;
mod mounts;
mod properties;
mod rules;
mod streams;

/// A function that takes any input.
type Target = fn(&[u8]);

/// The functions by name. `fuzz/Cargo.toml` has a target with each of these names.
pub const TARGETS: [(&str, Target); 28] = [
    ("annotation", properties::annotation),
    ("arguments", client::arguments),
    ("bootstrap", streams::bootstrap),
    ("bundle", disk::bundle),
    ("bus", bus::message),
    ("cgroups_path", client::cgroups_path),
    ("cpuset", rules::processors),
    ("devices", rules::devices),
    ("metadata", properties::metadata),
    ("file", disk::file),
    ("frame", client::frame),
    ("journal", streams::journal),
    ("limits", rules::limits),
    ("log", streams::log),
    ("mount", mounts::options),
    ("mountinfo", mounts::mountinfo),
    ("name", client::name),
    ("notify", streams::notify),
    ("options", client::options),
    ("pod", client::pod),
    ("process", client::process),
    ("receive", streams::receive),
    ("record", disk::record),
    ("request", client::request),
    ("resources", client::resources),
    ("signal", client::signal),
    ("stdio", client::stdio),
    ("wire", bus::wire),
];

/// Runs the function with that name. Returns false if no function has that name.
pub fn run(name: &str, data: &[u8]) -> bool {
    let target = TARGETS.iter().find(|(known, _)| *known == name);
    target.map(|(_, function)| function(data)).is_some()
}

/// Splits an input into the text before the first line break and the rest.
fn first_line(data: &[u8]) -> Option<(&str, &[u8])> {
    let end = data.iter().position(|byte| *byte == b'\n')?;
    let (first, rest) = data.split_at(end);
    Some((std::str::from_utf8(first).ok()?, rest.get(1..)?))
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::collections::BTreeSet;
    use std::fs;
    use std::path::Path;

    #[test]
    fn every_input_of_the_corpus_is_handled() {
        let corpus = Path::new(env!("CARGO_MANIFEST_DIR")).join("fuzz/corpus");
        for (name, function) in TARGETS {
            let directory = corpus.join(name);
            let inputs =
                fs::read_dir(&directory).unwrap_or_else(|error| panic!("{}: {error}", directory.display()));
            let mut count = 0;
            for input in inputs {
                let path = input.unwrap().path();
                let data = fs::read(&path).unwrap();
                // A panic names the rule; the last line of the output names the input.
                eprintln!("{}", path.display());
                function(&data);
                count += 1;
            }
            assert!(count > 0, "{name} has no input");
        }
    }

    fn repository(file: &str) -> String {
        fs::read_to_string(Path::new(env!("CARGO_MANIFEST_DIR")).join(file)).unwrap()
    }

    #[test]
    fn every_target_can_be_run_by_a_fuzzer() {
        let manifest = repository("fuzz/Cargo.toml");
        for (name, _) in TARGETS {
            assert!(manifest.contains(&format!("name = \"{name}\"")), "{name} is not in fuzz/Cargo.toml");
        }
        assert!(!run("no-such-target", b""));
    }

    #[test]
    fn the_fuzzers_have_the_dependencies_of_this_crate() {
        let manifest: toml::Table = repository("Cargo.toml").parse().unwrap();
        let of = |table: &toml::Value| table.as_table().unwrap().keys().cloned().collect::<Vec<_>>();
        let fuzzing = &manifest["target"]["cfg(fuzzing)"]["dependencies"];
        let tables = [&manifest["dependencies"], &manifest["build-dependencies"], fuzzing];
        let needed: BTreeSet<_> = tables.into_iter().flat_map(of).collect();
        let lock: toml::Table = repository("fuzz/Cargo.lock").parse().unwrap();
        let packages = lock["package"].as_array().unwrap();
        let this = packages.iter().find(|package| package["name"].as_str() == Some(env!("CARGO_PKG_NAME")));
        let locked = this.unwrap()["dependencies"].as_array().unwrap().iter();
        // A version follows if there are several.
        let names = locked.map(|entry| entry.as_str().unwrap().split(' ').next().unwrap().to_owned());
        assert_eq!(
            names.collect::<BTreeSet<_>>(),
            needed,
            "`cargo update --workspace` in fuzz/ corrects the lock file"
        );
    }
}
