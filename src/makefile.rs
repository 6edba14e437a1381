//! Pins what `make install` promises.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Output};
use std::time::{Duration, SystemTime};

/// A place for `make install`, with a program to install.
struct Place {
    dir: tempfile::TempDir,
    program: PathBuf,
}

impl Place {
    /// `changed`: when the program was written.
    fn new(changed: SystemTime) -> Self {
        let dir = tempfile::tempdir().unwrap();
        let program = dir.path().join("program");
        fs::write(&program, "new").unwrap();
        fs::File::options().write(true).open(&program).unwrap().set_modified(changed).unwrap();
        Self { dir, program }
    }

    /// Runs make on a machine without cargo.
    fn make(&self, arguments: &[&str]) -> Output {
        let mut make = Command::new("make");
        // A make that runs the unit tests sets these.
        make.env_remove("MAKEFLAGS").env_remove("MFLAGS").env_remove("MAKELEVEL");
        make.args(["-C", env!("CARGO_MANIFEST_DIR"), "-j8", "PREFIX=/usr", "CARGO=/no/such/cargo"]);
        make.arg(format!("BINARY={}", self.program.display()));
        make.arg(format!("DESTDIR={}", self.dir.path().join("root").display()));
        make.args(arguments).output().unwrap()
    }

    fn installed(&self) -> PathBuf {
        self.dir.path().join("root/usr/bin").join(crate::config::NAME)
    }
}

fn stale() -> SystemTime {
    SystemTime::UNIX_EPOCH + Duration::from_secs(1000)
}

fn fresh() -> SystemTime {
    SystemTime::now() + Duration::from_secs(1000)
}

fn said(output: &Output) -> String {
    String::from_utf8_lossy(&output.stderr).into_owned()
}

#[test]
fn a_stale_program_is_not_installed() {
    let place = Place::new(stale());
    let output = place.make(&["install"]);
    assert!(!output.status.success());
    assert!(said(&output).contains("older than its sources"), "{}", said(&output));
    assert!(!place.installed().exists());
}

#[test]
fn a_program_that_is_newer_than_its_sources_is_installed_without_cargo() {
    let place = Place::new(fresh());
    let output = place.make(&["install"]);
    assert!(output.status.success(), "{}", said(&output));
    assert_eq!(fs::read(place.installed()).unwrap(), b"new");
    let units = place.dir.path().join("root/usr/lib/systemd/system");
    for dir in [units.as_path(), place.installed().parent().unwrap()] {
        let names = fs::read_dir(dir).unwrap().map(|entry| entry.unwrap().file_name().into_string().unwrap());
        assert!(!names.into_iter().any(|name| name.ends_with(".new")), "{}", dir.display());
    }
}

#[test]
fn the_program_that_is_installed_is_replaced_at_once() {
    let place = Place::new(fresh());
    // Nothing can be written: a step that fails leaves the earlier program as it is.
    fs::create_dir_all(place.installed().parent().unwrap()).unwrap();
    fs::write(place.installed(), "old").unwrap();
    let new = place.installed().with_file_name(format!(".{}.new", crate::config::NAME));
    fs::create_dir_all(new.join("program/taken")).unwrap();
    let output = place.make(&["install"]);
    assert!(!output.status.success());
    assert_eq!(fs::read(place.installed()).unwrap(), b"old");
}

#[test]
fn a_build_without_a_static_library_says_what_to_install() {
    let place = Place::new(fresh());
    let compiler = place.dir.path().join("cc");
    // This is what gcc prints if it does not find the file.
    fs::write(&compiler, "#!/bin/sh\necho libc.a\n").unwrap();
    fs::set_permissions(&compiler, std::os::unix::fs::PermissionsExt::from_mode(0o755)).unwrap();
    let cc = |path: &Path| place.make(&["build", &format!("CC={}", path.display())]);
    let output = cc(&compiler);
    assert!(
        said(&output).contains("libc6-dev") && said(&output).contains("glibc-static"),
        "{}",
        said(&output)
    );
    let output = cc(Path::new("/no/such/cc"));
    assert!(said(&output).contains("there is no C compiler"), "{}", said(&output));
}
