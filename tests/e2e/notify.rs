//! A container that may notify systemd: its status is in `systemctl status`.

use std::fs;
use std::io::{IoSlice, Write};
use std::net::{TcpListener, TcpStream};
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::net::UnixDatagram;
use std::path::Path;
use std::time::{Duration, Instant};

use nix::sys::signal::Signal;
use nix::sys::socket::{ControlMessage, MsgFlags, sendmsg, setsockopt, sockopt};
use prost_types::Any;

use crate::common::bystander::Bystander;
use crate::common::container::Container;
use crate::common::node::{Node, unique};
use crate::common::spec::Spec;
use crate::common::stdio::{Fifos, feed};
use crate::common::task::{Io, SIGKILL};
use crate::common::{daemon, leaks, process, systemd, wait};
use crate::runtime_options::GenericOptions;

const NOTIFY: &str = "io.containerd.systemd.notify";
/// The image has no program that can notify. The program of the host finds the container's socket at the same path.
const HOST: &str = "chroot /host systemd-notify";

fn spec(script: &str) -> Spec {
    Spec::sh(script).bind("/", "/host", &["rslave"]).annotation(NOTIFY, "true")
}

/// The option with which the administrator allows notifications.
const ALLOWED: &str = "Notify = true\n";

fn options(body: &str) -> Any {
    GenericOptions { config_body: body.to_string(), ..Default::default() }.to_any()
}

fn property(container: &Container, name: &str) -> String {
    systemd::property(&systemd::unit_of(container), name)
}

#[test]
fn a_status_notification_of_a_container_is_the_status_of_its_unit() {
    needs!(OurShim);
    let node = Node::shared();
    let script = format!("{HOST} --ready --status='3 clients'; sleep 100000");
    let container = node.container("status", spec(&script)).options(options(ALLOWED)).started(&Io::default());
    wait::until_true("its status", || property(&container, "StatusText") == "3 clients");
    assert_eq!(property(&container, "ActiveState"), "active");
}

#[test]
fn a_container_without_the_annotation_has_no_notify_socket() {
    needs!(OurShim);
    let node = Node::shared();
    let shows = || Spec::sh("echo \"=$NOTIFY_SOCKET\"");
    for (spec, option, socket) in [
        (shows(), "", "=\n"),
        (shows().annotation(NOTIFY, "true"), "", "=\n"),
        (shows().annotation(NOTIFY, "false"), ALLOWED, "=\n"),
        (shows().annotation(NOTIFY, "true"), ALLOWED, "=/run/systemd/notify\n"),
        (shows(), ALLOWED, "=/run/systemd/notify\n"),
    ] {
        let fifos = Fifos::new("socket");
        let (mut stdout, _stderr) = (fifos.stdout(), fifos.stderr());
        let container = node.container("socket", spec).options(options(option)).started(&fifos.output());
        assert_eq!(container.exit_status(), 0);
        assert_eq!(stdout.text(), socket);
    }
}

#[test]
fn the_watchdog_ends_a_container_that_stops_notifying() {
    needs!(OurShim);
    let node = Node::shared();
    // The container sends three signs of life in time, and then none.
    let pings =
        "echo $WATCHDOG_USEC; for i in 1 2 3; do chroot /host systemd-notify WATCHDOG=1; sleep 1; done";
    let spec = spec(&format!("{pings}; exec sleep 100000")).in_host_namespace("pid");
    let body = format!("{ALLOWED}[Properties]\nWatchdogSec = \"2\"\n");
    let fifos = Fifos::new("watchdog");
    let (mut stdout, _stderr) = (fifos.stdout(), fifos.stderr());
    let container = node.container("watchdog", spec).options(options(&body)).started(&fifos.output());
    assert_eq!(container.exit_status(), 128 + 6, "SIGABRT");
    assert_eq!(property(&container, "Result"), "watchdog");
    assert_eq!(stdout.text(), "2000000\n");
}

#[test]
fn an_annotation_other_than_true_or_false_is_refused() {
    needs!(OurShim);
    let node = Node::shared();
    let container = node.container("word", Spec::sleeping().annotation(NOTIFY, "maybe")).make();
    let error = container.create(&Io::default()).expect_err("neither yes nor no");
    assert!(error.message().contains(NOTIFY) && error.message().contains("maybe"), "{error}");
}

/// A container with the host's programs and a rootfs of its own. It sends its notifications to its own socket.
fn with_programs(script: &str) -> Spec {
    with_programs_of_the_host(Spec::sh(script).annotation(NOTIFY, "true"))
}

