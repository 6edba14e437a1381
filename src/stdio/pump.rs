//! Pumps: copy the output of processes from a FIFO of the daemon or a terminal to the client, the journal or a logger.

use std::fs::{File, OpenOptions};
use std::io;
use std::os::fd::OwnedFd;
use std::pin::{Pin, pin};
use std::sync::Arc;
use std::time::Duration;

use futures_util::future::BoxFuture;
use nix::errno::Errno;
use nix::fcntl::splice;
use nix::poll::PollFlags;
use tokio::io::unix::AsyncFd;
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;

use crate::sys::{once_there_is_room, watch};

use super::aside::{Aside, Diverted, Diverter};
use super::journal::Lines;
use super::log_file::LogFile;
use super::pipe::{
    CHUNK, NO_WAIT, ONLY_EMPTY, PIECE, PipePair, Scratch, data_in, found, free_in, grow, has_writer,
    is_ready, length_in, room_in,
};
use super::terminal::Terminal;
use super::terminal_pump::move_terminal;

/// How long the pump waits for the end of a line. Until then the line stays in the pipe, where it outlives the daemon.
const LINE_WAIT: Duration = Duration::from_secs(1);
/// The limit if a client waits for the output, such as a prompt.
const PROMPT_WAIT: Duration = Duration::from_millis(10);

/// The pause after a look at a pipe that found only empty buffers, although the pipe has bytes.
const EMPTY_PAUSE: Duration = Duration::from_millis(10);

/// How long the journal's copy may take after everything has reached the client. Delete waits for it, and journald may be
/// slow. What is left then is counted as missing.
const LATE: Duration = Duration::from_secs(3);
/// The same limit in a daemon that finds only the journal's copy left to deliver. It is short, because a daemon that
/// is killed again and again would wait each time.
const LATE_AFTER_RESTART: Duration = Duration::from_millis(200);

/// The source of a process's output.
#[derive(Debug)]
pub enum Source {
    /// A FIFO of the daemon, in non-blocking mode. The process must have opened it before copying begins: a FIFO without a
    /// writer looks as if it had ended.
    Fifo(AsyncFd<OwnedFd>),
    Terminal(Arc<Terminal>),
    /// A terminal and a pipe, which holds what was read and not delivered.
    Bridged(Arc<Terminal>, PipePair),
    /// Everything was delivered, except what is in the pipe of an [`Aside`].
    Delivered,
}

impl Source {
    /// A FIFO that was opened in non-blocking mode.
    ///
    /// # Errors
    /// The FIFO can't be watched. Needs the async runtime.
    pub fn fifo(file: File) -> io::Result<Self> {
        watch(file).map(Self::Fifo)
    }
}

/// The destinations of a process's output.
#[derive(Debug, Default)]
pub struct Sinks {
    /// A FIFO, opened for reading and writing in non-blocking mode: it always has a reader. A client that does not read
    /// blocks the process, but not the daemon.
    pub fifo: Option<AsyncFd<OwnedFd>>,
    /// Other destinations.
    pub copies: Vec<Sink>,
    /// A FIFO that is kept open until the end, and gets no output.
    pub keep_open: Option<File>,
    /// A copy that no other sink waits for.
    pub aside: Option<Box<Aside>>,
}

/// The output of a process: where it comes from, and where it goes.
#[derive(Debug)]
pub struct Output {
    pub source: Source,
    pub sinks: Sinks,
}

/// What a pump waits for besides output. A reference, because each future that contains another one has its arguments twice, and
/// a pump exists for as long as its process.
pub(super) type Event<'a> = Pin<&'a mut (dyn Future<Output = ()> + Send)>;

/// A destination for which the daemon must read the output.
#[derive(Debug)]
pub enum Sink {
    File(LogFile),
    Journal(Lines),
    /// The pipe of an [`Aside`].
    Pipe(Box<Diverter>),
}

