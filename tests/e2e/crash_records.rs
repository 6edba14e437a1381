//! Records on disk: the daemon leaves a record that it can't read unchanged, and such a record affects no other task.

use std::fs;
use std::path::{Path, PathBuf};

use containerd_client::types::v1::Status;
use serde_json::Value;

use crate::attached::{self, Client};
use crate::common::container::Container;
use crate::common::daemon;
use crate::common::leaks::task_directory;
use crate::common::node::{Node, unique};
use crate::common::spec::Spec;
use crate::common::systemd::{Cursor, DAEMON_SERVICE};
use crate::common::task::{Io, SIGKILL};
use crate::common::wait;

/// A record that the daemon did not write. It is removed on drop.
struct Foreign {
    directory: PathBuf,
    text: String,
}

impl Foreign {
    fn new(text: &str) -> Foreign {
        let directory = task_directory(&unique("foreign"));
        fs::create_dir_all(&directory).expect("make a directory for a record");
        let foreign = Foreign { directory, text: text.to_string() };
        fs::write(foreign.path(), text).expect("write a record");
        foreign
    }

    fn path(&self) -> PathBuf {
        self.directory.join("record.json")
    }
}

impl Drop for Foreign {
    fn drop(&mut self) {
        // If the removal fails, the next test that needs the directory fails.
        let _ = fs::remove_dir_all(&self.directory);
    }
}

/// The record of a container in the form of the previous version: all execs in one file, and no limit.
fn as_version_1(container: &Container, owed: usize) {
    let directory = task_directory(&container.id);
    let read = |path: &Path| -> Value {
        serde_json::from_str(&fs::read_to_string(path).expect("read a record")).expect("a record is JSON")
    };
    let path = directory.join("record.json");
    let mut record = read(&path);
    record["version"] = 1.into();
    record["task"]["execs"] = serde_json::json!({});
    for exec in fs::read_dir(directory.join("execs")).expect("list the execs") {
        let exec = exec.expect("an exec");
        let id = exec.file_name().into_string().expect("an id is text");
        let own = exec.path().join("record.json");
        record["task"]["execs"][&id] = read(&own)["exec"].clone();
        fs::remove_file(&own).expect("remove the exec's own record");
        let _ = fs::remove_file(exec.path().join("record.json.new"));
    }
    let outbox = &mut record["task"]["outbox"];
    let next = outbox["next"].as_u64().expect("the next number of an event");
    let events = (0..owed as u64)
        .map(|number| serde_json::json!({"seq": next + number, "at_usec": 7, "event": "out_of_memory"}));
    outbox["owed"] = events.collect::<Vec<_>>().into();
    outbox["next"] = (next + owed as u64).into();
    fs::write(&path, record.to_string()).expect("write a record of the previous version");
}

#[test]
fn records_of_the_previous_version_are_read_however_large_they_are() {
    needs!(OurShim);
    let node = Node::exclusive();
    let container = node.container("before", Spec::sleeping()).started(&Io::default());
    let (running, ended) =
        (container.exec(Spec::sleeping()).started(&Io::default()), container.exec_sh("exit 4"));
    assert_eq!(ended.exit_status(), 4);
    // More events than the previous version could read itself.
    let down = daemon::Down::begin();
    as_version_1(&container, 100_000);
    let path = task_directory(&container.id).join("record.json");
    assert!(fs::metadata(&path).expect("stat of the record").len() > 4 << 20);
    down.end();
    for _ in 0..2 {
        assert_eq!(ended.exit_status(), 4);
        assert_eq!(running.phase(), Status::Running);
        assert_eq!(container.exec_sh("exit 5").exit_status(), 5);
        daemon::killed();
    }
    running.kill(SIGKILL).expect("kill the exec");
    assert_eq!(running.exit_status(), 137);
    container.kill(SIGKILL).expect("kill the init process");
    assert_eq!(container.exit_status(), 137);
    container.delete().expect("delete");
}

