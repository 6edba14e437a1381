//! Counts the work of the machine for an operation: messages on the bus, executed programs, written files, and
//! processes that are moved to another cgroup. The counts do not depend on how busy the machine is.
//!
//! The kernel merges equal events of a file that nobody has read yet, so a count of files can be too small, never too
//! large.

use std::collections::{BTreeMap, HashMap};
use std::os::fd::{AsFd, AsRawFd};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::JoinHandle;
use std::{fs, process, thread};

use futures_util::StreamExt;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::fanotify::{EventFFlags, Fanotify, InitFlags, MarkFlags, MaskFlags};
use zbus::fdo::{DBusProxy, MonitoringProxy};
use zbus::message::Type;
use zbus::{Connection, Message, MessageStream};

use super::node::{Node, unique};
use super::{daemon, wait};

const SYSTEMD: &str = "org.freedesktop.systemd1";
const BUS: &str = "org.freedesktop.DBus";
const CGROUPS: &str = "/sys/fs/cgroup";

/// Who sends a message.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Sender {
    Daemon,
    Systemd,
    Bus,
    Other,
}

/// One message.
#[derive(Clone, Debug)]
pub struct Sent {
    pub sender: Sender,
    /// `call Member`, `signal Member`, `reply`.
    pub what: String,
    pub bytes: usize,
}

/// The work between [`Watch::begin`] and [`Watch::end`].
#[derive(Clone, Debug, Default)]
pub struct Counts {
    pub messages: Vec<Sent>,
    /// The file names of the programs that were executed, outside of containers.
    pub executed: Vec<String>,
    /// The files below /run that were written.
    pub written: Vec<PathBuf>,
    /// The files `cgroup.procs` that were written, only of the units and containers that the watch is about.
    pub moves: Vec<PathBuf>,
    /// Processes and threads that were created.
    pub tasks: u64,
}

impl Counts {
    /// The messages of a sender whose description begins with this text.
    pub fn sent(&self, sender: Sender, what: &str) -> usize {
        self.messages.iter().filter(|sent| sent.sender == sender && sent.what.starts_with(what)).count()
    }

    /// Number and bytes of messages, by sender and kind.
    pub fn by_kind(&self) -> BTreeMap<(Sender, String), (usize, usize)> {
        let mut kinds = BTreeMap::new();
        for Sent { sender, what, bytes } in &self.messages {
            let (number, all) = kinds.entry((*sender, what.clone())).or_insert((0, 0));
            (*number, *all) = (*number + 1, *all + bytes);
        }
        kinds
    }

    /// How often a program was executed.
    pub fn executions(&self, program: &str) -> usize {
        self.executed.iter().filter(|name| name.as_str() == program).count()
    }

    /// How many files in a directory were written.
    pub fn written_below(&self, directory: &str) -> usize {
        self.written.iter().filter(|path| path.starts_with(directory)).count()
    }
}

/// Watches the bus and the file systems.
pub struct Watch {
    bus: BusWatch,
    files: FileWatch,
    tasks: u64,
    own: String,
}

impl Watch {
    /// Counts moves to the cgroups whose path contains `own`. Guests that share a kernel see the cgroups of each other.
    pub fn new(node: &Node, own: &str) -> Watch {
        Watch { bus: BusWatch::new(node), files: FileWatch::new(), tasks: 0, own: own.to_string() }
    }

    /// Discards everything that was counted before.
    pub fn begin(&mut self, node: &Node) {
        self.bus.take(node);
        self.files.mark_programs_in_memory();
        self.files.take();
        self.tasks = last_task();
    }

    pub fn end(&mut self, node: &Node) -> Counts {
        let tasks = last_task().wrapping_sub(self.tasks);
        let messages = self.bus.take(node);
        let mut counts = Counts { messages, tasks, ..Counts::default() };
        for Event { mask, path } in self.files.take() {
            if mask.contains(MaskFlags::FAN_OPEN_EXEC) {
                counts.executed.push(name_of(&path));
            }
            let is_own = || path.to_string_lossy().contains(&self.own);
            if mask.contains(MaskFlags::FAN_MODIFY) && path.ends_with("cgroup.procs") && is_own() {
                counts.moves.push(path.clone());
            }
            if mask.contains(MaskFlags::FAN_CLOSE_WRITE) && path.starts_with("/run") {
                counts.written.push(path);
            }
        }
        counts
    }
}

