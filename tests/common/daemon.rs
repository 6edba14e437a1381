//! Kills, stops and restarts the daemon, and waits for the next one.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::mpsc::{self, RecvTimeoutError};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use nix::errno::Errno;
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

use super::systemd::{self, DAEMON_SERVICE};
use super::{process, shim, wait};

/// The pid of the daemon, if it runs. Read from `/proc`, because systemd may be re-executing. The guard of an earlier daemon
/// may still exist: it has the same command line.
pub fn pid() -> Option<u32> {
    let is_guard = |pid: &u32| process::name(*pid).is_some_and(|name| name.starts_with("shim-guard"));
    processes().into_iter().find(|pid| !is_guard(pid))
}

/// The daemon and guards.
pub fn processes() -> Vec<u32> {
    process::with_command_line("containerd-shim-systemd-v1 serve")
}

/// Whether the process is stopped by a signal (SIGSTOP).
pub fn is_stopped(pid: u32) -> bool {
    process::status(pid, "State").is_some_and(|state| state.starts_with('T'))
}

/// Sends a signal to a process, which may have ended.
pub fn signal(pid: u32, signal: Signal) {
    let raw = i32::try_from(pid).expect("a pid is a small number");
    match kill(Pid::from_raw(raw), signal) {
        Ok(()) | Err(Errno::ESRCH) => {}
        Err(errno) => panic!("send {signal} to {pid}: {errno}"),
    }
}

/// Sends SIGKILL to the daemon as soon as it runs; returns its pid. The daemon may still be starting.
pub fn kill_now() -> u32 {
    let pid = wait::until("there is a daemon", pid);
    signal(pid, Signal::SIGKILL);
    wait::until_true("a killed daemon is gone", || self::pid() != Some(pid));
    pid
}

/// Waits until a daemon other than `pid` serves.
pub fn wait_for_another(than: u32) -> u32 {
    wait::until("another daemon serves", || serving().filter(|pid| *pid != than))
}

/// Sends SIGKILL to every process in the cgroup of the daemon's service, as `systemctl kill` does. There may be none.
pub fn kill_cgroup() {
    process::run("systemctl", &["kill", "--signal=SIGKILL", DAEMON_SERVICE]);
}

/// Kills the daemon's whole cgroup as soon as there is a daemon; returns its pid.
pub fn kill_cgroup_now() -> u32 {
    let pid = wait::until("there is a daemon", pid);
    kill_cgroup();
    wait::until_true("a killed daemon is gone", || self::pid() != Some(pid));
    pid
}

/// Kills the daemon and waits until the next one serves.
pub fn killed() {
    wait_for_another(kill_now());
}

/// How often the daemon has been killed so far. The time for a number of kills depends on the machine, so work that needs
/// some kills continues until the number is reached.
#[derive(Default)]
pub struct Kills {
    count: AtomicU64,
    is_over: AtomicBool,
}

impl Kills {
    /// The number of kills so far.
    pub fn count(&self) -> u64 {
        self.count.load(Ordering::Acquire)
    }

    /// Whether the number is reached. Panics if it is not, and the thread that kills has ended.
    pub fn reached(&self, number: u64) -> bool {
        let count = self.count();
        let is_over = self.is_over.load(Ordering::Acquire);
        assert!(
            count >= number || !is_over,
            "nobody kills the daemon after {count} kills, {number} are needed"
        );
        count >= number
    }

    /// Counts turns: at least `least`, and more until there have been `kills` kills.
    pub fn turns(&self, least: u32, kills: u64) -> impl Iterator<Item = u32> {
        (0..).take_while(move |turn| *turn < least || !self.reached(kills))
    }

    /// Waits until the number of kills is reached.
    pub fn wait_for(&self, number: u64) {
        (1..=number).for_each(|number| {
            wait::until_true("the daemon is killed once more", || self.reached(number));
        });
    }
}

