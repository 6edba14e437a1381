//! The options of a checkpoint that criu needs for what a container holds, and OCI runtimes other than runc.

use std::os::unix::net::UnixDatagram;

use containerd_client::tonic::Code;

use crate::common::checkpoint::{self, COUNTING, last, options};
use crate::common::leaks::{self, Traces};
use crate::common::node::Node;
use crate::common::spec::Spec;
use crate::common::stdio::{Fifos, Scratch};
use crate::common::task::{Io, SIGTERM};
use crate::common::{systemd, wait};
use crate::runtime_options::runc_options;

/// Holds a lock, a TCP connection with traffic, and a Unix socket whose other end is on the host.
const HOLDING: &str = r#"
    exec 9>lock; flock 9
    nc -l -p 20123 -e cat &
    until (while :; do echo x; sleep 0.2; done) | nc 127.0.0.1 20123 >>echoed; do :; done 2>/dev/null &
    perl -MIO::Socket::UNIX -e '
        socket(my $socket, AF_UNIX, SOCK_DGRAM, 0);
        connect($socket, pack_sockaddr_un("$ENV{PWD}/socket")) or die $!;
        while (1) { send($socket, "x", 0); select(undef, undef, undef, 0.2) }' &
    until [ -s echoed ]; do sleep 0.1; done
"#;

/// A spec whose container has programs of the host, and a directory of the host at the same path.
fn holding(shared: &Scratch) -> Spec {
    // criu sees the other end of a Unix socket only if it is in the same network namespace.
    Spec::sh(&format!("cd {}; {HOLDING}{COUNTING}", shared.as_str()))
        .in_host_namespace("network")
        .bind("/usr", "/usr", &["ro"])
        .bind("/usr/lib", "/lib", &["ro"])
        .bind("/usr/lib64", "/lib64", &["ro"])
        // criu connects the Unix socket again by its path on the host.
        .bind(shared.as_str(), shared.as_str(), &["rw"])
}

/// Waits until a new datagram arrives at the socket.
fn receives(socket: &UnixDatagram) {
    let drain = || while socket.recv(&mut [0; 8]).is_ok() {};
    drain();
    wait::until_true("the socket receives", || socket.recv(&mut [0; 8]).is_ok());
}

#[test]
fn locks_connections_and_sockets_are_restored_if_the_options_say_so() {
    needs!(OurShim, Criu);
    let node = Node::exclusive();
    let events = node.subscribe();
    drop(node.container("warm", Spec::sleeping()).started(&Io::default()));
    let before = Traces::take();
    let shared = Scratch::new("held");
    let socket = UnixDatagram::bind(shared.join("socket")).expect("bind a socket");
    socket.set_nonblocking(true).expect("set the socket");
    let fifos = Fifos::new("terminal");
    let mut stdout = fifos.stdout();
    let original = node.container("held", holding(&shared).terminal()).started(&fifos.terminal());
    stdout.until(|bytes| bytes.ends_with(b"3\r\n"));
    receives(&socket);
    let waiting = original.waiting();
    let images = original.checkpoint(options(|options| {
        options.exit = true;
        options.terminal = true;
        options.open_tcp = true;
        options.external_unix_sockets = true;
        options.file_locks = true;
        options.work_path = shared.text("work");
    }));
    let images = images.expect("without one of these options, criu refuses");
    assert_eq!(waiting.exit().expect("wait").status, 137);
    assert_eq!(events.names_up_to(&original, "exit"), ["create", "start", "exit"]);
    assert!(shared.join("work/dump.log").exists(), "a work directory of the client is kept");
    original.delete().expect("delete");

    std::fs::write(shared.join("echoed"), "").expect("empty the file");
    let fifos = Fifos::new("restored");
    let mut stdout = fifos.stdout();
    let copy = node.container("copy", holding(&shared).terminal()).make();
    copy.create_from(&images, &fifos.terminal()).expect("create");
    copy.start().expect("restore");
    assert!(last(&stdout.until(|bytes| bytes.ends_with(b"\n"))) >= 3);
    wait::until_true("the connection carries data", || !shared.read("echoed").is_empty());
    receives(&socket);
    let lock = std::fs::File::options().write(true).open(shared.join("lock")).expect("open the file");
    assert!(lock.try_lock().is_err(), "the restored process has the lock");
    copy.kill(SIGTERM).expect("kill");
    assert_eq!(copy.exit_status(), 7);
    copy.delete().expect("delete");
    drop((copy, original, fifos, stdout));
    checkpoint::remove_unpacked();
    leaks::assert_none("a checkpoint and its restore", &before);
}

/// Without this library, crun can't make checkpoints.
fn has_libcriu() -> bool {
    let dirs = std::fs::read_dir("/usr/lib").expect("/usr/lib").flatten().map(|entry| entry.path());
    dirs.chain(["/usr/lib".into()]).any(|dir| dir.join("libcriu.so.2").exists())
}

#[test]
fn crun_makes_checkpoints_or_says_that_it_can_not() {
    needs!(OurShim, Criu, Crun);
    let node = Node::exclusive();
    let crun = || runc_options(|options| options.binary_name = "crun".to_string());
    let fifos = Fifos::new("crun");
    let (mut stdout, _stderr) = (fifos.stdout(), fifos.stderr());
    let original = node.container("crun", Spec::sh(COUNTING)).options(crun()).started(&fifos.io());
    stdout.until(|bytes| bytes.ends_with(b"3\n"));
    let taken = original.checkpoint(options(|options| {
        options.exit = true;
        options.empty_namespaces.push("network".to_string());
    }));
    if !has_libcriu() {
        let refused = taken.err().expect("crun has no libcriu");
        assert_eq!(refused.code(), Code::FailedPrecondition, "{refused}");
        assert!(refused.message().contains("libcriu"), "{refused}");
        return;
    }
    let images = taken.expect("checkpoint");
    assert_eq!(original.exit_status(), 137);
    original.delete().expect("delete");
    let fifos = Fifos::new("restored");
    let (mut stdout, _stderr) = (fifos.stdout(), fifos.stderr());
    let copy = node.container("copy", Spec::sh(COUNTING)).options(crun()).make();
    copy.create_from(&images, &fifos.io()).expect("create");
    let pid = copy.start().expect("restore");
    assert_eq!(systemd::main_pid(&systemd::unit_of(&copy)), pid);
    assert!(last(&stdout.until(|bytes| bytes.ends_with(b"\n"))) >= 3);
    copy.kill(SIGTERM).expect("kill");
    assert_eq!(copy.exit_status(), 7);
    checkpoint::remove_unpacked();
}
