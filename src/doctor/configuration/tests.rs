//! Tests of the checks of configurations.

use super::super::{Status, only_fault};
use super::*;

fn absent() -> Known<String> {
    Err(Unknown::Absent("x".to_owned()))
}

fn runc() -> (PathBuf, Known<String>) {
    (PathBuf::from("/usr/sbin/runc"), Ok("runc version 1.1.15+ds1\ncommit: 1".to_owned()))
}

fn healthy() -> Facts {
    Facts {
        files: vec![(PathBuf::from(CONFIG), absent())],
        stray: vec![],
        docker: absent(),
        named: BTreeMap::new(),
        runtimes: vec![(None, Ok(runc()))],
    }
}

fn with(config: &str) -> Facts {
    Facts { files: vec![(PathBuf::from(CONFIG), Ok(config.to_owned()))], ..healthy() }
}

fn known() -> Search {
    Search { path: "/bin".to_owned(), guessed: None }
}

fn all(facts: &Facts) -> Vec<Check> {
    checks(facts, &known(), None)
}

/// The one check that is not OK.
#[track_caller]
fn fault(facts: &Facts) -> Check {
    only_fault(all(facts))
}

#[track_caller]
fn is_ok(facts: &Facts) {
    assert!(all(facts).iter().all(|check| check.status == Status::Ok), "{:?}", all(facts));
}

/// What `collect` does for options of this place.
fn resolved(options: Options) -> (Option<String>, Resolved) {
    let found = options.resolve(&Namespace::new("default").unwrap(), "/bin");
    (Some("a place".to_owned()), found.map(|_| runc()))
}

const V2: &str = "version = 2\n[plugins.\"io.containerd.grpc.v1.cri\".containerd.runtimes.systemd]\n";
const V3: &str = "version = 3\n[plugins.\"io.containerd.cri.v1.runtime\".containerd.runtimes.systemd]\n";

fn ours(table: &str, options: &str) -> Facts {
    with(&format!("{table}runtime_type = \"{RUNTIME}\"\n{options}"))
}

#[test]
fn a_runtime_in_the_right_table_is_ok() {
    is_ok(&healthy());
    let version_4 = V3.replace("version = 3", "version = 4");
    for table in [V2, V3, &version_4] {
        let facts = ours(table, "options.BinaryName = \"crun\"");
        is_ok(&facts);
        assert!(all(&facts)[0].found.contains("runtime systemd"), "{:?}", all(&facts));
    }
}

#[test]
fn a_file_that_is_not_toml_and_a_table_of_another_version_are_found() {
    assert!(fault(&with("version = = 2")).found.contains("is not TOML"));
    for version in ["version = 3", "version = 4"] {
        let check = fault(&ours(&V2.replace("version = 2", version), ""));
        assert!(check.found.contains(version), "{check:?}");
        assert_eq!(check.advice, format!("use the table {CRI_3:?}"));
    }
    let check = fault(&ours(&V3.replace("version = 3", "version = 2"), ""));
    assert_eq!(check.advice, format!("use the table {CRI_2:?}"));
    let check = fault(&ours(&V3.replace("version = 3", ""), ""));
    assert_eq!(check.advice, "set version = 3 at the top of the file");
    let check = fault(&with(&format!("{V2}runtime_type = \"io.containerd.systemd.v2\"")));
    assert_eq!(check.status, Status::Warning);
}

#[test]
fn a_wrong_option_is_named_with_its_place() {
    let check = fault(&ours(V2, "options.BinaryNmae = \"crun\""));
    assert_eq!((check.name, check.status), ("configuration", Status::Error));
    assert!(check.found.contains("BinaryNmae") && check.found.contains(CONFIG), "{check:?}");
    let check = fault(&ours(V2, "options.IoUid = \"me\""));
    assert!(check.found.contains("runtime systemd") && check.found.contains("expected u32"), "{check:?}");
}

#[test]
fn names_of_options_are_read_in_any_case() {
    is_ok(&ours(V2, "options.binaryname = \"crun\"\noptions.LOG = \"tee\""));
    let check = fault(&ours(V2, "options.Log = \"tee\"\noptions.log = \"none\""));
    assert!(check.found.contains("duplicate field `Log`"), "{check:?}");
}

