//! Tests of what happens while Create or Start waits for a terminal, which the OCI runtime sends.

use std::fs::File;
use std::io::IoSlice;
use std::os::fd::{AsFd, AsRawFd};
use std::os::unix::fs::OpenOptionsExt;
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::time::{Duration, Instant};

use nix::fcntl::OFlag;
use nix::poll::{PollFd, PollFlags};
use nix::pty::{PtyMaster, grantpt, posix_openpt, ptsname_r, unlockpt};
use nix::sys::socket::{ControlMessage, MsgFlags, sendmsg};
use nix::sys::stat::Mode;
use nix::unistd::mkfifo;

use crate::id::{ProcessKey, UnitName};
use crate::ops::{AddExec, Shim};
use crate::services::{Delivery, Error};
use crate::store::Store;
use crate::sys;
use crate::task::request::Stdio;
use crate::unit::name;

use super::scenarios::{UP, up};

/// How long the fake runtime or the kernel may take.
const LIMIT: Duration = Duration::from_secs(30);

fn with_terminal(stdin: &str) -> Stdio {
    Stdio { stdin: stdin.to_owned(), terminal: true, ..Stdio::default() }
}

/// Returns once the process exists, and the call that starts it waits for the terminal. Meanwhile the paused clock stands still.
async fn waits_for_terminal(shim: &Shim, key: &ProcessKey) {
    let has_process = || {
        let entry = shim.tasks.registry.get(&key.task);
        let process = entry.and_then(|entry| entry.process(key.exec.as_ref()));
        process.is_some_and(|process| process.live().process.is_some())
    };
    let begun = Instant::now();
    while !has_process() {
        assert!(begun.elapsed() < LIMIT, "there is no process");
        tokio::task::yield_now().await;
    }
}

/// A terminal, and its other side. No program that another test starts inherits them.
fn open_terminal() -> (PtyMaster, File) {
    let flags = OFlag::O_RDWR | OFlag::O_NOCTTY | OFlag::O_CLOEXEC;
    let master = posix_openpt(flags).unwrap();
    grantpt(&master).unwrap();
    unlockpt(&master).unwrap();
    let path = ptsname_r(&master).unwrap();
    let mut options = File::options();
    (master, options.read(true).write(true).custom_flags(OFlag::O_NOCTTY.bits()).open(path).unwrap())
}

/// Sends a terminal as the OCI runtime does.
fn send(terminal: PtyMaster, store: &Store, unit: &UnitName) {
    let runtime = UnixStream::connect(store.console(&name::short_name(unit))).unwrap();
    let (name, fds) = ([IoSlice::new(b"/dev/ptmx")], [terminal.as_raw_fd()]);
    sendmsg::<()>(runtime.as_raw_fd(), &name, &[ControlMessage::ScmRights(&fds)], MsgFlags::empty(), None)
        .unwrap();
}

/// True once a terminal has hung up. False if that takes too long.
async fn hangs_up(terminal: File) -> bool {
    let wait = move || {
        let mut fds = [PollFd::new(terminal.as_fd(), PollFlags::empty())];
        sys::poll(&mut fds, LIMIT).unwrap()
    };
    tokio::task::spawn_blocking(wait).await.unwrap()
}

fn make_fifo(path: &Path) -> String {
    mkfifo(path, Mode::S_IRWXU).unwrap();
    path.display().to_string()
}

#[test]
fn an_input_that_is_closed_before_the_terminal_has_come_ends() {
    let world = up("close-early", &UP);
    let input = make_fifo(&world.state_dir().with_file_name("input"));
    let call = AddExec { stdio: with_terminal(&input), ..world.exec_call() };
    let (exec, unit, store) = (world.exec(), world.exec_unit(), Store::new(world.state_dir()));
    let hung_up = world.live(move |shim| async move {
        shim.add_exec(call, Delivery::First).await?;
        let (master, slave) = open_terminal();
        let close = async {
            waits_for_terminal(&shim, &exec).await;
            shim.close_stdin(&exec).unwrap();
            send(master, &store, &unit);
            Ok(())
        };
        tokio::try_join!(shim.start(&exec, Delivery::First), close)?;
        Ok::<_, Error>(hangs_up(slave).await)
    });
    assert!(hung_up.unwrap().unwrap());
}
