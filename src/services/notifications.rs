//! The notify sockets of containers. Each container has its own; the socket of systemd is never in a container.

use std::fs;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::fs::PermissionsExt;
use std::os::unix::net::UnixDatagram;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, Instant};

use nix::errno::Errno;
use nix::sys::socket::{setsockopt, sockopt};
use tokio::io::unix::AsyncFd;
use tokio::task::JoinHandle;

use crate::cgroup;
use crate::config;
use crate::files;
use crate::id::TaskKey;
use crate::path_error::io_error;
use crate::session::fds::{StreamFds, StreamKind};
use crate::stdio::fifo;
use crate::store::Store;
use crate::sys;
use crate::unit::name;
use crate::unit::relay::{MESSAGE_MAX, Notification, Relay, TimeExtension};
use crate::unit::systemd::Systemd;

use super::waiting::{WaitsFor, waiting};
use super::{Entry, Error, blocking};

/// How many messages of a container the daemon forwards without a pause. After these, it forwards one message after each
/// pause; the others wait in the socket.
const BURST: u32 = 50;
const PAUSE: Duration = Duration::from_millis(50);

/// The daemon reads the notify socket of a container until this is dropped, which also removes the path of the socket.
pub(crate) struct Listening {
    /// The path of the socket, in a mount of the container.
    pub(crate) path: PathBuf,
    /// The reader.
    pub(crate) task: JoinHandle<()>,
}

impl Drop for Listening {
    fn drop(&mut self) {
        self.task.abort();
        // It is no error if the path does not exist.
        let _ = std::fs::remove_file(&self.path);
    }
}

/// Forwards the notifications of containers to systemd.
#[derive(Clone)]
pub(crate) struct Notifications {
    /// Keeps the sockets for the next daemon.
    fds: Arc<StreamFds>,
    /// The directory with the sockets.
    store: Store,
    /// Knows how long a unit may take to stop.
    manager: Arc<dyn Systemd>,
    /// Sends to systemd.
    relay: Arc<Relay>,
}

impl Notifications {
    /// Puts the parts together.
    pub(crate) fn new(fds: Arc<StreamFds>, store: Store, manager: Arc<dyn Systemd>, relay: Relay) -> Self {
        Self { fds, store, manager, relay: Arc::new(relay) }
    }

    /// Opens the notify socket of a container that may notify, or claims the socket of an earlier daemon.
    ///
    /// # Errors
    /// The socket can't be created.
    pub(crate) async fn listen(&self, entry: &Arc<Entry>) -> Result<(), Error> {
        let (notify, number) = {
            let task = entry.task();
            (task.notify, task.init.wiring.store_number)
        };
        if !notify {
            return Ok(());
        }
        let path = self.store.notify_socket(&name::short_name(&entry.init.unit));
        let socket = match self.fds.claim(StreamKind::Notify, number).both.pop() {
            Some(socket) => socket,
            None => {
                let (path, fds) = (path.clone(), self.fds.clone());
                let opened = blocking(move || {
                    let opened = open(&path).map_err(io_error("listen on", &path));
                    opened.inspect(|socket| fds.store(StreamKind::Notify, number, &[socket.as_fd()]))
                });
                opened.await?.map_err(fifo::Error::from)?
            }
        };
        self.read(entry, socket, path)
    }

    /// After a restart: reads the notify socket of a running container again.
    pub(crate) fn listen_again(&self, entry: &Arc<Entry>) {
        let number = entry.task().init.wiring.store_number;
        // Containers of versions without this feature have no socket.
        let Some(socket) = self.fds.claim(StreamKind::Notify, number).both.pop() else {
            return;
        };
        let path = self.store.notify_socket(&name::short_name(&entry.init.unit));
        if let Err(error) = self.read(entry, socket, path) {
            tracing::error!(task = %entry.key, %error, "task {}: its notifications (sd_notify) are lost: {error}", entry.key);
        }
    }