impl Sink {
    async fn write(&mut self, bytes: &[u8]) {
        match self {
            Self::File(file) => Box::pin(file.write(bytes)).await,
            Self::Journal(lines) => Box::pin(lines.write(bytes)).await,
            Self::Pipe(pipe) => pipe.write(bytes).await,
        }
    }
}

/// Ends pumps whose source does not end.
#[derive(Clone, Debug, Default)]
pub struct Stop {
    /// Delivers what is in the FIFO, and ends once the FIFO is empty.
    pub when_empty: CancellationToken,
    /// Ends at once. What was not delivered is lost.
    pub now: CancellationToken,
}

/// Copies until the source has ended and is empty, or until `stop`.
///
/// `over` resolves when the process has ended. The pump then stops reading a terminal, even if other processes have it
/// open, but continues with a FIFO, to which background processes may still write. A sink that accepts no output for a
/// while is logged. The process and the other sinks continue, and the sink does once it accepts output again.
///
/// All bytes stay in the kernel: the pump moves them from pipe to pipe (splice(2)), and duplicates what it must read
/// (tee(2)) before it moves it. If the daemon ends, no byte is lost, and the client's FIFO gets no byte twice. A file or
/// the journal gets the last piece ([`PIECE`]) twice if the daemon ends between writing and moving it, the copy of an
/// [`Aside`] the last [`CHUNK`].
///
/// `delivered` is called once everything has reached its sinks, except an [`Aside`].
pub async fn copy(
    mut output: Box<Output>,
    mut over: BoxFuture<'static, ()>,
    stop: Stop,
    delivered: impl FnOnce(),
) {
    let Stop { when_empty, now: stop } = stop;
    let (mut diverter, mut journal) = match output.sinks.aside.take().map(|aside| aside.split()) {
        Some((diverter, reader, lines)) => {
            let policy = diverter.policy.clone();
            (Some(diverter), Some((reader, [Sink::Journal(lines)], policy)))
        }
        None => (None, None),
    };
    let late = if matches!(output.source, Source::Delivered) { LATE_AFTER_RESTART } else { LATE };
    let ended = CancellationToken::new();
    let deliver = async {
        let Output { source, sinks } = &mut *output;
        let complete = pin!(when_empty.cancelled());
        tokio::select! {
            copied = deliver(source, sinks, diverter.take(), over.as_mut(), complete) => log_failure(copied),
            () = stop.cancelled() => {}
        }
        Box::pin(finish(&mut sinks.copies)).await;
        drop(output);
        delivered();
        ended.cancel();
    };
    let journal = async {
        if let Some((reader, copies, policy)) = &mut journal {
            let is_late = async {
                ended.cancelled().await;
                tokio::time::sleep(late).await;
            };
            let (over, complete) = (pin!(ended.cancelled()), pin!(ended.cancelled()));
            tokio::select! {
                copied = spread(reader, copies, None, CHUNK, over, complete) => log_failure(copied),
                () = stop.cancelled() => {}
                () = is_late => policy.drop_bytes(length_in(reader)),
            }
            Box::pin(finish(copies)).await;
        }
    };
    tokio::join!(deliver, journal);
}

fn log_failure(copied: io::Result<()>) {
    if let Err(error) = copied {
        tracing::error!(%error, "stopped copying output: {error}");
    }
}

/// Writes incomplete lines to the journal.
async fn finish(copies: &mut [Sink]) {
    for sink in copies {
        if let Sink::Journal(lines) = sink {
            lines.finish().await;
        }
    }
}

