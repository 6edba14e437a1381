//! Sends messages to journald, and never waits for it: a thread that waits for a journald that hangs serves nobody.
//!
//! Messages that journald does not take at once wait in memory, up to a limit. Further ones are counted, and the journal gets
//! their number once it takes messages again.

use std::collections::VecDeque;
use std::io;
use std::os::unix::net::UnixDatagram;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use nix::errno::Errno;
use nix::sys::socket::{getsockopt, sockopt};

/// How many bytes of messages wait for journald: about 2,000 messages.
const MOST_WAITING: usize = 1 << 20;

/// What the kernel needs of a socket's buffer in addition to a datagram (`unix_dgram_sendmsg()`).
const OVERHEAD: usize = 32;

/// The pause before messages that wait are sent again. It doubles with each try, up to the second number.
const PAUSE: [Duration; 2] = [Duration::from_millis(50), Duration::from_secs(5)];

/// Makes the message that so many messages are missing.
type Missing = Box<dyn Fn(u64) -> Vec<u8> + Send + Sync>;

pub struct Sender {
    socket: UnixDatagram,
    /// journald's socket, which may be made again at any time.
    journald: PathBuf,
    longest: usize,
    missing: Missing,
    queue: Mutex<Queue>,
}

#[derive(Default)]
struct Queue {
    /// The messages that wait, oldest first.
    waiting: VecDeque<Vec<u8>>,
    bytes: usize,
    /// How many messages were dropped after those that wait.
    dropped: u64,
    /// A task sends the messages that wait.
    has_task: bool,
}

impl Queue {
    fn push(&mut self, message: Vec<u8>) {
        self.bytes += message.len();
        self.waiting.push_back(message);
    }

    fn pop(&mut self) {
        let sent = self.waiting.pop_front();
        self.bytes -= sent.map_or(0, |message| message.len());
    }
}

impl Sender {
    /// Sends messages to this socket, which need not exist yet.
    ///
    /// # Errors
    /// This process can't make a socket.
    pub fn new(journald: &Path, missing: Missing) -> io::Result<Arc<Self>> {
        let socket = UnixDatagram::unbound()?;
        socket.set_nonblocking(true)?;
        let longest = getsockopt(&socket, sockopt::SndBuf)?.saturating_sub(OVERHEAD);
        let (journald, queue) = (journald.to_owned(), Mutex::default());
        Ok(Arc::new(Self { socket, journald, longest, missing, queue }))
    }

    /// The length of the longest message that the kernel takes.
    pub fn longest(&self) -> usize {
        self.longest
    }

    fn queue(&self) -> MutexGuard<'_, Queue> {
        self.queue.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Sends a message, after those that wait.
    pub fn send(self: &Arc<Self>, message: Vec<u8>) {
        let mut queue = self.queue();
        self.send_waiting(&mut queue);
        if queue.bytes + message.len() > MOST_WAITING {
            queue.dropped = queue.dropped.saturating_add(1);
        } else {
            self.add_missing(&mut queue);
            queue.push(message);
            self.send_waiting(&mut queue);
        }
        if queue.waiting.is_empty() || queue.has_task {
            return;
        }
        // Outside of the runtime, messages wait for the next one.
        if let Ok(runtime) = tokio::runtime::Handle::try_current() {
            queue.has_task = true;
            drop(queue);
            runtime.spawn(self.clone().send_later());
        }
    }

    async fn send_later(self: Arc<Self>) {
        let [mut pause, longest] = PAUSE;
        loop {
            tokio::time::sleep(pause).await;
            pause = (pause * 2).min(longest);
            let mut queue = self.queue();
            self.send_waiting(&mut queue);
            if queue.waiting.is_empty() {
                queue.has_task = false;
                return;
            }
        }
    }

    /// Sends messages until none waits, or journald takes no more.
    fn send_waiting(&self, queue: &mut Queue) {
        loop {
            let Some(message) = queue.waiting.front() else {
                if queue.dropped == 0 {
                    return;
                }
                self.add_missing(queue);
                continue;
            };
            match self.socket.send_to(message, &self.journald) {
                Ok(_) => queue.pop(),
                Err(error) if error.raw_os_error() == Some(Errno::EMSGSIZE as i32) => {
                    queue.pop();
                    queue.dropped = queue.dropped.saturating_add(1);
                    if queue.waiting.is_empty() {
                        return;
                    }
                }
                // journald is busy, or away.
                Err(_) => return,
            }
        }
    }

    /// Adds the message that messages were dropped, after those that wait.
    fn add_missing(&self, queue: &mut Queue) {
        match std::mem::take(&mut queue.dropped) {
            0 => {}
            count => queue.push((self.missing)(count)),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use tempfile::TempDir;

    /// A sender to a journald that can be made later.
    fn sender() -> (Arc<Sender>, TempDir, PathBuf) {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("socket");
        let missing = |count| format!("{count} missing").into_bytes();
        (Sender::new(&path, Box::new(missing)).unwrap(), dir, path)
    }

    fn listen(path: &Path) -> UnixDatagram {
        let journald = UnixDatagram::bind(path).unwrap();
        journald.set_nonblocking(true).unwrap();
        journald
    }

    fn received(journald: &UnixDatagram) -> Vec<String> {
        let mut all = Vec::new();
        let mut message = vec![0; MOST_WAITING];
        while let Ok(length) = journald.recv(&mut message) {
            all.push(String::from_utf8_lossy(&message[..length]).into_owned());
        }
        all
    }

    fn numbers(numbers: std::ops::Range<usize>) -> Vec<String> {
        numbers.map(|number| number.to_string()).collect()
    }

    #[tokio::test(start_paused = true)]
    async fn a_journald_that_reads_nothing_delays_nobody_and_later_gets_all_messages_in_order() {
        let (sender, _dir, path) = sender();
        let journald = listen(&path);
        let mut sent = 0;
        // More than the kernel queues.
        while sender.queue().waiting.len() < 3 {
            sender.send(sent.to_string().into_bytes());
            sent += 1;
        }
        let mut all = Vec::new();
        while sender.queue().has_task {
            all.extend(received(&journald));
            tokio::time::sleep(PAUSE[0]).await;
        }
        all.extend(received(&journald));
        assert_eq!(all, numbers(0..sent));
    }

    #[test]
    fn messages_for_which_there_is_no_room_are_counted_where_they_are_missing() {
        let (sender, _dir, path) = sender();
        let long = "x".repeat(MOST_WAITING / 10);
        // journald is away.
        (0..13).for_each(|_| sender.send(long.clone().into_bytes()));
        let journald = listen(&path);
        let mut all = Vec::new();
        while sender.queue().bytes > 0 || all.is_empty() {
            sender.send_waiting(&mut sender.queue());
            all.extend(received(&journald));
        }
        assert_eq!(all.len(), 11);
        assert_eq!((all[9].len(), all[10].as_str()), (long.len(), "3 missing"));
        sender.send(b"back".to_vec());
        assert_eq!(received(&journald), ["back"]);
    }

    #[test]
    fn a_message_that_the_kernel_refuses_is_counted_and_the_next_one_is_sent() {
        let (sender, _dir, path) = sender();
        let journald = listen(&path);
        sender.send(vec![b'x'; sender.longest()]);
        assert_eq!(received(&journald).concat().len(), sender.longest());
        sender.send(vec![b'x'; sender.longest() + 1]);
        assert!(received(&journald).is_empty());
        sender.send(b"next".to_vec());
        assert_eq!(received(&journald), ["1 missing", "next"]);
    }
}
