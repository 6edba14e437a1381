//! Quotas of the kernel that root's processes share, those in other containers too: what the daemon keeps uses up none of
//! them.

use std::io::IoSlice;
use std::os::fd::{AsRawFd, RawFd};
use std::os::unix::net::UnixDatagram;

use nix::errno::Errno;
use nix::fcntl::{FcntlArg, fcntl};
use nix::sys::resource::{Resource, getrlimit, setrlimit};
use nix::sys::socket::{ControlMessage, MsgFlags, sendmsg};
use serde_json::json;

use crate::attached::{self, Client};
use crate::common::container::Container;
use crate::common::exec::Exec;
use crate::common::node::Node;
use crate::common::spec::Spec;
use crate::common::stdio::Fifos;
use crate::common::task::Io;
use crate::log_modes::{fill_queue_of_journald, freeze_journald};

/// The size of a new pipe (pipe(7)).
const PIPE_SIZE: i32 = 64 << 10;

/// How many processes with streams are enough to use up what root may have: the memory of 64 pipes of 1 MiB
/// (`fs.pipe-user-pages-soft`), 1,024 descriptors in sockets.
const MANY: usize = 70;

/// What root in an ordinary container finds.
#[derive(Debug)]
struct Found {
    /// The number of root's descriptors that are in the queues of sockets.
    queued: u64,
    /// The size of a new pipe.
    pipe_size: i32,
}

impl Found {
    /// Runs [`as_root_in_a_container`] in a container of its own.
    fn now(node: &Node) -> Found {
        let program = std::env::current_exe().expect("the path of this program");
        let program = program.to_str().expect("a path that is text");
        let spec =
            Spec::new(&[program, "--exact", "--ignored", "--nocapture", "quotas::as_root_in_a_container"])
                .with("/process/rlimits", json!([{"type": "RLIMIT_NOFILE", "soft": 1024, "hard": MOST}]));
        let spec = [("/usr", "/usr"), ("/usr/lib", "/lib"), ("/usr/lib64", "/lib64")]
            .into_iter()
            .fold(spec, |spec, (host, container)| spec.bind(host, container, &["rslave", "ro"]));
        let fifos = Fifos::new("quotas");
        let (mut stdout, mut stderr) = (fifos.stdout(), fifos.stderr());
        let container = node.container("quotas", spec).started(&fifos.output());
        let (text, errors) = (stdout.text(), stderr.text());
        assert_eq!(container.exit_status(), 0, "{text}{errors}");
        container.delete().expect("delete");
        let mut numbers = text.lines().find_map(|line| line.strip_prefix(FOUND)).expect(&text).split(' ');
        let mut next = || numbers.next().expect("two numbers").parse().expect("a number");
        Found { queued: next(), pipe_size: i32::try_from(next()).expect("a size") }
    }
}

/// The beginning of the line that [`as_root_in_a_container`] writes.
const FOUND: &str = "found: ";

/// More descriptors than root has in the queues of sockets.
const MOST: u64 = 8192;

#[test]
#[ignore = "other tests run it in a container"]
fn as_root_in_a_container() {
    // The kernel refuses to send a descriptor if more than RLIMIT_NOFILE of them are in the queues of sockets of the same user
    // (`too_many_unix_fds`), so the lowest limit with which it does not refuse is their number.
    let (here, there) = UnixDatagram::pair().expect("make sockets");
    let (_, hard) = getrlimit(Resource::RLIMIT_NOFILE).expect("a limit");
    let is_sent = |limit| {
        setrlimit(Resource::RLIMIT_NOFILE, limit, hard).expect("set a limit");
        let sent = send(&here, there.as_raw_fd());
        // Without room for it, the kernel closes the descriptor.
        assert!(sent == Err(Errno::ETOOMANYREFS) || there.recv(&mut [0]).expect("receive") == 1, "{sent:?}");
        sent.is_ok()
    };
    let (mut least, mut most) = (0, hard);
    while least < most {
        let middle = (least + most) / 2;
        if is_sent(middle) { most = middle } else { least = middle + 1 }
    }
    setrlimit(Resource::RLIMIT_NOFILE, hard, hard).expect("set a limit");
    let (_reader, writer) = nix::unistd::pipe().expect("make a pipe");
    let size = fcntl(&writer, FcntlArg::F_GETPIPE_SZ).expect("the size of a pipe");
    println!("{FOUND}{least} {size}");
}

fn send(socket: &UnixDatagram, fd: RawFd) -> Result<usize, Errno> {
    let rights = [ControlMessage::ScmRights(&[fd])];
    sendmsg::<()>(socket.as_raw_fd(), &[IoSlice::new(b"x")], &rights, MsgFlags::empty(), None)
}

/// Runs [`MANY`] execs of a script, each with streams of its own.
fn execs<'n>(container: &Container<'n>, script: &str) -> Vec<(Exec<'n>, Client)> {
    (0..MANY).map(|_| attached::exec(container, Spec::sh(script))).collect()
}

#[test]
fn descriptors_that_are_kept_do_not_count_as_descriptors_that_root_sends() {
    needs!(OurShim);
    let node = Node::exclusive();
    let before = Found::now(&node);
    let container = node.container("many", Spec::sleeping()).started(&Io::default());
    let _execs = execs(&container, "sleep 100000");
    let after = Found::now(&node);
    assert!(after.queued < before.queued + MANY as u64, "{before:?}, then {after:?}");
}

#[test]
fn the_streams_of_many_processes_leave_memory_for_the_pipes_of_root() {
    needs!(OurShim);
    let node = Node::exclusive();
    let container = node.container("many", Spec::sleeping()).started(&Io::default());
    let _execs = execs(&container, "sleep 100000");
    assert_eq!(Found::now(&node).pipe_size, PIPE_SIZE);
}

/// The journal's copy of their output has large pipes.
#[test]
fn output_that_waits_for_journald_leaves_memory_for_the_pipes_of_root() {
    needs!(OurShim);
    let node = Node::exclusive();
    let frozen = freeze_journald();
    fill_queue_of_journald();
    // Long lines, of which there are fewer than the journal's copy may have.
    let script = "head -c 300000 /dev/zero | tr '\\0' x | fold -w 4000; echo; echo over; sleep 100000";
    let start = |spec, io: &Io| node.container("many", spec).started(io);
    let _containers: Vec<_> = (0..MANY)
        .map(|_| {
            let (container, mut client) = Client::attached(Spec::sh(script), start);
            client.until("over\n");
            (container, client)
        })
        .collect();
    let found = Found::now(&node);
    drop(frozen);
    assert_eq!(found.pipe_size, PIPE_SIZE);
}
