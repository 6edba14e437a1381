use super::*;

fn request() -> Checkpoint {
    Checkpoint { image: "/c".into(), ..Checkpoint::default() }
}

fn words(arguments: Vec<OsString>) -> String {
    let words: Vec<_> = arguments.iter().map(|word| word.to_string_lossy()).collect();
    words.join(" ")
}

#[test]
fn every_option_of_a_client_becomes_one_of_the_oci_runtime() {
    let least = request().check().unwrap();
    assert_eq!(words(least.arguments(Path::new("/w"))), "--image-path /c --work-path /w --leave-running");
    let most = Checkpoint {
        exit: true,
        open_tcp: true,
        external_unix_sockets: true,
        terminal: true,
        file_locks: true,
        empty_namespaces: vec!["network".to_owned()],
        cgroups_mode: "strict".to_owned(),
        ..request()
    };
    assert_eq!(
        words(most.check().unwrap().arguments(Path::new("/w"))),
        "--image-path /c --work-path /w --tcp-established --ext-unix-sk --shell-job \
         --file-locks --manage-cgroups-mode strict"
    );
}

#[test]
fn an_empty_namespace_is_in_the_configuration_because_crun_has_no_option_for_it() {
    let request = Checkpoint { empty_namespaces: vec!["network".to_owned()], ..request() };
    let notes = Notes { request, ..Notes::default() };
    assert_eq!(
        (notes.dump_config().as_str(), notes.restore_config().as_str()),
        ("empty-ns net\n", "empty-ns net\n")
    );
}

#[test]
fn an_oci_runtime_that_cannot_use_criu_is_told_from_other_failures() {
    let problem = Problem::of_runtime("could not load `libcriu.so.2`").unwrap();
    assert!(matches!(problem, Problem::NoLibrary { .. }), "{problem}");
    for reason in
        ["Compiled without CRIU support. Checkpointing not available.", "compiled without CRIU support"]
    {
        assert!(matches!(Problem::of_runtime(reason), Some(Problem::NoSupport { .. })), "{reason}");
    }
    assert_eq!(Problem::of_runtime("criu failed: type NOTIFY errno 0"), None);
}

#[test]
fn a_restore_has_the_options_of_its_checkpoint() {
    let request = Checkpoint { open_tcp: true, cgroups_mode: "full".to_owned(), exit: true, ..request() };
    assert_eq!(
        words(request.restore_arguments(Path::new("/i"), Path::new("/w"))),
        "--image-path /i --work-path /w --tcp-established"
    );
}

#[test]
fn forbidden_options_of_a_client_are_refused() {
    for image in ["", "c", "/a/../b", &format!("/{}", "a".repeat(MAX_PATH))] {
        assert!(Checkpoint { image: image.into(), ..request() }.check().is_err(), "{image}");
    }
    assert!(Checkpoint { work: Some("w".into()), ..request() }.check().is_err());
    assert!(Checkpoint { cgroups_mode: "--exit".to_owned(), ..request() }.check().is_err());
    assert!(Checkpoint { empty_namespaces: vec!["pid".to_owned()], ..request() }.check().is_err());
}

#[test]
fn an_old_criu_is_refused() {
    for good in ["Version: 3.17\nGitID: v3.17\n", "Version: 3.17.1-3\n", "Version: 4.1.1\n", "Version: 4\n"] {
        assert_eq!(check_version(good), Ok(()), "{good}");
    }
    let old = check_version("Version: 3.9\n").unwrap_err();
    assert_eq!(old.to_string(), "criu 3.9 is too old: 3.17 is the oldest that can be used");
    assert!(matches!(check_version("help"), Err(Problem::Unusable { .. })));
}

#[test]
fn the_streams_of_a_checkpoint_are_inherited_by_its_restore() {
    let dir = tempfile::tempdir().unwrap();
    let images = dir.path().join("images");
    assert!(Notes::default().restore_config().is_empty());
    let streams = vec![(0, file_name(33, 0x46f)), (1, file_name(33, 0x47f))];
    let notes = Notes { streams, request: Checkpoint { open_tcp: true, ..request() } };
    notes.write(&images).unwrap();
    assert_eq!(notes.dump_config(), "external file[21:46f]\nexternal file[21:47f]\n");
    let read = Notes::read(&images).unwrap();
    assert_eq!(read, notes);
    assert_eq!(
        read.restore_config(),
        "inherit-fd fd[0]:file[21:46f]\ninherit-fd fd[1]:file[21:47f]\nskip-file-rwx-check\n"
    );
    assert_eq!(Notes::read(dir.path()).unwrap(), Notes::default());
}

#[test]
fn notes_of_somebody_else_put_nothing_into_the_configuration() {
    let dir = tempfile::tempdir().unwrap();
    for name in ["file[1:2]\nlog-file /etc/passwd", "file[1:]", "tty[1:2]", "file[1:2", "file[g:2]"] {
        let notes = Notes { streams: vec![(1, name.to_owned())], request: request() };
        notes.write(dir.path()).unwrap();
        assert!(Notes::read(dir.path()).is_err(), "{name}");
    }
    let notes = Notes { streams: vec![(7, file_name(1, 2))], request: request() };
    notes.write(dir.path()).unwrap();
    assert!(Notes::read(dir.path()).is_err());
}

#[test]
fn an_open_file_is_found_by_its_path() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("file");
    fs::write(&path, "").unwrap();
    let pids = [std::process::id()];
    assert_eq!(open_file(&path, &pids).unwrap(), None);
    let file = fs::File::open(&path).unwrap();
    let name = open_file(&path, &pids).unwrap().unwrap();
    assert!(
        is_file_name(&name) && name.ends_with(&format!(":{:x}]", file.metadata().unwrap().ino())),
        "{name}"
    );
}

#[test]
fn the_reason_of_a_failure_is_in_the_log() {
    let dir = tempfile::tempdir().unwrap();
    let log = dir.path().join(DUMP_LOG);
    let failed = "(00.6) Error (criu/files-reg.c:1790): Can't lookup mount=51 for fd=0\n\
                  (00.7) Error (criu/cr-dump.c:1681): Dump files failed\n(01.7) Error (criu/cr-dump.c:2111): Dumping FAILED.\n";
    fs::write(&log, failed).unwrap();
    assert_eq!(first_error(failed).unwrap(), "(criu/files-reg.c:1790): Can't lookup mount=51 for fd=0");
    assert!(!has_dumped(&log));
    let done = "(03.6) Dumping finished successfully\n";
    fs::write(&log, done).unwrap();
    assert!(has_dumped(&log) && first_error(done).is_none());
    assert_eq!(read_log(&log).unwrap(), done.as_bytes());
}
