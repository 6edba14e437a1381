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
use crate::ops::{AddExec, CreateTask, Shim};
use crate::services::{Delivery, Error};
use crate::store::Store;
use crate::sys;
use crate::task::request::Stdio;
use crate::unit::fake::FakeSystemd;
use crate::unit::name;

use super::harness::World;
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

/// How a process ends without a report of systemd that the daemon can use, and the exit status that it gets.
type End = (&'static str, fn(&FakeSystemd, &UnitName), u32);

const ENDS: [End; 2] = [
    ("signals-lost", |systemd, unit| systemd.end_unheard(unit, 7), 7),
    // A unit that is stopped from outside is unloaded, and systemd forgets a process that is not its child.
    ("unloaded", |systemd, unit| systemd.unload(unit), 137),
];

#[test]
fn the_end_of_an_exec_that_only_a_query_shows_is_noticed_during_its_start() {
    for (name, end, status) in ENDS {
        let world = up(name, &UP);
        let call = AddExec { stdio: with_terminal(""), ..world.exec_call() };
        let (exec, init, unit) = (world.exec(), world.init(), world.exec_unit());
        let (systemd, store) = (world.systemd.clone(), Store::new(world.state_dir()));
        let exit = world.live(move |shim| async move {
            shim.add_exec(call, Delivery::First).await?;
            let happens = async {
                waits_for_terminal(&shim, &exec).await;
                end(&systemd, &unit);
                shim.units.resync().await;
                send(open_terminal().0, &store, &unit);
                Ok(())
            };
            tokio::try_join!(shim.start(&exec, Delivery::First), happens)?;
            let exit = tokio::time::timeout(Duration::from_secs(3600), shim.wait(&exec, Delivery::First));
            let exit = exit.await.expect("the end of the exec")?;
            shim.tasks.kill(&init, nix::libc::SIGKILL as u32, false, Delivery::First).await?;
            shim.wait(&init, Delivery::First).await?;
            Ok::<_, Error>(exit.status)
        });
        assert_eq!(exit.unwrap().unwrap(), status, "{name}");
        let events = ["create", "start", "exec-added", "exec-started", "exec-exit", "exit"];
        assert_eq!(world.events(), events, "{name}");
    }
}

#[test]
fn the_end_of_init_that_only_a_query_shows_is_noticed_during_its_create() {
    let world = World::new("init-unheard");
    let call = CreateTask { stdio: with_terminal(""), ..world.create_call() };
    let (init, unit, systemd) = (world.init(), world.unit(), world.systemd.clone());
    let store = Store::new(world.state_dir());
    let exit = world.live(move |shim| async move {
        let happens = async {
            waits_for_terminal(&shim, &init).await;
            systemd.end_unheard(&unit, 7);
            shim.units.resync().await;
            send(open_terminal().0, &store, &unit);
            Ok(())
        };
        tokio::try_join!(shim.create(call, Delivery::First), happens)?;
        let exit = tokio::time::timeout(Duration::from_secs(3600), shim.wait(&init, Delivery::First));
        exit.await.expect("the end of init")
    });
    assert_eq!(exit.unwrap().unwrap().status, 7);
    assert_eq!(world.events(), ["create", "exit"]);
}
