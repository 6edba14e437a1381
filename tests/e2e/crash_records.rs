//! Records on disk: one that this version can't read is left alone and harms no other.

use std::fs;
use std::path::PathBuf;

use crate::common::daemon;
use crate::common::leaks::STATE_DIRECTORY;
use crate::common::node::{NAMESPACE, Node, unique};
use crate::common::spec::Spec;
use crate::common::systemd::{Cursor, DAEMON_SERVICE};
use crate::common::task::{Io, SIGKILL};
use crate::common::wait;

/// A record that the daemon has not written, gone on drop.
struct Foreign {
    directory: PathBuf,
    text: String,
}

impl Foreign {
    fn new(text: &str) -> Foreign {
        let directory = PathBuf::from(STATE_DIRECTORY).join(NAMESPACE).join(unique("foreign"));
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
        // A test that is hindered by it would name it.
        let _ = fs::remove_dir_all(&self.directory);
    }
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