#[test]
fn the_file_that_config_path_names_is_read() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("options.toml");
    let options = format!("options.configpath = {path:?}\noptions.TypeUrl = \"x\"");
    let read = || Facts { named: [(path.clone(), from_file(&path))].into(), ..ours(V3, &options) };
    std::fs::write(&path, "log = \"tee\"\n").unwrap();
    is_ok(&read());
    std::fs::write(&path, "Lgo = \"tee\"\n").unwrap();
    let check = fault(&read());
    assert!(check.found.contains("Lgo") && check.found.contains("runtime systemd"), "{check:?}");
    std::fs::remove_file(&path).unwrap();
    let check = fault(&read());
    assert_eq!(check.status, Status::Error);
    assert!(check.found.contains("options.toml: No such file"), "{check:?}");
    let forbidden = Err(Unknown::Forbidden("/etc/o".to_owned()));
    let facts = Facts { named: [(path.clone(), forbidden)].into(), ..read() };
    assert_eq!(fault(&facts).status, Status::Unknown);
}

#[test]
fn each_place_has_a_result_of_its_own() {
    let named =
        |log: &str| Options { binary_name: "sh".to_owned(), log: log.to_owned(), ..Options::default() };
    // The first is wrong, and the last with the same OCI runtime is not.
    let runtimes = vec![(None, Ok(runc())), resolved(named("syslog")), resolved(named("tee"))];
    let check = fault(&Facts { runtimes, ..healthy() });
    assert_eq!((check.name, check.status), ("configuration", Status::Error));
    assert!(check.found.starts_with("a place: ") && check.found.contains("syslog"), "{check:?}");
    let advice = "correct it (see containerd-shim-systemd-v1(5)), then systemctl restart containerd";
    assert_eq!(check.advice, advice);
    for options in [
        Options { root: "x".to_owned(), ..named("") },
        Options { shim_cgroup: "x".to_owned(), ..named("") },
        Options { criu_work_path: "x".to_owned(), ..named("") },
    ] {
        let runtimes = vec![(None, Ok(runc())), resolved(options)];
        assert_eq!(fault(&Facts { runtimes, ..healthy() }).name, "configuration");
    }
}

#[test]
fn no_oci_runtime_and_a_broken_one_are_found() {
    let missing = || {
        let options = Options { binary_name: "no-such-runtime".to_owned(), ..Options::default() };
        resolved(options)
    };
    let (place, error) = missing();
    let check = fault(&Facts { runtimes: vec![(None, error)], ..healthy() });
    assert_eq!((check.name, check.status), ("oci-runtime", Status::Error));
    let check = fault(&Facts { runtimes: vec![(None, Ok(runc())), missing()], ..healthy() });
    assert_eq!((check.name, check.status), ("oci-runtime", Status::Error));
    assert!(check.found.starts_with("a place: "), "{check:?}");
    // All that is configured works. Only clients that name no options can't start containers.
    let facts = Facts { runtimes: vec![(None, missing().1), (place, Ok(runc()))], ..healthy() };
    assert_eq!(fault(&facts).status, Status::Warning);
    let guessed = Some(Unknown::Forbidden("/proc/7/environ".to_owned()));
    let check = only_fault(checks(&facts, &Search { guessed, ..known() }, None));
    assert_eq!(check.status, Status::Unknown);

    let broken = Ok((PathBuf::from("/usr/sbin/runc"), Err(Unknown::Failed("exec format".to_owned()))));
    let found = fault(&Facts { runtimes: vec![(None, broken)], ..healthy() }).found;
    assert!(found.ends_with("--version fails: exec format"), "{found}");
    let old = Ok((PathBuf::from("/usr/sbin/runc"), Ok("runc version 1.0.2".to_owned())));
    assert_eq!(fault(&Facts { runtimes: vec![(None, old)], ..healthy() }).status, Status::Warning);
}