fn with_programs_of_the_host(spec: Spec) -> Spec {
    [("/usr", "/usr"), ("/usr/lib", "/lib"), ("/usr/lib64", "/lib64")]
        .into_iter()
        .fold(spec, |spec, (host, container)| spec.bind(host, container, &["rslave", "ro"]))
}

/// A service of the host that no container may harm; removed on drop.
struct Victim(String);

impl Victim {
    fn start() -> Victim {
        let unit = format!("{}.service", unique("victim"));
        process::succeed("systemd-run", &["--unit", &unit, "sleep", "100000"]);
        Victim(unit)
    }
}

impl Drop for Victim {
    fn drop(&mut self) {
        let _ = process::run("systemctl", &["stop", &self.0]);
    }
}

#[test]
fn a_container_can_notify_only_for_its_own_unit() {
    needs!(OurShim);
    let node = Node::shared();
    let victim = Victim::start();
    let pid = systemd::main_pid(&victim.0);
    // Each notification waits until the daemon has read it (BARRIER=1).
    let script = format!(
        "cd /usr/bin; ./systemd-notify MAINPID={pid}; ./systemd-notify WATCHDOG=trigger STATUS=attacked; \
         ./systemd-notify --status='still here'; sleep 100000"
    );
    let container =
        node.container("own", with_programs(&script)).options(options(ALLOWED)).started(&Io::default());
    wait::until_true("its status", || property(&container, "StatusText") == "still here");
    assert_eq!(systemd::main_pid(&systemd::unit_of(&container)), container.pid());
    assert_eq!(property(&container, "ActiveState"), "active");
    assert_eq!(systemd::main_pid(&victim.0), pid, "the victim lives");
}

/// Case: the socket of systemd is in the container, and root in an exec, which is the main process of a unit, names a process
/// of the host as its main process.
#[test]
fn an_exec_can_not_name_another_main_process() {
    needs!(OurShim, NotifyAccessOverride);
    let node = Node::shared();
    let victim = Victim::start();
    let pid = systemd::main_pid(&victim.0);
    let spec = with_programs_of_the_host(Spec::sleeping()).bind("/run/systemd/notify", "/notify", &["rw"]);
    let container = node.container("named", spec).started(&Io::default());
    let program = format!(
        "use Socket; socket(S, AF_UNIX, SOCK_DGRAM, 0) or die; \
         send(S, \"MAINPID={pid}\\nWATCHDOG=trigger\", 0, pack_sockaddr_un('/notify')) or die; sleep 100000"
    );
    let exec = container.exec(Spec::new(&["/usr/bin/perl", "-e", &program])).started(&Io::default());
    let unit = systemd::unit_of_exec(&container, &exec);
    // `sleep` is the last thing that it calls.
    wait::until_true("the notification is sent", || {
        fs::read_to_string(format!("/proc/{}/wchan", exec.pid())).is_ok_and(|wait| wait.contains("nanosleep"))
    });
    // systemd reads notifications before this call: its priority for them is higher.
    assert_eq!(systemd::main_pid(&unit), exec.pid());
    assert_eq!(systemd::main_pid(&victim.0), pid, "the victim lives");
    exec.kill(SIGKILL).expect("kill");
    assert_eq!(exec.exit_status(), 128 + 9);
    exec.delete().expect("delete");
}

#[test]
fn a_notification_reaches_the_next_daemon() {
    needs!(OurShim);
    let node = Node::exclusive();
    let script = "while read word; do /usr/bin/systemd-notify --status=$word; done";
    let fifos = Fifos::new("heard");
    let (_stdout, _stderr, stdin) = (fifos.stdout(), fifos.stderr(), fifos.open_stdin());
    let container =
        node.container("heard", with_programs(script)).options(options(ALLOWED)).started(&fifos.io());
    let stdin = stdin.file();
    for word in ["one", "two", "three"] {
        feed(&stdin, format!("{word}\n").as_bytes());
        wait::until_true(word, || property(&container, "StatusText") == word);
        daemon::killed();
    }
}

#[test]
fn a_flood_of_notifications_delays_no_other_container() {
    needs!(OurShim);
    let node = Node::shared();
    let flood = "while :; do for i in 1 2 3 4 5 6 7 8; do /usr/bin/systemd-notify --no-block --status=$i & done; wait; done";
    let _flood =
        node.container("flood", with_programs(flood)).options(options(ALLOWED)).started(&Io::default());
    let script = "/usr/bin/systemd-notify --status=heard; sleep 100000";
    let container =
        node.container("calm", with_programs(script)).options(options(ALLOWED)).started(&Io::default());
    wait::until_true("its status", || property(&container, "StatusText") == "heard");
}