/// Copies to every sink except the journal's pipe, which `diverter` serves.
async fn deliver(
    source: &Source,
    sinks: &mut Sinks,
    diverter: Option<Box<Diverter>>,
    over: Event<'_>,
    complete: Event<'_>,
) -> io::Result<()> {
    match source {
        Source::Fifo(from) => deliver_pipe(from, sinks, diverter, over, complete).await,
        // Boxed, because most processes have no terminal.
        Source::Terminal(terminal) => match &sinks.fifo {
            Some(to) => Box::pin(move_terminal(terminal, to, over)).await,
            None => Ok(()),
        },
        Source::Bridged(terminal, bridge) => {
            Box::pin(deliver_bridged(terminal, bridge, sinks, diverter, over)).await
        }
        Source::Delivered => Ok(()),
    }
}

/// Copies from a terminal by way of a pipe.
async fn deliver_bridged(
    terminal: &Terminal,
    bridge: &PipePair,
    sinks: &mut Sinks,
    diverter: Option<Box<Diverter>>,
    over: Event<'_>,
) -> io::Result<()> {
    let moved = CancellationToken::new();
    let (second_over, complete) = (pin!(moved.cancelled()), pin!(moved.cancelled()));
    let second = deliver_pipe(&bridge.reader, sinks, diverter, second_over, complete);
    let first = async {
        let result = move_terminal(terminal, &bridge.writer, over).await;
        moved.cancel();
        result
    };
    let (first, second) = tokio::join!(first, second);
    first.and(second)
}

/// What is known of the end of an output. First the process ends, and then the output is complete.
struct End<'a> {
    over: Event<'a>,
    complete: Event<'a>,
    is_over: bool,
    is_complete: bool,
}

impl<'a> End<'a> {
    fn new(over: Event<'a>, complete: Event<'a>) -> Self {
        Self { over, complete, is_over: false, is_complete: false }
    }

    /// Waits for something in a pipe, or until the output is complete.
    async fn or_complete(&mut self, wait: impl Future<Output = io::Result<()>>) -> io::Result<()> {
        if self.is_complete {
            return wait.await;
        }
        tokio::select! {
            found = wait => found?,
            () = &mut self.complete => self.is_complete = true,
        }
        Ok(())
    }

    /// Waits until a pipe has room, or the output is complete. The pipe grows once the process has ended: a client that reads
    /// late gets the rest of the output, and Delete does not wait for the client.
    async fn room_in(&mut self, to: &AsyncFd<OwnedFd>) -> io::Result<()> {
        if length_in(to) == 0 {
            // Empty buffers of the source may fill the client's FIFO, and the kernel does not wake the client for them. A read
            // removes them: the pump has the FIFO open for both, and is its only writer.
            let _ = nix::unistd::read(to, &mut [0]);
        }
        if !self.is_over {
            tokio::select! {
                found = room_in(to) => return found,
                () = &mut self.over => self.is_over = true,
            }
        }
        if is_ready(to, PollFlags::POLLOUT)? || grow(to) {
            return Ok(());
        }
        self.or_complete(room_in(to)).await
    }
}

/// Copies from a pipe until it ends, or, once `complete`, until it is empty.
async fn deliver_pipe(
    from: &AsyncFd<OwnedFd>,
    sinks: &mut Sinks,
    diverter: Option<Box<Diverter>>,
    over: Event<'_>,
    complete: Event<'_>,
) -> io::Result<()> {
    match (&sinks.fifo, diverter) {
        (Some(to), diverter) if sinks.copies.is_empty() => move_all(from, to, diverter, over, complete).await,
        (to, diverter) => {
            sinks.copies.extend(diverter.map(Sink::Pipe));
            // Boxed, because few processes need it.
            Box::pin(spread(from, &mut sinks.copies, to.as_ref(), PIECE, over, complete)).await
        }
    }
}

