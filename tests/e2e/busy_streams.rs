//! A process of a container keeps a lock of the kernel that a call on its stream needs, for as long as it likes: it passes an
//! address to the kernel whose page fault never ends (userfaultfd(2)). That costs its own container only.

use std::fs;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
use std::path::PathBuf;
use std::time::{Duration, Instant};

use nix::libc;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};

use crate::attached::{Client, exec};
use crate::common::bystander::Bystander;
use crate::common::container::Container;
use crate::common::node::Node;
use crate::common::spec::Spec;
use crate::common::stdio::Scratch;
use crate::common::task::{Io, SIGKILL};
use crate::common::{daemon, process, wait};

/// The variable with what a process of the container keeps busy.
const HOLDS: &str = "E2E_HOLDS";
const PAGE: usize = 4096;
/// The file that shows that the kernel waits, below the directory of the test.
const HELD: &str = "held";
/// Where that directory is in the container.
const PLACE: &str = "/place";

/// Runs in the container: this test program is the process of the container.
#[test]
fn as_the_process_of_a_container() {
    let Ok(what) = std::env::var(HOLDS) else { return };
    let (page, faults) = endless_page();
    let address = page as usize;
    std::thread::spawn(move || hold(&what, address as *mut libc::c_void));
    // Readable once the kernel waits for the page.
    let mut fds = [PollFd::new(std::os::fd::AsFd::as_fd(&faults), PollFlags::POLLIN)];
    poll(&mut fds, PollTimeout::NONE).expect("poll");
    fs::write(format!("{PLACE}/{HELD}"), "").expect("say that the kernel waits");
    loop {
        std::thread::park();
    }
}

/// Memory whose page faults nobody answers.
#[expect(unsafe_code, reason = "the interface of the kernel")]
fn endless_page() -> (*mut libc::c_void, OwnedFd) {
    const UFFDIO_API: libc::c_ulong = 0xc018_aa3f;
    const UFFDIO_REGISTER: libc::c_ulong = 0xc020_aa00;
    const MODE_MISSING: u64 = 1;
    // SAFETY: plain system calls, on memory that this process has just mapped.
    unsafe {
        let made = libc::syscall(libc::SYS_userfaultfd, libc::O_CLOEXEC | libc::O_NONBLOCK);
        let number = i32::try_from(made).expect("a descriptor");
        assert!(number >= 0, "userfaultfd: {}", std::io::Error::last_os_error());
        let faults = OwnedFd::from_raw_fd(number);
        let mut api = [0xaa_u64, 0, 0];
        assert_eq!(libc::ioctl(faults.as_raw_fd(), UFFDIO_API, api.as_mut_ptr()), 0);
        let (access, kind) = (libc::PROT_READ | libc::PROT_WRITE, libc::MAP_PRIVATE | libc::MAP_ANONYMOUS);
        let page = libc::mmap(std::ptr::null_mut(), PAGE, access, kind, -1, 0);
        assert_ne!(page, libc::MAP_FAILED);
        let mut range = [page as u64, PAGE as u64, MODE_MISSING, 0];
        assert_eq!(libc::ioctl(faults.as_raw_fd(), UFFDIO_REGISTER, range.as_mut_ptr()), 0);
        (page, faults)
    }
}

/// Makes the kernel wait for the page while it has a lock.
#[expect(unsafe_code, reason = "the interface of the kernel")]
fn hold(what: &str, page: *mut libc::c_void) {
    // SAFETY: the kernel reads or writes one page of this process, or rather does not.
    unsafe {
        match what {
            "stdout" => {
                let text = [b'x'; PAGE];
                for _ in 0..24 {
                    libc::write(1, text.as_ptr().cast(), text.len());
                }
                // Until the client's FIFO is full, and the rest is here: then the daemon waits for its client.
                let mut left: libc::c_int = 0;
                while libc::ioctl(1, libc::FIONREAD, &mut left) != 0 || left > 12 * 4096 {
                    std::thread::yield_now();
                }
                libc::write(1, page, PAGE)
            }
            "stdin" => libc::read(0, page, PAGE),
            _ => libc::ioctl(0, libc::TIOCGWINSZ, page) as isize,
        };
    }
}

/// A container whose process is a test of this program.
pub fn program(test: &str) -> Spec {
    let program = std::env::current_exe().expect("this program").display().to_string();
    let spec = Spec::new(&[&program, "--exact", test, "--nocapture"]);
    ["/usr", "/lib", "/lib64"].iter().fold(spec, |spec, path| spec.bind(path, path, &["ro"]))
}

fn spec(what: &str, place: &Scratch) -> Spec {
    let spec = program("busy_streams::as_the_process_of_a_container").env(&format!("{HOLDS}={what}"));
    spec.capabilities(&["CAP_SYS_PTRACE"]).bind(place.as_str(), PLACE, &["rw"])
}

/// Starts the process of the container, and ends it after the check: until then, the daemon can't end.
fn with_holder(what: &str, check: impl FnOnce(&Container, &mut Client, &Bystander, &Scratch)) {
    let node = Node::exclusive();
    let bystander = Bystander::new(&node);
    let place = Scratch::new("busy");
    let spec = if what == "window" { spec(what, &place).terminal() } else { spec(what, &place) };
    let (container, mut client) = Client::attached(spec, |spec, io| node.container("busy", spec).started(io));
    check(&container, &mut client, &bystander, &place);
    container.kill(SIGKILL).expect("kill");
    assert_eq!(container.exit_status(), 137);
    container.delete().expect("delete");
    bystander.assert_untouched("the container is gone");
}

