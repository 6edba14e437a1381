//! Receiving control messages from Unix sockets (unix(7)), whatever the other side sends.
//!
//! nix is not used: if control messages were cut off, nix reports an error, and leaves open the descriptors that the kernel
//! had made by then.

use std::os::fd::{AsFd, AsRawFd, FromRawFd, OwnedFd, RawFd};

use nix::errno::Errno;
use nix::libc;

/// Room for more descriptors than any message of the daemon has.
const MANY_SPACE: usize = space(16 * size_of::<RawFd>());
/// Room for the sender only.
const SENDER_SPACE: usize = space(size_of::<libc::ucred>());

const fn space(length: usize) -> usize {
    // SAFETY: only computes a small number.
    unsafe { libc::CMSG_SPACE(length as libc::c_uint) as usize }
}

/// Receives a datagram from a socket with `SO_PASSCRED`. Returns its length, which is larger than
/// `data` if that was too small, and the sending process, if it has a pid in this pid namespace.
///
/// There is room for the sender only: the kernel closes descriptors that come with the datagram, without
/// giving them to this process.
///
/// # Errors
/// The socket can't be read.
pub fn receive_from_process(socket: &impl AsFd, data: &mut [u8]) -> Result<(usize, Option<u32>), Errno> {
    let received = receive(socket, data, &mut Control::<SENDER_SPACE>::new(), 0)?;
    let sender = received.sender.and_then(|pid| u32::try_from(pid).ok()).filter(|pid| *pid > 0);
    Ok((received.length, sender))
}

/// Peeks at the next message of a Unix socket without waiting. Returns its text and copies of its descriptors, at most
/// sixteen.
///
/// # Errors
/// `EAGAIN`: there is no message. `EMFILE`: this process has no room for all descriptors. Other errors: the socket
/// can't be read.
pub fn peek_fds(socket: &impl AsFd) -> Result<(String, Vec<OwnedFd>), Errno> {
    let (mut data, mut control) = ([0; 64], Control::<MANY_SPACE>::new());
    let received = receive(socket, &mut data, &mut control, libc::MSG_PEEK | libc::MSG_DONTWAIT)?;
    if received.is_cut_off {
        return Err(Errno::EMFILE);
    }
    Ok((received.text(&data), received.fds))
}

/// Peeks at the text of the next message of a Unix socket without waiting. Makes no copies of its descriptors.
///
/// # Errors
/// `EAGAIN`: there is no message. Other errors: the socket can't be read.
pub fn peek_text(socket: &impl AsFd) -> Result<String, Errno> {
    let mut data = [0; 64];
    let flags = libc::MSG_PEEK | libc::MSG_DONTWAIT;
    Ok(receive(socket, &mut data, &mut Control::<0>::new(), flags)?.text(&data))
}

/// Removes one message from a Unix socket without waiting, and closes its descriptors.
///
/// # Errors
/// `EAGAIN`: there is no message. Other errors: the socket can't be read.
pub fn discard_message(socket: &impl AsFd) -> Result<(), Errno> {
    // Without room for control messages the kernel closes the descriptors.
    receive(socket, &mut [0], &mut Control::<0>::new(), libc::MSG_DONTWAIT).map(drop)
}

/// Memory for control messages.
#[repr(C)]
struct Control<const N: usize> {
    /// Aligns the fields after it.
    _header: [libc::cmsghdr; 0],
    bytes: [u8; N],
}

impl<const N: usize> Control<N> {
    fn new() -> Self {
        Self { _header: [], bytes: [0; N] }
    }
}

#[derive(Default)]
struct Received {
    length: usize,
    sender: Option<libc::pid_t>,
    fds: Vec<OwnedFd>,
    /// There was no room for all control messages, or not for all descriptors in them.
    is_cut_off: bool,
}

impl Received {
    /// The text of the message, of which `data` has as much as fits.
    fn text(&self, data: &[u8]) -> String {
        String::from_utf8_lossy(data.get(..self.length).unwrap_or(data)).into_owned()
    }
}

