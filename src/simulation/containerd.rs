//! A containerd for tests, which accepts every event, and the descriptor store that keeps the connections over which daemons
//! publish events.

use std::fs;
use std::io::{self, Read, Write};
use std::os::fd::{BorrowedFd, OwnedFd};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use async_trait::async_trait;
use containerd_shim_protos::api::ForwardRequest;
use containerd_shim_protos::events::task::TaskExit;
use containerd_shim_protos::shim::event::Envelope;
use containerd_shim_protos::topics;
use protobuf::Message;
use tokio::sync::mpsc::{UnboundedReceiver, unbounded_channel};
use ttrpc::Response;

use crate::effects::Effects;
use crate::services::Entry;
use crate::transport::ConnectionStore;
use crate::transport::frame::{Assembler, Frame};

/// A containerd that outlives the daemons of a node.
pub(super) struct FakeContainerd {
    socket: PathBuf,
    listener: UnixListener,
    state: Mutex<State>,
}

#[derive(Default)]
struct State {
    connections: Vec<(UnixStream, Assembler)>,
    /// Each event that has come, as a word.
    events: Vec<&'static str>,
    /// True if it hangs.
    hangs: bool,
}

impl FakeContainerd {
    /// A containerd that listens at this path.
    pub(super) fn listen(socket: PathBuf) -> Arc<Self> {
        let listener = UnixListener::bind(&socket).unwrap();
        listener.set_nonblocking(true).unwrap();
        Arc::new(Self { socket, listener, state: Mutex::default() })
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// It ends: nobody can connect until it [comes back](Self::come_back).
    pub(super) fn leave(&self) {
        fs::rename(&self.socket, self.socket.with_extension("away")).unwrap();
        self.state().connections.clear();
    }

    /// It listens again.
    pub(super) fn come_back(&self) {
        fs::rename(self.socket.with_extension("away"), &self.socket).unwrap();
    }

    /// From now on, it answers nothing.
    pub(super) fn hang(&self) {
        self.state().hangs = true;
    }

    /// Where it listens for events.
    pub(super) fn address(&self) -> String {
        self.socket.display().to_string()
    }

    /// The events that have come, also those that came twice.
    pub(super) fn events(&self) -> Vec<&'static str> {
        self.state().events.clone()
    }

    /// Those of the tasks that owe events to this containerd, until the daemon ends. A test must not send events to the containerd
    /// of the machine that it runs on.
    pub(super) fn only(
        &self,
        mut tasks: UnboundedReceiver<Arc<Entry>>,
        effects: Arc<Effects>,
    ) -> UnboundedReceiver<Arc<Entry>> {
        let (sender, own) = unbounded_channel();
        let address = self.address();
        tokio::spawn(async move {
            while let Some(entry) = tasks.recv().await {
                let of_task = entry.task().containerd.ttrpc_address.clone();
                assert!(of_task == address || of_task.is_empty(), "an event would go to {of_task}");
                if effects.is_dead() {
                    return;
                }
                // The publisher works as long as the daemon.
                let _ = sender.send(entry);
            }
        });
        own
    }

    /// Accepts all events that daemons have sent by now. Never waits.
    pub(super) fn tick(&self) {
        let mut state = self.state();
        let State { connections, events, hangs } = &mut *state;
        if *hangs {
            return;
        }
        while let Ok((connection, _)) = self.listener.accept() {
            connection.set_nonblocking(true).unwrap();
            connections.push((connection, Assembler::default()));
        }
        connections.retain_mut(|(connection, assembler)| {
            let mut bytes = [0; 8192];
            loop {
                let length = match connection.read(&mut bytes) {
                    Err(error) if error.kind() == io::ErrorKind::WouldBlock => return true,
                    Ok(0) | Err(_) => return false,
                    Ok(length) => length,
                };
                for (_, frame) in assembler.push(&bytes[..length]) {
                    events.push(event(&frame));
                    let response = Frame::response(frame.stream(), &Response::new()).unwrap();
                    connection.write_all(&response.bytes).unwrap();
                }
            }
        });
    }
}

/// The event in the frame of a call, as a word.
fn event(frame: &Frame) -> &'static str {
    let request = ForwardRequest::parse_from_bytes(&frame.request().unwrap().payload).unwrap();
    let Envelope { topic, event, .. } = &*request.envelope;
    match topic.as_str() {
        topics::TASK_CREATE_EVENT_TOPIC => "create",
        topics::TASK_START_EVENT_TOPIC => "start",
        topics::TASK_PAUSED_EVENT_TOPIC => "paused",
        topics::TASK_RESUMED_EVENT_TOPIC => "resumed",
        topics::TASK_OOM_EVENT_TOPIC => "oom",
        topics::TASK_EXIT_EVENT_TOPIC => {
            let exit = TaskExit::parse_from_bytes(&event.value).unwrap();
            if exit.id == exit.container_id { "exit" } else { "exec-exit" }
        }
        topics::TASK_EXEC_ADDED_EVENT_TOPIC => "exec-added",
        topics::TASK_EXEC_STARTED_EVENT_TOPIC => "exec-started",
        topics::TASK_DELETE_EVENT_TOPIC => "delete",
        other => unreachable!("containerd does not know the event {other}"),
    }
}

/// Keeps event connections from one daemon of a node to the next.
pub(super) struct KeptConnections {
    effects: Arc<Effects>,
    /// A daemon that has ended closes its copies of the descriptors. It does not tell the descriptor store to do so.
    is_over: AtomicBool,
    kept: Mutex<Vec<(String, OwnedFd)>>,
}

impl KeptConnections {
    pub(super) fn new(effects: Arc<Effects>) -> Arc<Self> {
        Arc::new(Self { effects, is_over: AtomicBool::new(true), kept: Mutex::default() })
    }

    fn kept(&self) -> MutexGuard<'_, Vec<(String, OwnedFd)>> {
        self.kept.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// A daemon starts, and gets the connections.
    pub(super) fn begin(&self) -> Vec<(String, OwnedFd)> {
        self.is_over.store(false, Ordering::Relaxed);
        self.kept().iter().map(|(name, fd)| (name.clone(), fd.try_clone().unwrap())).collect()
    }

    /// The daemon has ended.
    pub(super) fn end(&self) {
        self.is_over.store(true, Ordering::Relaxed);
    }
}

#[async_trait]
impl ConnectionStore for KeptConnections {
    async fn keep(&self, name: &str, fds: &[BorrowedFd<'_>]) -> io::Result<()> {
        self.kept().extend(fds.iter().map(|fd| (name.to_owned(), fd.try_clone_to_owned().unwrap())));
        Ok(())
    }

    fn forget(&self, name: &str) {
        if !self.is_over.load(Ordering::Relaxed) && !self.effects.is_dead() {
            self.kept().retain(|(kept, _)| kept != name);
        }
    }
}
