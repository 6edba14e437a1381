//! Upgrades, with containers running and clients at work.

use std::fs;
use std::io::{BufRead, BufReader};
use std::os::unix::fs::MetadataExt;
use std::path::Path;
use std::process::{Child, Command, Stdio};

use crate::common::leaks::STATE_DIRECTORY;
use crate::common::node::{NAMESPACE, Node};
use crate::common::spec::Spec;
use crate::common::stdio::{Fifos, feed};
use crate::common::systemd::{self, DAEMON_SERVICE, DAEMON_SOCKET};
use crate::common::task::SIGTERM;
use crate::common::{daemon, wait};
use crate::package::{NAME, NEW, PREVIOUS, Package};

const CHAOS: &str = "/usr/local/lib/testbed/chaos";

/// The clients of the chaos test, without its disturbances. They fail if a call gets no response, an exit code is
/// wrong, a byte is missing or comes twice, or an event is out of order.
struct Clients(Child);

impl Clients {
    fn begin(seconds: u32) -> Clients {
        let mut command = Command::new(CHAOS);
        command.args(["--disturb", "none", "--leaks", "no", "--seconds", &seconds.to_string()]);
        Clients(command.stdout(Stdio::piped()).spawn().expect("start the clients"))
    }

    /// Waits until the clients are done. Returns their output if something was lost.
    fn end(mut self) -> Result<(), String> {
        let output = BufReader::new(self.0.stdout.take().expect("a pipe"));
        let text: Vec<String> = output.lines().map_while(Result::ok).collect();
        let status = self.0.wait().expect("wait for the clients");
        if status.success() { Ok(()) } else { Err(text.join("\n")) }
    }
}

impl Drop for Clients {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// Whether the daemon's program is the one that is installed now.
fn is_new(pid: u32) -> bool {
    let inode = |path: &Path| fs::metadata(path).map(|found| (found.dev(), found.ino())).ok();
    let running = inode(Path::new(&format!("/proc/{pid}/exe")));
    running.is_some() && running == inode(&Path::new("/usr/bin").join(NAME))
}

/// The number of tasks that have a record now.
fn tasks() -> usize {
    let tasks = fs::read_dir(format!("{STATE_DIRECTORY}/{NAMESPACE}"));
    tasks.map_or(0, Iterator::count)
}

#[test]
fn an_upgrade_from_the_previous_version_under_load_loses_nothing() {
    let package = Package::installed(PREVIOUS);
    let node = Node::exclusive();
    let fifos = Fifos::new("upgraded");
    let (mut stdout, _stderr) = (fifos.stdout(), fifos.stderr());
    let script = "trap 'seq 1 1000; exit 29' TERM; echo before; sleep 100000 & wait";
    let container = node.container("upgraded", Spec::sh(script)).started(&fifos.output());
    stdout.until(|bytes| bytes == b"before\n");
    let exec = container.exec_sh("trap 'exit 31' TERM; sleep 100000 & wait");
    let (pid, waiting, exec_waiting) = (container.pid(), container.waiting(), exec.waiting());
    let old = systemd::main_pid(DAEMON_SERVICE);

    let clients = Clients::begin(15);
    wait::until_true("clients are at work", || tasks() > 3);
    package.install(NEW);
    let new = daemon::wait_for_another(old);
    assert!(is_new(new), "the daemon is not the program of the package");
    if let Err(lost) = clients.end() {
        panic!("the upgrade lost something:\n{lost}");
    }

    assert_eq!(systemd::main_pid(DAEMON_SERVICE), new, "the upgrade is one restart");
    let wanted = systemd::property("containerd.service", "Wants");
    assert!(wanted.contains(DAEMON_SOCKET), "a start of containerd starts the socket: {wanted}");
    assert_eq!(container.pid(), pid);
    exec.kill(SIGTERM).expect("kill an exec of the previous version");
    assert_eq!(exec_waiting.exit().expect("a Wait that began before the upgrade").status, 31);
    exec.delete().expect("delete an exec of the previous version");
    container.kill(SIGTERM).expect("kill a container of the previous version");
    assert_eq!(waiting.exit().expect("a Wait that began before the upgrade").status, 29);
    let lines: String = (1..=1000).map(|number| format!("{number}\n")).collect();
    assert_eq!(stdout.text(), lines);
    container.delete().expect("delete a container of the previous version");
    wait::until_true("no record is left", || tasks() == 0);
    wait::until_true("no unit is left", || {
        systemd::list_units("containerd-default-*").iter().all(|unit| unit.contains(".slice "))
    });
}

#[test]
fn a_terminal_of_the_previous_version_is_used_after_the_upgrade() {
    let package = Package::installed(PREVIOUS);
    let node = Node::exclusive();
    let fifos = Fifos::new("terminal");
    let mut output = fifos.stdout();
    let stdin = fifos.open_stdin();
    let spec = Spec::sh("echo before; read line; echo \"got $line\"; exit 3").terminal();
    let container = node.container("terminal", spec).started(&fifos.terminal());
    let stdin = stdin.file();
    output.until(|bytes| bytes.ends_with(b"before\r\n"));
    package.install(NEW);
    feed(&stdin, b"after\n");
    output.until(|bytes| bytes.ends_with(b"got after\r\n"));
    assert_eq!(container.exit_status(), 3);
    container.delete().expect("delete");
}