/// The name of a program. The sealed copy of the OCI runtime is called `memfd:runc`.
fn name_of(path: &Path) -> String {
    let name = path.file_name().unwrap_or_default().to_string_lossy();
    name.trim_end_matches(" (deleted)").to_string()
}

/// The number that the kernel has given to the last process or thread in this pid namespace.
fn last_task() -> u64 {
    let text = fs::read_to_string("/proc/loadavg").expect("read /proc/loadavg");
    let last = text.split_whitespace().last().and_then(|number| number.parse().ok());
    last.unwrap_or_else(|| panic!("no number of a process in {text:?}"))
}

/// Receives all messages on the system bus.
struct BusWatch {
    messages: Arc<Mutex<Vec<Message>>>,
    /// Messages of this connection mark a place in the stream of all messages.
    marker: Connection,
}

impl BusWatch {
    fn new(node: &Node) -> BusWatch {
        let messages = Arc::new(Mutex::new(Vec::new()));
        let marker = node.block_on(async {
            let monitor = Connection::system().await.expect("connect to the bus");
            let mut stream = MessageStream::from(&monitor);
            let monitoring = MonitoringProxy::new(&monitor).await.expect("the bus can be monitored");
            monitoring.become_monitor(&[], 0).await.expect("become a monitor");
            let received = messages.clone();
            node.spawn(async move {
                while let Some(Ok(message)) = stream.next().await {
                    lock(&received).push(message);
                }
                drop(monitor);
            });
            Connection::system().await.expect("connect to the bus")
        });
        BusWatch { messages, marker }
    }

    /// The messages since the last call, without those of this process.
    fn take(&self, node: &Node) -> Vec<Sent> {
        let (names, last) = node.block_on(async { (self.names().await, self.ping().await) });
        let is_last = |message: &Message| {
            let (header, wanted) = (message.header(), last.header());
            header.sender() == wanted.sender()
                && header.primary().serial_num() == wanted.primary().serial_num()
        };
        let messages = wait::until("the monitor receives a message that was sent", || {
            let mut received = lock(&self.messages);
            received.iter().any(is_last).then(|| std::mem::take(&mut *received))
        });
        messages.iter().filter_map(|message| sent(message, &names)).collect()
    }

    /// systemd answers after it has sent all earlier messages.
    async fn ping(&self) -> Message {
        let path = "/org/freedesktop/systemd1";
        let peer = Some("org.freedesktop.DBus.Peer");
        self.marker.call_method(Some(SYSTEMD), path, peer, "Ping", &()).await.expect("ping systemd")
    }

    /// Who owns the unique names on the bus. `None`: this process.
    async fn names(&self) -> HashMap<String, Option<Sender>> {
        let bus = DBusProxy::new(&self.marker).await.expect("the bus");
        let daemon = daemon::pid();
        let mut names = HashMap::from([(BUS.to_string(), Some(Sender::Bus))]);
        for name in bus.list_names().await.expect("names on the bus") {
            // A connection may have ended in the meantime.
            if let Ok(pid) = bus.get_connection_unix_process_id(name.as_ref()).await {
                let sender = match pid {
                    1 => Some(Sender::Systemd),
                    pid if Some(pid) == daemon => Some(Sender::Daemon),
                    pid if pid == process::id() => None,
                    _ => Some(Sender::Other),
                };
                names.insert(name.to_string(), sender);
            }
        }
        names
    }
}

fn sent(message: &Message, names: &HashMap<String, Option<Sender>>) -> Option<Sent> {
    let header = message.header();
    let who = |name: &str| names.get(name).copied().unwrap_or(Some(Sender::Other));
    let sender = who(header.sender()?.as_str())?;
    if let Some(destination) = header.destination() {
        who(destination.as_str())?;
    }
    let member = header.member().map(|member| member.to_string()).unwrap_or_default();
    let what = match header.message_type() {
        Type::MethodCall => format!("call {member}"),
        Type::Signal => format!("signal {member}"),
        Type::MethodReturn | Type::Error => "reply".to_string(),
    };
    Some(Sent { sender, what, bytes: message.data().len() })
}