#[test]
fn properties_are_checked_as_at_create() {
    let known_types = [("TimeoutStopUSec", "t"), ("IOWeight", "t")];
    let types = Types(known_types.map(|(name, kind)| (name.to_owned(), kind.to_owned())).into());
    let judge = |options: &str| checks(&ours(V2, options), &known(), Some(&types));
    let right = judge(
        "options.Properties = { TimeoutStopSec = \"5\" }\noptions.AnnotationProperties = [\"IOWeight\", \"TimeoutStopSec\", \"Conditions\"]",
    );
    assert!(right.iter().all(|check| check.status == Status::Ok), "{right:?}");
    for (options, word) in [
        ("options.Properties = { Slice = \"'x.slice'\" }", "Properties.Slice"),
        ("options.Properties = { TimeoutStopSec = \"soon\" }", "Properties.TimeoutStopSec"),
        ("options.Properties = { TimeoutSpotSec = \"5\" }", "no property TimeoutSpotUSec"),
        ("options.Properties = { TimeoutStopUSec = \"5\" }", "write uint64 5"),
        ("options.AnnotationProperties = [\"User\"]", "AnnotationProperties, \"User\""),
        ("options.AnnotationProperties = [\"IO-Weight\"]", "not a valid property name"),
    ] {
        let check = only_fault(judge(options));
        assert_eq!((check.name, check.status), ("configuration", Status::Error), "{options}");
        assert!(check.found.contains(word) && check.found.contains("runtime systemd"), "{check:?}");
    }
    let check = only_fault(judge("options.AnnotationProperties = [\"IOWeight\", \"IOWieght\"]"));
    assert_eq!(check.status, Status::Warning);
    assert!(check.found.contains("\"IOWieght\": systemd has no such property"), "{check:?}");
}

#[test]
fn files_are_imported_as_containerd_does_it() {
    let dir = tempfile::tempdir().unwrap();
    let write = |name: &str, text: &str| {
        let path = dir.path().join(name);
        std::fs::create_dir_all(path.parent().unwrap()).unwrap();
        std::fs::write(path, text).unwrap();
    };
    write("config.toml", "version = 3\nimports = [\"conf.d/*.toml\"]\n");
    write("conf.d/b.toml", "imports = [\"more.toml\", \"../config.toml\"]\n");
    write("conf.d/a.toml", "");
    write("conf.d/more.toml", "");
    write("conf.d/a.conf", "");
    let found = with_imports(vec![dir.path().join("config.toml")]);
    let names: Vec<_> =
        found.iter().map(|(path, _)| path.strip_prefix(dir.path()).unwrap().to_owned()).collect();
    let wanted = ["config.toml", "conf.d/a.toml", "conf.d/b.toml", "conf.d/more.toml"].map(PathBuf::from);
    assert_eq!(names[..4], wanted);
    let missing = with_imports(vec![dir.path().join("no.toml")]);
    assert!(missing.len() == 1 && missing[0].1.as_ref().unwrap_err().is_absent());
}

#[test]
fn a_drop_in_that_nothing_imports_is_found() {
    let text = format!("{V3}runtime_type = \"{RUNTIME}\"\n");
    let stray = |text: &str| vec![(Path::new(DROP_INS).join("systemd.toml"), Ok(text.to_owned()))];
    let check = fault(&Facts { stray: stray(&text), ..healthy() });
    assert_eq!((check.name, check.status), ("configuration", Status::Warning));
    assert!(check.found.contains("/etc/containerd/conf.d/systemd.toml"), "{check:?}");
    assert!(check.advice.contains("imports = [\"/etc/containerd/conf.d/*.toml\"]"), "{check:?}");
    is_ok(&Facts { stray: stray(&text.replace("systemd.v1", "runc.v2")), ..healthy() });
}

#[test]
fn dockers_runtimes_are_checked_too() {
    let docker = |options: &str| {
        let text =
            format!(r#"{{"runtimes": {{"s": {{"runtimeType": "{RUNTIME}", "options": {options}}}}}}}"#);
        Facts { docker: Ok(text), ..healthy() }
    };
    let named = || Options::from_toml("Lgo = \"tee\"", "/etc/o").map_err(|error| error.to_string());
    let with_file =
        |options: &str| Facts { named: [("/etc/o".into(), Ok(named()))].into(), ..docker(options) };
    for options in [r#"{"ConfigPath": "/etc/o"}"#, r#"{"configPath": "/etc/o"}"#] {
        let check = fault(&with_file(options));
        assert!(check.found.contains("Lgo") && check.found.contains("/etc/docker/daemon.json"), "{check:?}");
    }
    // Docker passes on nothing else.
    is_ok(&docker(r#"{"BinaryNmae": "crun"}"#));
    assert!(fault(&Facts { docker: Ok("{".to_owned()), ..healthy() }).found.contains("daemon.json"));
}
