//! A container that may tell systemd of itself: what it says is in `systemctl status`.

use prost_types::Any;

use crate::common::container::Container;
use crate::common::node::Node;
use crate::common::spec::Spec;
use crate::common::stdio::Fifos;
use crate::common::task::Io;
use crate::common::{systemd, wait};
use crate::options::GenericOptions;

const NOTIFY: &str = "io.containerd.systemd.notify";
/// The image has no program that could; the host's sees the container's socket at the same path.
const HOST: &str = "chroot /host systemd-notify";

fn spec(script: &str) -> Spec {
    Spec::sh(script).bind("/", "/host", &["rslave"]).annotation(NOTIFY, "true")
}

/// The administrator's leave.
const ALLOWED: &str = "Notify = true\n";

fn options(body: &str) -> Any {
    GenericOptions { config_body: body.to_string(), ..Default::default() }.to_any()
}

fn property(container: &Container, name: &str) -> String {
    systemd::property(&systemd::unit_of(container), name)
}

#[test]
fn what_a_container_says_is_its_units_status() {
    needs!(OurShim);
    let node = Node::shared();
    let script = format!("{HOST} --ready --status='3 clients'; sleep 100000");
    let container = node.container("status", spec(&script)).options(options(ALLOWED)).started(&Io::default());
    wait::until_true("its status", || property(&container, "StatusText") == "3 clients");
    assert_eq!(property(&container, "ActiveState"), "active");
}

#[test]
fn one_that_is_not_asked_has_no_socket() {
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
fn the_watchdog_ends_one_that_falls_silent() {
    needs!(OurShim);
    let node = Node::shared();
    // Three signs of life, each well within the time, and then none.
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
fn another_word_than_yes_or_no_is_refused() {
    needs!(OurShim);
    let node = Node::shared();
    let container = node.container("word", Spec::sleeping().annotation(NOTIFY, "maybe")).make();
    let error = container.create(&Io::default()).expect_err("neither yes nor no");
    assert!(error.message().contains(NOTIFY) && error.message().contains("maybe"), "{error}");
}