/// Moves from pipe to pipe until the source ends, or, once `complete`, until it is empty.
async fn move_all(
    from: &AsyncFd<OwnedFd>,
    to: &AsyncFd<OwnedFd>,
    mut diverter: Option<Box<Diverter>>,
    over: Event<'_>,
    complete: Event<'_>,
) -> io::Result<()> {
    let mut end = End::new(over, complete);
    loop {
        // Waits for room before duplicating: if the daemon ended while it waits, the duplicate would be made twice.
        let duplicates = diverter.as_ref().is_some_and(|diverter| !diverter.policy.is_exhausted());
        if duplicates && found(from, PollFlags::POLLIN)? {
            end.room_in(to).await?;
        }
        // Tries before it waits: a FIFO that is opened again after its writer has closed it never becomes ready.
        let moved = match &mut diverter {
            None => splice(from, None, to, None, CHUNK, NO_WAIT),
            // A large piece wakes the client less often. But it has to fit: while the rest of a piece waits for the client, an end
            // of the daemon would cause a second duplicate.
            Some(diverter) => match diverter.divert(from, free_in(to).max(PIECE)).await {
                Ok(Diverted::Copied(length)) => {
                    move_copied(from, to, length, &mut end).await?;
                    Ok(length)
                }
                Ok(Diverted::Skipped) => splice(from, None, to, None, CHUNK, NO_WAIT)
                    .inspect(|moved| diverter.policy.drop_bytes(*moved)),
                Err(errno) => Err(errno),
            },
        };
        let moved = match moved {
            Ok(moved) => Some(moved),
            Err(Errno::EAGAIN) => None,
            Err(Errno::EINTR) => continue,
            Err(errno) => return Err(errno.into()),
        };
        if let Some(moved) = moved {
            if moved == 0 {
                return Ok(());
            }
            tokio::task::consume_budget().await;
            continue;
        }
        // The kernel does not report which of the two sides is not ready, and no end if `to` is full. Without a writer, no data
        // comes any more.
        let is_ended = end.is_complete || !has_writer(from)?;
        if found(from, PollFlags::POLLIN)? {
            end.room_in(to).await?;
        } else if is_ended {
            return Ok(());
        } else {
            end.or_complete(data_in(from)).await?;
        }
    }
}

/// Moves bytes from pipe to pipe that were copied before. Fewer if another process has read some of them: the processes of a
/// container can open their own output for reading.
async fn move_copied(
    from: &AsyncFd<OwnedFd>,
    to: &AsyncFd<OwnedFd>,
    mut length: usize,
    end: &mut End<'_>,
) -> io::Result<()> {
    while length > 0 {
        match splice(from, None, to, None, length, NO_WAIT) {
            Ok(0) => return Ok(()),
            Ok(moved) => length -= moved,
            Err(Errno::EAGAIN) if !found(from, PollFlags::POLLIN)? => return Ok(()),
            Err(Errno::EAGAIN) => end.room_in(to).await?,
            Err(Errno::EINTR) => {}
            Err(errno) => return Err(errno.into()),
        }
    }
    Ok(())
}

/// The pause after each [`CHUNK`] of output that is dropped because it exceeds the limit of the journal.
const SKIP_PAUSE: Duration = Duration::from_millis(1);