fn receive<const N: usize>(
    socket: &impl AsFd,
    data: &mut [u8],
    control: &mut Control<N>,
    flags: libc::c_int,
) -> Result<Received, Errno> {
    let mut part = libc::iovec { iov_base: data.as_mut_ptr().cast(), iov_len: data.len() };
    // SAFETY: all zeroes is a valid msghdr: null pointers with lengths of 0.
    let mut header: libc::msghdr = unsafe { std::mem::zeroed() };
    header.msg_iov = &mut part;
    header.msg_iovlen = 1;
    header.msg_control = control.bytes.as_mut_ptr().cast();
    header.msg_controllen = N as _;
    let flags = flags | libc::MSG_CMSG_CLOEXEC | libc::MSG_TRUNC;
    // SAFETY: the header points to memory of this function, with its length, that outlives the call.
    let length = Errno::result(unsafe { libc::recvmsg(socket.as_fd().as_raw_fd(), &mut header, flags) })?;
    let mut received =
        Received { length: usize::try_from(length).unwrap_or_default(), ..Received::default() };
    received.is_cut_off = header.msg_flags & libc::MSG_CTRUNC != 0;
    // SAFETY: the kernel has filled in the control messages and their length.
    let mut next = unsafe { libc::CMSG_FIRSTHDR(&header) };
    // SAFETY: the macros return a header within `control`, or null.
    while let Some(message) = unsafe { next.as_ref() } {
        // SAFETY: `message` is a header within `control`.
        let (start, data) = unsafe { (libc::CMSG_LEN(0) as usize, libc::CMSG_DATA(message)) };
        let length = message.cmsg_len.saturating_sub(start);
        match (message.cmsg_level, message.cmsg_type) {
            (libc::SOL_SOCKET, libc::SCM_RIGHTS) => {
                for i in 0..length / size_of::<RawFd>() {
                    // SAFETY: the message holds `length` bytes. The kernel has just put this descriptor into
                    // our table, and no other code owns it.
                    received
                        .fds
                        .push(unsafe { OwnedFd::from_raw_fd(data.cast::<RawFd>().add(i).read_unaligned()) });
                }
            }
            (libc::SOL_SOCKET, libc::SCM_CREDENTIALS) if length >= size_of::<libc::ucred>() => {
                // SAFETY: the message has as many bytes as are read.
                received.sender = Some(unsafe { data.cast::<libc::ucred>().read_unaligned() }.pid);
            }
            _ => {}
        }
        // SAFETY: as above.
        next = unsafe { libc::CMSG_NXTHDR(&header, message) };
    }
    Ok(received)
}

#[cfg(test)]
mod tests {
    use super::*;
    use nix::sys::socket::{ControlMessage, MsgFlags, sendmsg, setsockopt, sockopt};
    use std::io::{IoSlice, Read};
    use std::os::unix::net::{UnixDatagram, UnixStream};

    fn send(socket: &impl AsFd, text: &[u8], fds: &[&OwnedFd]) {
        let fds: Vec<RawFd> = fds.iter().map(|fd| fd.as_raw_fd()).collect();
        let rights = [ControlMessage::ScmRights(&fds)];
        let rights = if fds.is_empty() { &[] } else { &rights[..] };
        let parts = [IoSlice::new(text)];
        sendmsg::<()>(socket.as_fd().as_raw_fd(), &parts, rights, MsgFlags::empty(), None).unwrap();
    }

    /// The writing end is closed everywhere once the reading end is at its end.
    fn pipe() -> (std::fs::File, OwnedFd) {
        let (reader, writer) = nix::unistd::pipe2(nix::fcntl::OFlag::O_CLOEXEC).unwrap();
        (reader.into(), writer)
    }

    #[test]
    fn descriptors_are_counted_and_none_stays_open() {
        for count in [0, 1, 2, 16, 17, 50] {
            let (here, there) = UnixStream::pair().unwrap();
            let (mut reader, writer) = pipe();
            send(&there, b"/dev/ptmx", &vec![&writer; count]);
            for _ in 0..2 {
                let received = peek_fds(&here).map(|(text, fds)| (text, fds.len()));
                let expected = ("/dev/ptmx".to_owned(), count);
                assert_eq!(received, if count > 16 { Err(Errno::EMFILE) } else { Ok(expected) }, "{count}");
            }
            discard_message(&here).unwrap();
            drop(writer);
            assert_eq!(reader.read(&mut [0]).unwrap(), 0, "{count}: all are closed");
        }
    }

    #[test]
    fn a_datagram_has_a_sender_and_its_descriptors_are_closed() {
        let (here, there) = UnixDatagram::pair().unwrap();
        setsockopt(&here, sockopt::PassCred, &true).unwrap();
        let (mut reader, writer) = pipe();
        send(&there, b"BARRIER=1", &[&writer]);
        drop(writer);
        let mut data = [0; 4];
        let (length, sender) = receive_from_process(&here, &mut data).unwrap();
        assert_eq!((length, sender), (9, Some(std::process::id())));
        assert_eq!((&data, reader.read(&mut [0]).unwrap()), (b"BARR", 0));
    }
}