#[test]
fn a_stop_is_extended_no_further_than_the_administrator_allows() {
    needs!(OurShim);
    let node = Node::shared();
    let script = "trap '' TERM; while :; do /usr/bin/systemd-notify EXTEND_TIMEOUT_USEC=60000000 STATUS=x; sleep 0.2; done";
    let body = format!("{ALLOWED}[Properties]\nTimeoutStopSec = \"2\"\n");
    let container =
        node.container("extend", with_programs(script)).options(options(&body)).started(&Io::default());
    wait::until_true("its status", || property(&container, "StatusText") == "x");
    let begun = Instant::now();
    process::succeed("systemctl", &["stop", &systemd::unit_of(&container)]);
    assert!(begun.elapsed() < Duration::from_secs(8), "the stop took {:?}", begun.elapsed());
    assert_eq!(container.exit_status(), 128 + 9, "SIGKILL");
}

/// A bystander on a node on which a container could notify before: the first notify socket makes a directory that stays.
fn bystander(node: &Node) -> Bystander<'_> {
    node.container("first", Spec::sleeping()).options(options(ALLOWED)).started(&Io::default()).end();
    Bystander::new(node)
}

/// A TCP socket whose close waits for an hour, or until the second value is dropped: it has sent more than the other side reads.
fn lingering() -> (OwnedFd, TcpStream) {
    let listener = TcpListener::bind("127.0.0.1:0").expect("listen");
    let mut socket = TcpStream::connect(listener.local_addr().expect("an address")).expect("connect");
    let (other, _) = listener.accept().expect("accept");
    let hour = nix::libc::linger { l_onoff: 1, l_linger: 3600 };
    setsockopt(&socket, sockopt::Linger, &hour).expect("set SO_LINGER");
    socket.set_nonblocking(true).expect("write without waiting");
    while socket.write(&[0; 65536]).is_ok() {}
    socket.set_nonblocking(false).expect("close with waiting");
    (socket.into(), other)
}

/// Sends such a socket to the notify socket of a container. Returns the other side of its connection.
fn send_lingering(path: &Path) -> TcpStream {
    let sender = UnixDatagram::unbound().expect("a socket");
    sender.connect(path).unwrap_or_else(|error| panic!("{}: {error}", path.display()));
    let (socket, other) = lingering();
    let fds = [socket.as_raw_fd()];
    let rights = [ControlMessage::ScmRights(&fds)];
    let text = [IoSlice::new(b"STATUS=x")];
    sendmsg::<()>(sender.as_raw_fd(), &text, &rights, MsgFlags::empty(), None).expect("send");
    other
}

#[test]
fn a_descriptor_whose_close_waits_delays_no_other_container() {
    needs!(OurShim);
    let node = Node::exclusive();
    let bystander = bystander(&node);
    let start =
        || node.container("linger", Spec::sleeping()).options(options(ALLOWED)).started(&Io::default());
    let containers: Vec<_> = (0..4).map(|_| start()).collect();
    let serving = wait::until("the daemon serves", daemon::serving);
    // Meanwhile, the copies of this process are closed: the daemon gets the last ones.
    daemon::signal(serving, Signal::SIGSTOP);
    let sockets = fs::read_dir(format!("{}/.notify", leaks::STATE_DIRECTORY)).expect("the notify sockets");
    let others: Vec<_> = sockets.map(|socket| send_lingering(&socket.expect("a socket").path())).collect();
    daemon::signal(serving, Signal::SIGCONT);
    assert_eq!(others.len(), containers.len());
    bystander.assert_untouched("while four threads wait");
    let script = "/usr/bin/systemd-notify --status=heard; sleep 100000";
    let container =
        node.container("calm", with_programs(script)).options(options(ALLOWED)).started(&Io::default());
    wait::until_true("its status", || property(&container, "StatusText") == "heard");
    container.end();
    drop(container);
    containers.iter().for_each(|container| container.end());
    drop((containers, others));
    bystander.assert_all_untouched("sockets that linger");
}

#[test]
fn a_deleted_container_leaves_no_socket_in_the_descriptor_store() {
    needs!(OurShim);
    let node = Node::exclusive();
    let bystander = bystander(&node);
    for _ in 0..3 {
        node.container("gone", Spec::sleeping()).options(options(ALLOWED)).started(&Io::default()).end();
    }
    bystander.assert_all_untouched("containers that could notify");
}