/// Copies output from a pipe to `copies`, and moves the output to `fifo`, until the pipe ends, or, once `complete`, until the pipe is
/// empty. Moves up to `most` bytes at once, of which a copy comes twice if the daemon ends in between.
async fn spread(
    from: &AsyncFd<OwnedFd>,
    copies: &mut [Sink],
    fifo: Option<&AsyncFd<OwnedFd>>,
    most: usize,
    over: Event<'_>,
    complete: Event<'_>,
) -> io::Result<()> {
    // Allocated only while there is output: most processes write nothing most of the time.
    let mut looking = None;
    let mut end = End::new(over, complete);
    let wait = if fifo.is_some() { PROMPT_WAIT } else { LINE_WAIT };
    // The time at which an incomplete line is copied. `None` if there is no such line.
    let mut deadline = None;
    loop {
        let (scratch, nowhere) = match &mut looking {
            Some(found) => found,
            None => {
                let open = || Ok((Scratch::new(most)?, OpenOptions::new().write(true).open("/dev/null")?));
                looking.insert(Box::pin(once_there_is_room("output", open)).await?)
            }
        };
        if let ([Sink::Journal(lines)], None) = (&mut *copies, fifo)
            && lines.is_over_limit()
        {
            match splice(from, None, &*nowhere, None, CHUNK, NO_WAIT) {
                Ok(0) => return Ok(()),
                Ok(moved) => {
                    lines.skip(moved);
                    // Otherwise a process that writes as fast as it can would occupy a thread of the daemon.
                    tokio::time::sleep(SKIP_PAUSE).await;
                }
                Err(Errno::EAGAIN) if end.is_complete => return Ok(()),
                Err(Errno::EAGAIN) => end.or_complete(data_in(from)).await?,
                Err(Errno::EINTR) => {}
                Err(errno) => return Err(errno.into()),
            }
            continue;
        }
        let mut length = match scratch.look(from, most) {
            Ok(0) => return Ok(()),
            Ok(length) => length,
            Err(Errno::EAGAIN) if end.is_complete => return Ok(()),
            Err(Errno::EAGAIN) => {
                looking = None;
                end.or_complete(data_in(from)).await?;
                continue;
            }
            Err(ONLY_EMPTY) if end.is_complete => return Ok(()),
            Err(ONLY_EMPTY) => {
                end.or_complete(changed(from)).await?;
                continue;
            }
            Err(Errno::EINTR) => continue,
            Err(errno) => return Err(errno.into()),
        };
        match memchr::memrchr(b'\n', &scratch.buffer[..length]) {
            Some(last) => length = last + 1,
            None if end.is_complete || length >= PIECE || !has_writer(from)? => {}
            None if deadline.is_some_and(|deadline| deadline <= Instant::now()) => {}
            None => {
                // An incomplete line waits in the pipe, where it outlives the daemon.
                let more = async {
                    from.readable().await?.clear_ready();
                    from.readable().await.map(drop)
                };
                let deadline = *deadline.get_or_insert_with(|| Instant::now() + wait);
                tokio::select! {
                    _ = tokio::time::timeout_at(deadline, more) => {}
                    () = &mut end.complete => end.is_complete = true,
                }
                continue;
            }
        }
        deadline = None;
        write_to(copies, &scratch.buffer[..length]).await;
        match fifo {
            Some(fifo) => move_copied(from, fifo, length, &mut end).await?,
            None => drop_copied(from, nowhere, length)?,
        }
        tokio::task::consume_budget().await;
    }
}

/// Waits until somebody writes to a pipe that has only empty buffers, or until its last writer closes it. poll(2) always reports such a
/// pipe as readable.
async fn changed(from: &AsyncFd<OwnedFd>) -> io::Result<()> {
    let mut ready = from.readable().await?;
    // What happens after this look is an event that `clear_ready` does not clear.
    if length_in(from) == 0 && has_writer(from)? {
        ready.clear_ready();
        return from.readable().await.map(drop);
    }
    // If the bytes are behind too many empty buffers, the next look finds nothing, either.
    tokio::time::sleep(EMPTY_PAUSE).await;
    Ok(())
}

/// Removes bytes from a pipe that were copied before, as [`move_copied`].
fn drop_copied(from: &AsyncFd<OwnedFd>, nowhere: &File, mut length: usize) -> io::Result<()> {
    while length > 0 {
        match splice(from, None, nowhere, None, length, NO_WAIT) {
            Ok(0) | Err(Errno::EAGAIN) => return Ok(()),
            Ok(moved) => length -= moved,
            Err(Errno::EINTR) => {}
            Err(errno) => return Err(errno.into()),
        }
    }
    Ok(())
}

async fn write_to(sinks: &mut [Sink], bytes: &[u8]) {
    for sink in sinks {
        sink.write(bytes).await;
    }
}

#[cfg(test)]
mod tests;
