//! Pins which top-level module may use which: dependencies point down only, so there are no circles.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::path::Path;

/// The modules from top to bottom. A module may use those that come after it.
const ORDER: &[&str] = &[
    "fuzzing",
    "simulation",
    "layers",
    "makefile",
    "lib",
    "main",
    "sandbox_init",
    "cli",
    "manual",
    "doctor",
    "view",
    "probe",
    "api",
    "recovery",
    "ops",
    "supervise",
    "services",
    "session",
    "guard",
    "launch",
    "transport",
    "oci",
    "store",
    "stdio",
    "unit",
    "cgroup",
    "task",
    "files",
    "path_error",
    "suspect",
    "effects",
    "fault",
    "sys",
    "telemetry",
    "text",
    "id",
    "config",
];

/// Files in which only tests are, by the ends of their names. They may use everything.
const OF_TESTS: [&str; 5] = ["tests.rs", "fake.rs", "fake/calls.rs", "layers.rs", "makefile.rs"];

/// The sources of each top-level module, without unit tests.
fn sources() -> BTreeMap<String, Vec<(String, String)>> {
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("src");
    let (mut found, mut dirs) = (BTreeMap::<_, Vec<_>>::new(), vec![root.clone()]);
    while let Some(dir) = dirs.pop() {
        for path in fs::read_dir(dir).unwrap().map(|item| item.unwrap().path()) {
            let name = path.strip_prefix(&root).unwrap().to_str().unwrap().to_owned();
            if path.is_dir() {
                dirs.push(path);
            } else if !OF_TESTS.iter().any(|test| name.ends_with(test)) {
                let text = fs::read_to_string(&path).unwrap();
                let module = name.split('/').next().unwrap().trim_end_matches(".rs").to_owned();
                let code = text.split("#[cfg(test)]\nmod tests {").next().unwrap();
                let lines = code.lines().filter(|line| !line.trim_start().starts_with("//"));
                found.entry(module).or_default().push((name, lines.collect::<Vec<_>>().join("\n")));
            }
        }
    }
    found
}

fn words_after<'a>(text: &'a str, prefix: &'a str) -> impl Iterator<Item = &'a str> {
    let is_end = |letter: char| !letter.is_alphanumeric() && letter != '_';
    text.split(prefix).skip(1).map(move |rest| rest.split(is_end).next().unwrap())
}

fn place(module: &str) -> usize {
    let place = ORDER.iter().position(|name| *name == module);
    place.ok_or_else(|| format!("{module} has no place in ORDER")).unwrap()
}

/// The modules that a source names below a path: for `crate::`, those in `crate::a::b` and `crate::{a, b::c}`.
fn used<'a>(text: &'a str, path: &str) -> BTreeSet<&'a str> {
    let is_end = |letter: char| !letter.is_alphanumeric() && letter != '_';
    let items = text.split(path).skip(1).flat_map(|rest| match rest.strip_prefix('{') {
        Some(group) => group.split('}').next().unwrap().split(',').collect(),
        None => vec![rest],
    });
    items.map(|item| item.trim().split(is_end).next().unwrap()).filter(|module| !module.is_empty()).collect()
}

#[test]
fn dependencies_point_down() {
    for (module, files) in sources() {
        for (name, text) in files {
            for used in used(&text, "crate::") {
                assert!(
                    used == module || place(&module) < place(used),
                    "{name} uses {used}, which is above it"
                );
            }
        }
    }
}

#[test]
fn files_of_a_module_import_each_other_in_no_circle() {
    let mut imports: BTreeMap<String, BTreeSet<String>> = BTreeMap::new();
    for (name, text) in sources().into_values().flatten() {
        let Some((folder, file)) = name.trim_end_matches(".rs").rsplit_once('/') else {
            continue;
        };
        let path = format!("crate::{}::", folder.replace('/', "::"));
        let mut used: BTreeSet<&str> = used(&text, "super::").union(&used(&text, &path)).copied().collect();
        used.remove(file);
        if file != "mod" {
            imports.insert(name.clone(), used.iter().map(|used| format!("{folder}/{used}.rs")).collect());
        }
    }
    assert!(imports["services/tasks.rs"].contains("services/registry.rs"), "imports are found");
    // Removes the files that import no other one, until only circles and what imports them are left.
    loop {
        let known: BTreeSet<String> = imports.keys().cloned().collect();
        imports.values_mut().for_each(|used| used.retain(|file| known.contains(file)));
        imports.retain(|_, used| !used.is_empty());
        if imports.len() == known.len() {
            break;
        }
    }
    assert!(imports.is_empty(), "these files import each other in circles: {imports:#?}");
}

/// The methods that the modules of a layer add to a type.
fn methods_of(of_type: &str, files: &[(String, String)]) -> Vec<String> {
    let start = format!("\nimpl {of_type} {{");
    let blocks = files.iter().flat_map(|(_, text)| text.split(&start).skip(1));
    let bodies = blocks.map(|block| block.split("\n}").next().unwrap());
    bodies.flat_map(|body| words_after(body, " fn ").map(str::to_owned).collect::<Vec<_>>()).collect()
}