/// Runs `work` while the daemon is killed again and again, sometimes before it is ready. When this returns, the daemon
/// serves again.
pub fn killed_during<T>(work: impl FnOnce(&Kills) -> T) -> T {
    repeated_during(kill_now, work)
}

/// As [`killed_during`], with a kill of the daemon's whole cgroup.
pub fn cgroup_killed_during<T>(work: impl FnOnce(&Kills) -> T) -> T {
    repeated_during(kill_cgroup_now, work)
}

fn repeated_during<T>(kill: fn() -> u32, work: impl FnOnce(&Kills) -> T) -> T {
    let mut killer = Killer::begin(kill, Duration::ZERO);
    let done = work(&killer.kills);
    killer.end();
    done
}

/// After so much time without a daemon that serves, the next one is killed only once it has served. containerd gives State
/// 2 s (`io.containerd.timeout.task.state`), and continues without a pid then: the CRI plugin of 1.7 writes specs with the
/// namespaces of process 0.
const MOST_UNSERVED: Duration = Duration::from_millis(700);

/// A thread that kills the daemon again and again, sometimes before it is ready, until this is ended or dropped.
pub struct Killer {
    pub kills: Arc<Kills>,
    running: Option<(mpsc::Sender<()>, JoinHandle<()>)>,
}

impl Killer {
    /// Calls `kill` again and again, after pauses that begin with this length and grow.
    pub fn begin(kill: fn() -> u32, pause: Duration) -> Killer {
        let (end, ended) = mpsc::channel::<()>();
        let counted = Arc::new(Kills::default());
        let kills = counted.clone();
        let thread = thread::spawn(move || {
            let _over = Over(&kills);
            let mut served = Instant::now();
            let longer = |step: u64| pause + Duration::from_millis(40 * step);
            let mut next = longer(0);
            while ended.recv_timeout(next) == Err(RecvTimeoutError::Timeout) {
                kill();
                kills.count.fetch_add(1, Ordering::Release);
                // The pause counts from the start of a daemon, which systemd delays.
                wait::until("there is another daemon", pid);
                next = longer(kills.count() % 7);
                if served.elapsed() > pause + MOST_UNSERVED {
                    wait::until("one of the daemons serves", serving);
                    served = Instant::now();
                    next = longer(6);
                }
            }
        });
        Killer { kills: counted, running: Some((end, thread)) }
    }

    /// Stops killing, and waits until the daemon serves.
    pub fn end(&mut self) {
        let Some((end, killer)) = self.running.take() else { return };
        drop(end);
        killer.join().expect("the killer does not panic");
        wait::until("the daemon serves again", serving);
        println!("the daemon was killed {} times", self.kills.count());
    }
}

impl Drop for Killer {
    fn drop(&mut self) {
        if let Some((end, killer)) = self.running.take() {
            drop(end);
            // A panic of the killer is reported by its own thread.
            let _ = killer.join();
        }
    }
}

/// Records that no more kills will come, also when the thread that kills panics.
struct Over<'k>(&'k Kills);

impl Drop for Over<'_> {
    fn drop(&mut self) {
        self.0.is_over.store(true, Ordering::Release);
    }
}

/// The pid of a daemon that has notified systemd that it is ready.
pub fn serving() -> Option<u32> {
    let pid = pid()?;
    // One call, so that both values are of the same daemon.
    let args = ["show", "--property=ActiveState,MainPID", DAEMON_SERVICE];
    let shown = process::run("systemctl", &args).text();
    let serves = |line: &str| line == "ActiveState=active";
    let is_main = |line: &str| line == format!("MainPID={pid}");
    (shown.lines().any(serves) && shown.lines().any(is_main)).then_some(pid)
}