#[test]
fn execs_that_nobody_deletes_keep_the_record_small_and_survive_a_restart() {
    needs!(OurShim);
    let node = Node::exclusive();
    let container = node.container("heap", Spec::sleeping()).started(&Io::default());
    let execs: Vec<_> = (0..50).map(|_| container.exec_sh("exit 3")).collect();
    assert!(execs.iter().all(|exec| exec.exit_status() == 3));
    let path = task_directory(&container.id).join("record.json");
    let length = || fs::metadata(&path).expect("stat of the record").len();
    wait::until_true("the record is as small as without execs", || length() <= 8192);
    daemon::killed();
    assert!(execs.iter().all(|exec| exec.exit_status() == 3));
    assert!(length() <= 8192, "{}", length());
    container.kill(SIGKILL).expect("kill the init process");
    assert_eq!(container.exit_status(), 137);
    container.delete().expect("delete");
}

#[test]
fn a_record_that_cant_be_read_is_named_left_alone_and_hides_no_other() {
    needs!(OurShim);
    let node = Node::exclusive();
    let container = node.container("beside", Spec::sleeping()).started(&Io::default());
    let pid = container.pid();
    let newer = Foreign::new(r#"{"version": 4000, "task": {"of": "another kind"}}"#);
    let broken = Foreign::new(r#"{"version": 1, "ta"#);
    let before = Cursor::now();
    daemon::killed();
    assert_eq!(container.pid(), pid);

    let unit = format!("_SYSTEMD_UNIT={DAEMON_SERVICE}");
    for (foreign, word) in [(&newer, "4000"), (&broken, "record")] {
        let path = foreign.path().to_string_lossy().into_owned();
        wait::until_true("the log names the record", || {
            let entries = before.entries_since(&[&unit]);
            let lines = entries.iter().filter_map(|entry| entry["MESSAGE"].as_str());
            lines.into_iter().any(|line| line.contains(&path) && line.contains(word))
        });
        assert_eq!(fs::read_to_string(foreign.path()).expect("the record is there"), foreign.text);
    }
    assert_eq!(container.exec_sh("exit 6").exit_status(), 6);
    container.kill(SIGKILL).expect("kill");
    assert_eq!(container.exit_status(), 137);
    container.delete().expect("delete");
    let new = node.container("new", Spec::sh("exit 7")).started(&Io::default());
    assert_eq!(new.exit_status(), 7);
}

/// The record of a newer version, or one that has crashed daemons. Without its terminal, a process would get SIGHUP.
#[test]
fn the_terminals_of_processes_whose_record_cant_be_read_wait_for_a_daemon_that_can_read_it() {
    needs!(OurShim);
    let node = Node::exclusive();
    let echo = || Spec::sh("while read line; do echo got $line; done").terminal();
    let (container, mut client) =
        Client::attached(echo(), |spec, io| node.container("unread", spec).started(io));
    let (exec, mut exec_client) = attached::exec(&container, echo());
    let directory = task_directory(&container.id);
    let of_exec = directory.join("execs").join(&exec.exec).join("record.json");
    for (turn, path) in [of_exec, directory.join("record.json")].into_iter().enumerate() {
        let text = fs::read_to_string(&path).expect("read a record");
        let mut record: Value = serde_json::from_str(&text).expect("a record is JSON");
        record["version"] = 4000.into();
        fs::write(&path, record.to_string()).expect("write a record");
        daemon::killed();
        if turn == 0 {
            // An exec with this id would remove the record.
            let again = container.exec(Spec::sh("true")).id(&exec.exec).add(&Io::default()).map(drop);
            assert!(again.is_err_and(|error| error.message().contains("4000")));
        }
        fs::write(&path, text).expect("write the record as it was");
        daemon::killed();
        for client in [&mut client, &mut exec_client] {
            client.enter(&format!("{turn}\n"));
            client.until(&format!("got {turn}\r\n"));
        }
    }
    assert_eq!((container.phase(), exec.phase()), (Status::Running, Status::Running));
    container.kill(SIGKILL).expect("kill");
    assert_eq!(container.exit_status(), 137);
}
