//! A socket that holds descriptors in its queue.
//!
//! A descriptor in the queue of a Unix socket stays open although no process has it (unix(7), `SCM_RIGHTS`). A holder is a
//! datagram socket that is connected to itself: what the daemon sends to it stays in its queue. systemd keeps the holder in
//! the descriptor store, so everything in the holder outlives the daemon.
//!
//! A holder makes it cheap to keep a descriptor. Storing a descriptor directly takes a message to PID 1, and PID 1 forks a
//! process for each descriptor that it closes (`asynchronous_close` in systemd). An emptied holder stays in the store and
//! is reused.

use std::hash::{BuildHasher, RandomState};
use std::io::{self, IoSlice};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd, RawFd};
use std::os::unix::net::UnixDatagram;

use nix::errno::Errno;
use nix::sys::socket::{ControlMessage, MsgFlags, UnixAddr, bind, connect, sendmsg};

use crate::sys::{self, quota};

/// The prefix of all holders' abstract addresses. In `ss -xa`, a holder with a non-empty queue has descriptors.
const ADDRESS: &str = "containerd-shim-systemd-v1";

/// The largest number of descriptors in one message.
pub const MAX_FDS: usize = 8;

/// A socket that is connected to itself.
#[derive(Debug)]
pub struct Holder(UnixDatagram);

impl Holder {
    /// Makes an empty holder. Its address is visible (`ss -x`), but no other socket can send to it: the kernel accepts
    /// datagrams for a connected socket only from its peer.
    ///
    /// # Errors
    /// The process has no room for another descriptor.
    pub fn new() -> io::Result<Self> {
        let holder = Self(UnixDatagram::unbound()?);
        holder.connect_to_itself(|_| ())?;
        Ok(holder)
    }

    /// Until the socket is connected, every process may send to its address. The kernel drops what arrives meanwhile: a
    /// message can contain a descriptor whose close waits.
    fn connect_to_itself(&self, bound: impl FnOnce(&UnixAddr)) -> io::Result<()> {
        let name = format!("{ADDRESS}/{:016x}", RandomState::new().hash_one(0));
        let address = UnixAddr::new_abstract(name.as_bytes())?;
        sys::drop_messages(&self.0, true)?;
        bind(self.0.as_raw_fd(), &address)?;
        bound(&address);
        connect(self.0.as_raw_fd(), &address)?;
        Ok(sys::drop_messages(&self.0, false)?)
    }

    /// Takes over a holder from the descriptor store.
    pub fn adopt(socket: OwnedFd) -> Self {
        Self(socket.into())
    }

    /// Puts descriptors into the holder, with a label that is not empty. They do not count for root: see [`quota`].
    ///
    /// # Errors
    /// `EAGAIN`: the holder is full. `EINVAL`: more than [`MAX_FDS`] descriptors. The holder is unchanged then.
    pub fn put(&self, label: &str, fds: &[BorrowedFd<'_>]) -> Result<(), Errno> {
        if fds.len() > MAX_FDS || label.is_empty() {
            return Err(Errno::EINVAL);
        }
        let fds: Vec<RawFd> = fds.iter().map(AsRawFd::as_raw_fd).collect();
        // The caller waits for the result, so these numbers are valid all the time.
        let (holder, label) = (self.0.as_raw_fd(), label.to_owned());
        quota::apart(move || {
            let rights = [ControlMessage::ScmRights(&fds)];
            let parts = [IoSlice::new(label.as_bytes())];
            let flags = MsgFlags::MSG_DONTWAIT | MsgFlags::MSG_NOSIGNAL;
            sendmsg::<()>(holder, &parts, &rights, flags, None).map(drop)
        })
    }

    /// Copies of the descriptors in the holder, each with its label. The originals stay in the holder.
    ///
    /// # Errors
    /// The holder can't be read, or the process has no room for the descriptors (`EMFILE`).
    pub fn contents(&self) -> Result<Vec<(String, OwnedFd)>, Errno> {
        let labelled =
            |(label, fds): (String, Vec<OwnedFd>)| fds.into_iter().map(move |fd| (label.clone(), fd));
        Ok(self.messages()?.into_iter().flat_map(labelled).collect())
    }

    /// Copies of the messages in the holder: labels and descriptors.
    fn messages(&self) -> Result<Vec<(String, Vec<OwnedFd>)>, Errno> {
        // Each peek continues where the previous peek ended.
        sys::count_peeked(&self.0)?;
        let mut found = Vec::new();
        loop {
            match sys::peek_fds(&self.0) {
                Ok(message) => found.push(message),
                Err(Errno::EAGAIN) => return Ok(found),
                Err(errno) => return Err(errno),
            }
        }
    }

    /// The label of the first descriptors in a holder that is not adopted yet. Opens none of them.
    ///
    /// # Errors
    /// `EAGAIN`: the holder is empty. Other errors: the holder can't be read.
    pub fn label_in(socket: &impl AsFd) -> Result<String, Errno> {
        sys::count_peeked(socket)?;
        sys::peek_text(socket)
    }

    /// Closes the descriptors in the holder that `is_kept` refuses. The others stay in the holder all the time.
    ///
    /// # Errors
    /// As [`Self::contents`]. All descriptors are still in the holder then.
    pub fn retain(&self, is_kept: impl Fn(&OwnedFd) -> bool) -> Result<(), Errno> {
        let earlier = self.messages()?;
        for (label, fds) in &earlier {
            let kept: Vec<_> = fds.iter().filter(|fd| is_kept(fd)).map(AsFd::as_fd).collect();
            if !kept.is_empty() {
                self.put(label, &kept)?;
            }
        }
        // If the daemon ends here, the next daemon finds some descriptors twice.
        earlier.iter().try_for_each(|_| sys::discard_message(&self.0))
    }

    /// Empties the holder. Descriptors that no process has open are closed.
    ///
    /// # Errors
    /// The holder can't be read.
    pub fn clear(&self) -> Result<(), Errno> {
        loop {
            match sys::discard_message(&self.0) {
                Ok(()) => {}
                Err(Errno::EAGAIN) => return Ok(()),
                Err(errno) => return Err(errno),
            }
        }
    }
}

impl AsFd for Holder {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::Read;