/// The word at the end of a text.
fn last_word(text: &str) -> &str {
    let is_end = |letter: char| !letter.is_alphanumeric() && letter != '_';
    text.rsplit(is_end).next().unwrap()
}

/// The words that are called after a dot or two colons: `this.word(`, `Type::word(`, `this.word::<T>(`.
fn called(text: &str) -> BTreeSet<&str> {
    let before = ["(", "::<"].into_iter().flat_map(|end| text.split(end));
    let words = before.map(|piece| (piece, last_word(piece)));
    let is_called =
        |piece: &str, word: &str| piece.strip_suffix(word).is_some_and(|before| before.ends_with(['.', ':']));
    words.filter(|(piece, word)| is_called(piece, word)).map(|(_, word)| word).collect()
}

/// What layers do with methods that a layer above them adds to a type. `variable` is the name of all variables of this type. Also
/// returns how many methods there are.
fn calls_from_below(
    (of_type, variable): (&str, &str),
    layers: &[&str],
    all: &BTreeMap<String, Vec<(String, String)>>,
) -> (usize, Vec<String>) {
    let mut functions = BTreeMap::<_, usize>::new();
    let of_daemon = all.iter().filter(|(module, _)| !["fuzzing", "simulation"].contains(&module.as_str()));
    for word in of_daemon.flat_map(|(_, files)| files).flat_map(|(_, text)| words_after(text, "fn ")) {
        *functions.entry(word).or_default() += 1;
    }
    let (mut count, mut found) = (0, Vec::new());
    for (at, above) in layers.iter().enumerate() {
        let methods = methods_of(of_type, &all[*above]);
        count += methods.len();
        for (name, text) in layers[at + 1..].iter().flat_map(|below| &all[*below]) {
            let (called, of_path) = (called(text), format!("{of_type}::"));
            let named: BTreeSet<&str> = words_after(text, &of_path).collect();
            let by = |of: &str, method: &str| text.contains(&format!("{of}.{method}("));
            let is_called = |method: &str| {
                // A method whose name no other function has is found whatever the variable is called.
                named.contains(method)
                    || by(variable, method)
                    || (text.contains(of_type) && by("self", method))
                    || (functions[method] == 1 && called.contains(method))
            };
            let calls = methods.iter().filter(|method| is_called(method.as_str()));
            found.extend(calls.map(|method| {
                format!("{name} calls {method}, which {above} adds to {of_type}: {above} is above it")
            }));
        }
    }
    // The other methods are found by the name of the variable.
    for (name, text) in layers.iter().flat_map(|layer| &all[*layer]) {
        let types = [": &", ": Arc<", ": &Arc<"].map(|of| format!("{of}{of_type}"));
        for word in types.iter().flat_map(|of| text.rsplit(of.as_str()).skip(1)).map(last_word) {
            if word != variable {
                found.push(format!("{name} has a variable {word} of the type {of_type}: call it {variable}"));
            }
        }
    }
    (count, found)
}

/// Methods need no import, and several modules have methods of these types. So these are checked as well.
#[test]
fn no_method_is_called_from_below() {
    let all = sources();
    for (of_type, layers) in [
        (("Shim", "shim"), &["recovery", "ops", "supervise", "services"][..]),
        (("Tasks", "tasks"), &["ops", "supervise", "services"][..]),
    ] {
        let (count, found) = calls_from_below(of_type, layers, &all);
        assert!(found.is_empty(), "{found:#?}");
        assert!(count > 10, "methods of {of_type:?} were found");
    }
}

#[test]
fn a_call_from_below_is_found_whatever_the_variable_is_called() {
    let source = |text: &str| vec![("some.rs".to_owned(), text.to_owned())];
    let above = "\nimpl Tasks {\n    fn send_all(&self) {}\n    fn kill(&self) {}\n}\n\nfn kill() {}";
    let found = |below: &str| {
        let all = [("ops".to_owned(), source(above)), ("services".to_owned(), source(below))].into();
        calls_from_below(("Tasks", "tasks"), &["ops", "services"], &all).1.len()
    };
    for call in [
        "this.send_all();",
        "this.send_all::<u8>()",
        "Tasks::send_all(&this)",
        "map(Tasks::send_all)",
        "self.tasks.kill()",
        "Tasks::kill(&this)",
        "fn list(all: &Tasks) {}",
        "all: Arc<Tasks>,",
    ] {
        assert_eq!(found(call), 1, "{call}");
    }
    for other in ["this.kill()", "send_all(this)", "this.send_all = 1", "this.send_all_of()", "tasks: &Tasks"]
    {
        assert_eq!(found(other), 0, "{other}");
    }
}