struct Event {
    mask: MaskFlags,
    path: PathBuf,
}

/// Receives events about files.
struct FileWatch {
    group: Arc<Fanotify>,
    events: Arc<Mutex<Vec<Event>>>,
    ends: Arc<AtomicBool>,
    reader: Option<JoinHandle<()>>,
}

impl FileWatch {
    fn new() -> FileWatch {
        let flags = InitFlags::FAN_CLASS_NOTIF | InitFlags::FAN_CLOEXEC | InitFlags::FAN_NONBLOCK;
        let flags = flags | InitFlags::FAN_UNLIMITED_QUEUE;
        let group = Fanotify::init(flags, EventFFlags::O_RDONLY | EventFFlags::O_CLOEXEC);
        let group = Arc::new(group.expect("fanotify_init"));
        let wanted = [
            ("/", MaskFlags::FAN_OPEN_EXEC),
            ("/run", MaskFlags::FAN_OPEN_EXEC | MaskFlags::FAN_CLOSE_WRITE),
            (CGROUPS, MaskFlags::FAN_MODIFY),
        ];
        for (path, mask) in wanted {
            let how = MarkFlags::FAN_MARK_ADD | MarkFlags::FAN_MARK_FILESYSTEM;
            group
                .mark(how, mask, nix::fcntl::AT_FDCWD, Some(path))
                .unwrap_or_else(|e| panic!("watch {path}: {e}"));
        }
        let (events, ends) = (Arc::default(), Arc::new(AtomicBool::new(false)));
        let reader = thread::spawn({
            let (group, events, ends) = (group.clone(), Arc::clone(&events), ends.clone());
            move || read_events(&group, &events, &ends)
        });
        FileWatch { group, events, ends, reader: Some(reader) }
    }

    /// The OCI runtime's sealed copy is a file without a file system that could be watched.
    fn mark_programs_in_memory(&self) {
        let Some(daemon) = daemon::pid() else { return };
        for entry in fs::read_dir(format!("/proc/{daemon}/fd")).into_iter().flatten().flatten() {
            let is_copy = fs::read_link(entry.path()).is_ok_and(|link| link.starts_with("/memfd:runc"));
            if is_copy {
                // The daemon may have closed it in the meantime.
                let _ = self.group.mark(
                    MarkFlags::FAN_MARK_ADD,
                    MaskFlags::FAN_OPEN_EXEC,
                    nix::fcntl::AT_FDCWD,
                    Some(&entry.path()),
                );
            }
        }
    }

    /// The events since the last call.
    fn take(&self) -> Vec<Event> {
        let marker = Path::new("/run").join(unique("counts"));
        fs::write(&marker, "").expect("write to /run");
        let mut events = wait::until("the file that was written last is reported", || {
            let mut events = lock(&self.events);
            events.iter().any(|event| event.path == marker).then(|| std::mem::take(&mut *events))
        });
        fs::remove_file(&marker).expect("remove a file from /run");
        events.retain(|event| event.path != marker);
        events
    }
}

impl Drop for FileWatch {
    fn drop(&mut self) {
        self.ends.store(true, Ordering::Relaxed);
        if let Some(reader) = self.reader.take() {
            // The panic of the thread has been printed.
            let _ = reader.join();
        }
    }
}

fn read_events(group: &Fanotify, events: &Mutex<Vec<Event>>, ends: &AtomicBool) {
    while !ends.load(Ordering::Relaxed) {
        let mut fds = [PollFd::new(group.as_fd(), PollFlags::POLLIN)];
        if !poll(&mut fds, PollTimeout::from(100_u8)).is_ok_and(|ready| ready > 0) {
            continue;
        }
        for event in group.read_events().unwrap_or_default() {
            let Some(fd) = event.fd() else { continue };
            let link = format!("/proc/self/fd/{}", fd.as_raw_fd());
            let path = fs::read_link(link).unwrap_or_default();
            lock(events).push(Event { mask: event.mask(), path });
        }
    }
}

fn lock<T>(mutex: &Mutex<T>) -> std::sync::MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