fn until_held(place: &Scratch) {
    wait::until_true("the kernel waits for the process", || place.join(HELD).exists());
}

#[test]
fn a_container_that_holds_the_lock_of_its_stdout_delays_no_other() {
    needs!(OurShim);
    with_holder("stdout", |_, client, bystander, place| {
        until_held(place);
        // The client's FIFO has room again: the daemon moves the rest of the output, and has to wait for the lock.
        client.stdout.until(|bytes| bytes.len() >= 8 * PAGE);
        for _ in 0..5 {
            bystander.assert_untouched("a stdout is busy");
        }
    });
}

#[test]
fn many_containers_that_hold_locks_delay_the_output_of_no_other() {
    needs!(OurShim);
    /// More than the daemon's usual threads for streams, of which each container keeps one.
    const HOLDERS: usize = 12;
    let node = Node::exclusive();
    let bystander = Bystander::new(&node);
    let quiet = node.container("quiet", Spec::sleeping()).started(&Io::default());
    let places: Vec<_> = (0..HOLDERS).map(|number| Scratch::new(&format!("busy-{number}"))).collect();
    let holders: Vec<_> = places
        .iter()
        .enumerate()
        .map(|(number, place)| {
            let start = |spec, io: &Io| node.container(&format!("busy-{number}"), spec).started(io);
            let (container, mut client) = Client::attached(spec("stdout", place), start);
            until_held(place);
            client.stdout.until(|bytes| bytes.len() >= 8 * PAGE);
            (container, client)
        })
        .collect();
    for _ in 0..3 {
        let (exec, mut client) = exec(&quiet, Spec::sh("echo from the container"));
        client.until("from the container\n");
        assert_eq!(exec.exit_status(), 0);
    }
    bystander.assert_untouched("many streams are busy");
    for (container, _client) in holders {
        container.kill(SIGKILL).expect("kill");
        assert_eq!(container.exit_status(), 137);
        container.delete().expect("delete");
    }
    drop(quiet);
    bystander.assert_all_untouched("the containers are gone");
}

#[test]
fn a_container_that_holds_the_lock_of_its_stdin_delays_no_other() {
    needs!(OurShim);
    with_holder("stdin", |container, client, bystander, place| {
        client.enter("hello");
        until_held(place);
        container.close_stdin().expect("close stdin");
        for _ in 0..5 {
            bystander.assert_untouched("a stdin is busy");
        }
    });
}

/// A container keeps a thread of the daemon from ending. `end` ends the daemon, twice.
fn with_stuck_daemon(end: impl Fn()) {
    /// Without help, systemd waits for some 45 s.
    const LIMIT: Duration = Duration::from_secs(15);
    let node = Node::exclusive();
    let other = node.container("other", Spec::sleeping()).started(&Io::default());
    let place = Scratch::new("busy");
    let start = |spec, io: &Io| node.container("busy", spec).started(io);
    let (container, client) = Client::attached(spec("stdin", &place), start);
    let (quiet, mut output) = exec(&other, Spec::sh("echo begun; read line; echo $line"));
    output.until("begun\n");
    client.enter("hello");
    until_held(&place);
    container.close_stdin().expect("close stdin");
    for _ in 0..2 {
        let daemon = wait::until("the daemon serves", daemon::serving);
        wait::until_true("a thread of the daemon waits for the lock", || has_stuck_thread(daemon));
        let begun = Instant::now();
        end();
        assert_ne!(daemon::wait_for_another(daemon), daemon);
        assert!(begun.elapsed() < LIMIT, "the next daemon served after {:?}", begun.elapsed());
    }
    output.enter("hello\n");
    // Up to the end: daemons that can't go away do not keep the client's FIFO open.
    assert!(output.stdout.text().ends_with("hello\n"));
    assert_eq!(quiet.exit_status(), 0);
    container.kill(SIGKILL).expect("kill");
    assert_eq!(container.exit_status(), 137);
    container.delete().expect("delete");
    assert_eq!(other.exec_sh("exit 7").exit_status(), 7);
}

/// Whether a thread of the process waits for the lock of a pipe.
fn has_stuck_thread(pid: u32) -> bool {
    let waits = |thread: PathBuf| {
        let place = fs::read_to_string(thread.join("wchan")).unwrap_or_default();
        place.starts_with("pipe_") || place == "fifo_open"
    };
    process::threads(pid).any(waits)
}

#[test]
fn a_daemon_that_a_container_keeps_from_ending_is_replaced_at_once_when_it_is_killed() {
    needs!(OurShim);
    with_stuck_daemon(|| _ = daemon::kill_now());
}

#[test]
fn a_daemon_that_a_container_keeps_from_ending_is_replaced_at_once_when_it_is_restarted() {
    needs!(OurShim);
    with_stuck_daemon(|| daemon::systemctl("restart"));
}

#[test]
fn a_container_that_holds_the_lock_of_its_window_size_delays_no_other() {
    needs!(OurShim);
    with_holder("window", |container, _, bystander, place| {
        until_held(place);
        std::thread::scope(|scope| {
            let resized = scope.spawn(|| container.resize(100, 30));
            for _ in 0..5 {
                bystander.assert_untouched("a terminal is busy");
            }
            let error = resized.join().expect("join").expect_err("the terminal is busy");
            assert!(error.to_string().contains("does not answer"), "{error}");
        });
    });
}