    /// The reading end is at its end once no process and no holder has the writing end open.
    fn pipe() -> (std::fs::File, OwnedFd) {
        let (reader, writer) = nix::unistd::pipe2(nix::fcntl::OFlag::O_CLOEXEC).unwrap();
        (reader.into(), writer)
    }

    #[test]
    fn descriptors_stay_open_until_the_holder_is_cleared() {
        let holder = Holder::new().unwrap();
        let ((mut first, first_writer), (mut second, second_writer)) = (pipe(), pipe());
        holder.put("o1", &[first_writer.as_fd(), second_writer.as_fd()]).unwrap();
        holder.put("t1", &[first_writer.as_fd()]).unwrap();
        drop((first_writer, second_writer));
        // A later daemon has only the socket, and can read it any number of times.
        let holder = Holder::adopt(holder.0.into());
        for _ in 0..2 {
            let contents = holder.contents().unwrap();
            let labels: Vec<&str> = contents.iter().map(|(label, _)| label.as_str()).collect();
            assert_eq!(labels, ["o1", "o1", "t1"]);
            assert_eq!(Holder::label_in(&holder).as_deref(), Ok("o1"));
            nix::unistd::write(&contents[0].1, b"1").unwrap();
            nix::unistd::write(&contents[1].1, b"2").unwrap();
        }
        holder.clear().unwrap();
        assert!(holder.contents().unwrap().is_empty());
        let mut text = String::new();
        first.read_to_string(&mut text).unwrap();
        second.read_to_string(&mut text).unwrap();
        assert_eq!(text, "1122");
        holder.put("o2", &[second.as_fd()]).unwrap();
        assert_eq!(holder.contents().unwrap().len(), 1);
    }

    #[test]
    fn some_descriptors_are_closed_and_the_others_are_not() {
        let holder = Holder::new().unwrap();
        let ((mut reader, writer), (_other_reader, other)) = (pipe(), pipe());
        let inode = |fd: &OwnedFd| nix::sys::stat::fstat(fd).unwrap().st_ino;
        let other_inode = inode(&other);
        holder.put("i1", &[writer.as_fd(), other.as_fd()]).unwrap();
        holder.put("i1", &[writer.as_fd()]).unwrap();
        drop(writer);
        for _ in 0..2 {
            holder.retain(|fd| inode(fd) == other_inode).unwrap();
            let contents = holder.contents().unwrap();
            assert_eq!(
                contents.iter().map(|(label, fd)| (label.as_str(), inode(fd))).collect::<Vec<_>>(),
                [("i1", other_inode)]
            );
        }
        assert_eq!(reader.read(&mut [0]).unwrap(), 0, "the descriptor is closed");
    }

    #[test]
    fn nobody_else_can_send_to_a_holder() {
        let holder = Holder::new().unwrap();
        let other = UnixDatagram::unbound().unwrap();
        let error = other.send_to_addr(b"o1", &holder.0.local_addr().unwrap()).unwrap_err();
        assert_eq!(error.raw_os_error(), Some(Errno::EPERM as i32));
    }

    #[test]
    fn what_is_sent_before_the_holder_is_connected_is_dropped() {
        let holder = Holder(UnixDatagram::unbound().unwrap());
        let other = UnixDatagram::unbound().unwrap();
        let (mut reader, writer) = pipe();
        let send = |address: &UnixAddr| {
            let (parts, fds) = ([IoSlice::new(b"o1")], [writer.as_raw_fd()]);
            let rights = [ControlMessage::ScmRights(&fds)];
            sendmsg(other.as_raw_fd(), &parts, &rights, MsgFlags::empty(), Some(address)).unwrap();
        };
        holder.connect_to_itself(send).unwrap();
        drop(writer);
        assert_eq!(holder.contents().unwrap().len(), 0);
        assert_eq!(reader.read(&mut [0]).unwrap(), 0, "the descriptor is closed");
        holder.put("o2", &[holder.as_fd()]).unwrap();
        assert_eq!(holder.contents().unwrap().len(), 1);
        holder.clear().unwrap();
    }

    #[test]
    fn a_holder_refuses_more_than_it_can_give_back() {
        let holder = Holder::new().unwrap();
        let file = std::fs::File::open("/dev/null").unwrap();
        assert_eq!(holder.put("o1", &[file.as_fd(); MAX_FDS + 1]), Err(Errno::EINVAL));
        holder.put("o1", &[file.as_fd(); MAX_FDS]).unwrap();
        while holder.put("o1", &[file.as_fd()]).is_ok() {}
        holder.clear().unwrap();
        assert_eq!(holder.contents().unwrap().len(), 0);
    }
}