    fn read(&self, entry: &Arc<Entry>, socket: OwnedFd, path: PathBuf) -> Result<(), Error> {
        let socket = Arc::new(crate::sys::watch(socket).map_err(Error::Watch)?);
        let (this, of) = (self.clone(), Arc::downgrade(entry));
        let init = entry.init.clone();
        let task = tokio::spawn(async move {
            let received = async {
                let (mut budget, mut refilled) = (BURST, Instant::now());
                let mut extension = TimeExtension::default();
                loop {
                    let message = receive(&socket, &init.key.task).await?;
                    let Some(entry) = of.upgrade() else {
                        return Ok(());
                    };
                    if let Some(message) = message {
                        this.pass_on(&entry, &message, &mut extension).await;
                    }
                    let gained = refilled.elapsed().as_millis() / PAUSE.as_millis();
                    if gained > 0 {
                        budget = budget.saturating_add(u32::try_from(gained).unwrap_or(BURST)).min(BURST);
                        refilled = Instant::now();
                    }
                    budget = budget.saturating_sub(1);
                    if budget == 0 {
                        tokio::time::sleep(PAUSE).await;
                    }
                }
            };
            tokio::select! {
                received = received => {
                    let received: std::io::Result<()> = received;
                    if let Err(error) = received {
                        tracing::error!(process = %init.key, %error, "{}: its notifications (sd_notify) are lost: {error}", init.key);
                    }
                }
                _ = init.ended() => {}
            }
        });
        entry.init.live().listening = Some(Listening { path, task });
        Ok(())
    }

    /// Forwards a notification to systemd, if its sender is a process of the container.
    async fn pass_on(&self, entry: &Entry, message: &Message, extension: &mut TimeExtension) {
        let said = Notification::read(&message.text);
        let (main, container) = {
            let task = entry.task();
            (task.init.pid(), task.cgroup().map(Path::to_owned))
        };
        let (Some(main), Some(container)) = (main, container) else {
            return;
        };
        // A process of the container may have passed the socket to somebody else.
        let lives_in = cgroup::of_process(message.sender);
        if !lives_in.is_ok_and(|cgroup| cgroup.starts_with(&container)) {
            tracing::debug!(task = %entry.key, sender = message.sender, "task {}: dropped a notification from a process that is not in its cgroup", entry.key);
            return;
        }
        let extended = match said.extend_usec {
            Some(asked) => {
                let limit = self.manager.stop_limit(&entry.init.unit).await;
                let limit = limit
                    .unwrap_or_else(|_| u64::try_from(config::STOP_LIMIT.as_micros()).unwrap_or(u64::MAX));
                extension.grant(asked, limit, Instant::now())
            }
            None => None,
        };
        let Some(text) = said.text(extended) else {
            return;
        };
        let lives = || entry.init.live().process.as_ref().is_some_and(|process| is_alive(process));
        if let Err(error) = self.relay.tell(&text, main, lives).await {
            tracing::warn!(task = %entry.key, %error, "task {}: can't pass its notification on to systemd: {error}", entry.key);
        }
    }
}

/// A message from a process of a container.
struct Message {
    text: Vec<u8>,
    sender: u32,
}

/// Receives the next message. `None` if it is too long or has no sender.
///
/// The kernel closes the descriptors that come with a message, so `BARRIER=1` is answered after all messages before it. The
/// thread that receives the message waits for that: at a TCP connection with `SO_LINGER`, as long as the sender likes.
async fn receive(socket: &Arc<AsyncFd<OwnedFd>>, task: &TaskKey) -> std::io::Result<Option<Message>> {
    loop {
        let mut ready = socket.readable().await?;
        let shared = socket.clone();
        match waiting(WaitsFor::Notification, task, move || receive_now(shared.get_ref())).await {
            Ok(Err(Errno::EAGAIN)) => ready.clear_ready(),
            Ok(received) => return Ok(received?),
            // There is no thread at the moment. The message stays in the socket.
            Err(_) => tokio::time::sleep(PAUSE).await,
        }
    }
}

fn receive_now(socket: &OwnedFd) -> Result<Option<Message>, Errno> {
    let mut text = vec![0; MESSAGE_MAX + 1];
    let (length, sender) = crate::sys::receive_from_process(socket, &mut text)?;
    text.truncate(length);
    Ok(sender.filter(|_| length <= MESSAGE_MAX).map(|sender| Message { text, sender }))
}

/// Every user in the container may write to the socket; only root can enter its directory on the host.
fn open(path: &Path) -> std::io::Result<OwnedFd> {
    if let Some(parent) = path.parent() {
        files::make_dir(parent, 0o700)?;
    }
    // An earlier daemon may have left a socket at this path.
    let _ = fs::remove_file(path);
    let socket = UnixDatagram::bind(path)?;
    socket.set_nonblocking(true)?;
    setsockopt(&socket, sockopt::PassCred, &true)?;
    fs::set_permissions(path, fs::Permissions::from_mode(0o666))?;
    Ok(socket.into())
}

/// True if the process has not ended.
fn is_alive(process: &OwnedFd) -> bool {
    sys::ends_within(process, Duration::ZERO) == Ok(false)
}
