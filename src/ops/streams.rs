//! The streams of an init process: what the daemon opens, copies and closes.

use std::io;
use std::path::Path;
use std::sync::Arc;

use tokio::io::AsyncReadExt;
use tokio::net::unix::pipe;

use crate::config;
use crate::id::{TaskKey, UnitName};
use crate::oci::face;
use crate::stdio::{fifo, pump};
use crate::task::Task;
use crate::task::wiring::{self, Input, Output};
use crate::unit::properties::{self, Shown};

use super::{Entry, Error, Live, Shim, blocking};

impl Shim {
    /// Opens what has to be open before the container is.
    pub(super) async fn open_streams(&self, entry: &Arc<Entry>, task: &Task) -> Result<(), Error> {
        let dir = self.store.dir(&task.key);
        for name in task.wiring.own_pipes() {
            fifo::make(&dir.join(name))?;
        }
        self.reopen_streams(entry, task).await
    }

    /// Opens the daemon's ends of FIFOs that exist.
    async fn reopen_streams(&self, entry: &Arc<Entry>, task: &Task) -> Result<(), Error> {
        let (wiring, dir) = (task.wiring.clone(), self.store.dir(&task.key));
        let (stdin, held) = blocking(move || -> Result<_, Error> {
            let stdin = match &wiring.stdin {
                Input::Fifo(path) => Some(fifo::open_both(path)?),
                Input::Null => None,
            };
            let mut held = Vec::new();
            for name in wiring.own_pipes() {
                let path = dir.join(name);
                // For a logger the daemon is a writer too, until the container is: it must not see EOF.
                let logged = wiring.logger.is_some() && name != wiring::pipe::READY;
                held.push((name, if logged { fifo::open_both(&path)? } else { fifo::open_reader(&path)? }));
            }
            Ok((stdin, held))
        })
        .await??;
        let mut live = entry.live();
        live.stdin = stdin;
        live.held = held;
        Ok(())
    }

    /// Starts copying to files, and lets go of what others read. The container has its ends now.
    pub(super) fn start_pumps(&self, entry: &Arc<Entry>) {
        let task = entry.task().clone();
        let held = std::mem::take(&mut entry.live().held);
        let streams = [
            (task.wiring.stdout_pipe(), &task.wiring.stdout),
            (task.wiring.stderr_pipe(), &task.wiring.stderr),
        ];
        let mut pumps = Vec::new();
        for (name, fifo) in held {
            let Some((_, Output::File { path, create })) =
                streams.iter().find(|(pipe, _)| *pipe == Some(name))
            else {
                continue;
            };
            let (path, create, key) = (path.clone(), *create, task.key.clone());
            pumps.push(tokio::spawn(async move {
                if let Err(error) = copy(fifo, &path, create).await {
                    tracing::error!(task = %key, %error, "task {key}: output to {} is lost: {error}", path.display());
                }
            }));
        }
        entry.live().pumps = pumps;
    }

    /// Starts the logger in a unit of its own, and waits until it is ready.
    pub(super) async fn start_logger(
        &self,
        entry: &Arc<Entry>,
        task: &Task,
        unit: &UnitName,
    ) -> Result<(), Error> {
        let Some(logger) = &task.wiring.logger else {
            return Ok(());
        };
        let command = self.launch_command(&task.key, "logger");
        let description = format!("Logger of {}", task.face.description);
        let shown = Shown {
            description: &description,
            identifier: face::identifier(&task.face),
            fields: &task.face.fields,
            slice: task.placement.slice(),
        };
        let ready = {
            let mut live = entry.live();
            let at = live.held.iter().position(|(name, _)| *name == wiring::pipe::READY);
            at.map(|at| live.held.swap_remove(at).1)
        };
        self.manager.start_transient(unit, &properties::logger(&shown, &command)).await?;
        let failed = |reason: String| Error::Logger { program: logger.program.display().to_string(), reason };
        let ready = ready.ok_or_else(|| failed("its pipe is gone".to_owned()))?;
        match tokio::time::timeout(config::STDIO_LIMIT, is_ready(ready)).await {
            Ok(Ok(byte)) if byte || !logger.strict => Ok(()),
            Ok(Ok(_)) => Err(failed("it closed its pipe without a byte".to_owned())),
            Ok(Err(error)) => Err(failed(error.to_string())),
            Err(_) => Err(failed(format!("nothing within {} s", config::STDIO_LIMIT.as_secs()))),
        }
    }

    /// Lets a logger end, which has seen the end of the streams; then ends it.
    pub(super) async fn stop_logger(&self, unit: &UnitName) -> Result<(), Error> {
        self.manager.stop(unit).await?;
        Ok(self.manager.reset_failed(unit).await?)
    }

    /// Waits until everything that the container wrote is in its file. Something that outlives the
    /// container and holds its output is not waited for without end.
    pub(super) async fn drain(&self, entry: &Arc<Entry>) {
        let pumps = std::mem::take(&mut entry.live().pumps);
        for mut pump in pumps {
            if tokio::time::timeout(DRAIN_LIMIT, &mut pump).await.is_err() {
                tracing::warn!(task = %entry.key, "task {}: output is still open after the end, it is closed now", entry.key);
                pump.abort();
            }
        }
    }

    /// After a restart: the daemon's ends of the streams of a task that lives.
    pub(super) async fn recover_streams(&self, entry: &Arc<Entry>) {
        let task = entry.task().clone();
        if let Err(error) = self.reopen_streams(entry, &task).await {
            tracing::warn!(task = %task.key, %error, "task {}: can't open its streams again: {error}", task.key);
        }
        self.start_pumps(entry);
    }

    /// CloseIO: the process sees EOF on its stdin once every client has closed it as well.
    ///
    /// # Errors
    /// There is no such task.
    pub fn close_stdin(&self, key: &TaskKey) -> Result<(), Error> {
        self.created(key)?.live().stdin = None;
        Ok(())
    }
}

impl Live {
    /// The process has ended: nobody reads its stdin any more.
    pub(super) fn close_input(&mut self) {
        self.stdin = None;
    }
}

/// As containerd-shim-runc-v2.
const DRAIN_LIMIT: std::time::Duration = std::time::Duration::from_secs(10);

async fn copy(fifo: std::fs::File, path: &Path, create: bool) -> Result<(), Error> {
    let target = path.to_owned();
    let file = blocking(move || pump::open_file(&target, create)).await??;
    let failed = |source| fifo::Error::Io { action: "copy to", path: path.to_owned(), source };
    Ok(pump::copy(fifo, file).await.map_err(failed)?)
}

/// Waits for the first byte on a pipe, or for its end; true for a byte.
///
/// The pipe is read only once the kernel reports something: before its writer has come it would look
/// as if it had ended.
async fn is_ready(ready: std::fs::File) -> io::Result<bool> {
    let mut ready = pipe::Receiver::from_file(ready)?;
    Ok(ready.read(&mut [0]).await? > 0)
}