/// Runs `systemctl restart`, or another verb of systemctl, on the daemon's service.
pub fn systemctl(verb: &str) {
    let done = process::run("systemctl", &[verb, DAEMON_SERVICE]);
    if done.code != Some(0) {
        let messages =
            process::run("journalctl", &["--unit", DAEMON_SERVICE, "--lines", "8", "--output", "cat"]);
        panic!("systemctl {verb} {DAEMON_SERVICE}: {}\n{}", done.stderr, messages.text());
    }
}

/// A process that is stopped by a signal until this is dropped.
pub struct Frozen(u32);

impl Frozen {
    pub fn new(pid: u32) -> Frozen {
        signal(pid, Signal::SIGSTOP);
        wait::until_true("the process is stopped", || is_stopped(pid));
        Frozen(pid)
    }
}

impl Drop for Frozen {
    fn drop(&mut self) {
        signal(self.0, Signal::SIGCONT);
    }
}

/// A daemon that is stopped by a signal: it does nothing and receives nothing. Later SIGKILL ends it, so this daemon never
/// continues its work.
pub struct Down {
    pid: u32,
}

impl Down {
    pub fn begin() -> Down {
        let pid = wait::until("there is a daemon", serving);
        signal(pid, Signal::SIGSTOP);
        wait::until_true("the daemon is stopped", || is_stopped(pid));
        Down { pid }
    }

    /// Ends the stopped daemon. When this returns, the next one serves.
    pub fn end(self) {
        let pid = self.pid;
        drop(self);
        wait_for_another(pid);
    }
}

impl Drop for Down {
    fn drop(&mut self) {
        signal(self.pid, Signal::SIGKILL);
    }
}

/// The version of systemd on this machine.
pub fn systemd_version() -> u32 {
    let text = process::succeed("systemctl", &["--version"]);
    let number = text.split_whitespace().nth(1).and_then(|word| word.parse().ok());
    number.unwrap_or_else(|| panic!("no version in {text:?}"))
}

/// A drop-in of the daemon's service. It takes effect with a restart of the daemon, and is removed on drop.
pub struct DropIn;

impl DropIn {
    const DIRECTORY: &str = "/run/systemd/system/containerd-shim-systemd-v1.service.d";

    pub fn new(text: &str) -> DropIn {
        let drop_in = DropIn;
        // In a new guest, the service does not exist before its first use.
        shim::socket();
        std::fs::create_dir_all(Self::DIRECTORY).expect("make the directory of a drop-in");
        std::fs::write(format!("{}/50-test.conf", Self::DIRECTORY), text).expect("write a drop-in");
        process::succeed("systemctl", &["daemon-reload"]);
        systemctl("restart");
        drop_in
    }
}

impl Drop for DropIn {
    fn drop(&mut self) {
        // Errors of this clean-up show in the next test.
        let _ = std::fs::remove_dir_all(Self::DIRECTORY);
        process::run("systemctl", &["daemon-reload"]);
        process::run("systemctl", &["restart", DAEMON_SERVICE]);
    }
}

/// The number of entries in the descriptor store of the daemon.
pub fn stored() -> usize {
    systemd::property(DAEMON_SERVICE, "NFileDescriptorStore").parse().expect("a number of descriptors")
}

/// How many files a daemon has open.
pub fn open_files(pid: u32) -> usize {
    let files = std::fs::read_dir(format!("/proc/{pid}/fd"));
    files.unwrap_or_else(|error| panic!("read the descriptors of {pid}: {error}")).count()
}

/// How often systemd has restarted the daemon.
pub fn restarts() -> u32 {
    systemd::property(DAEMON_SERVICE, "NRestarts").parse().unwrap_or(0)
}

/// Whether the daemon has a file open.
pub fn has_open(path: &str) -> bool {
    let Some(pid) = pid() else { return false };
    let files = std::fs::read_dir(format!("/proc/{pid}/fd")).into_iter().flatten().flatten();
    files.filter_map(|file| std::fs::read_link(file.path()).ok()).any(|open| open.as_os_str() == path)
}
