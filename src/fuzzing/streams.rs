//! Fuzz targets for what the shim receives over sockets and streams, and for what it forwards.

use std::fs::File;
use std::io::{IoSlice, Read};
use std::os::fd::{AsRawFd, OwnedFd, RawFd};
use std::os::unix::net::UnixDatagram;

use containerd_shim_protos::api::CreateTaskRequest;
use nix::errno::Errno;
use nix::sys::socket::{ControlMessage, MsgFlags, UnixCredentials, sendmsg, setsockopt, sockopt};
use protobuf::Message;
use protobuf::well_known_types::any::Any;

use crate::api::messages::BootstrapParams;
use crate::cli;
use crate::oci::log;
use crate::stdio::journal;
use crate::sys;
use crate::text;
use crate::unit::relay::{MESSAGE_MAX, Notification};

use super::first_line;

/// Target: the standard input of `start`. The shim does not mistake the options of an earlier containerd for the bootstrap
/// message.
pub(super) fn bootstrap(data: &[u8]) {
    let is_message = |input: Vec<u8>| cli::is_bootstrap("k8s.io", "web", input);
    if is_message(data.to_vec()) {
        let message = BootstrapParams::parse_from_bytes(data);
        assert!(message.is_ok_and(|message| message.instance_id == "web" && message.namespace == "k8s.io"));
    }
    // The names of types contain dots; this id contains none.
    let Some((type_url, value)) = first_line(data) else { return };
    let any = Any { type_url: format!("a.{type_url}"), value: value.to_vec(), ..Any::default() };
    assert!(!any.write_to_bytes().is_ok_and(is_message), "{any:?}");
    let request =
        CreateTaskRequest { id: type_url.to_owned(), options: Some(any).into(), ..Default::default() };
    assert!(!request.write_to_bytes().is_ok_and(is_message) || type_url == "web");
}

/// Target: the log of an OCI runtime. The shim finds an error at the end of the log, whatever precedes it.
pub(super) fn log(data: &[u8]) {
    let _ = log::last_error_in(data);
    let mut text = data.to_vec();
    text.extend_from_slice(b"\n{\"level\":\"error\",\"msg\":\"the reason\",\"time\":\"t\"}\n");
    let found = log::last_error_in(&text);
    let added = found.as_deref().and_then(|found| found.strip_prefix("the reason"));
    let is_first_error = |added: &str| added.starts_with(" (the first error was: ") && added.ends_with(')');
    assert!(added.is_some_and(|added| added.is_empty() || is_first_error(added)), "{found:?}");
}

/// Target: a notification of a container to systemd. The shim forwards only lines of a few kinds, and none of them concerns
/// another unit.
pub(super) fn notify(data: &[u8]) {
    let data = data.get(..MESSAGE_MAX).unwrap_or(data);
    let said = Notification::read(data);
    for extend_usec in [None, said.extend_usec] {
        let Some(text) = said.text(extend_usec) else { continue };
        assert!(text.len() <= MESSAGE_MAX, "{} bytes", text.len());
        for line in text.split('\n') {
            assert!(!line.chars().any(text::is_unfit), "{line:?}");
            let is_known = match line.split_once('=') {
                Some(("READY" | "STOPPING" | "RELOADING" | "WATCHDOG", value)) => value == "1",
                Some(("MONOTONIC_USEC" | "EXTEND_TIMEOUT_USEC", value)) => value.parse::<u64>().is_ok(),
                Some(("STATUS", _)) => true,
                _ => false,
            };
            assert!(is_known, "{line:?}");
        }
    }
}

/// Target: the identifier and a line of output. journald reads exactly the fields that the shim has written.
pub(super) fn journal(data: &[u8]) {
    let Some((identifier, line)) = first_line(data) else { return };
    let head = journal::head("web.service", identifier, [("CONTAINER_ID", "web")]);
    let datagram = journal::datagram(&head, "6", &[("N_DROPPED", "7")], line);
    let expected: [(&str, &[u8]); 6] = [
        ("OBJECT_SYSTEMD_UNIT", b"web.service"),
        ("SYSLOG_IDENTIFIER", identifier.as_bytes()),
        ("CONTAINER_ID", b"web"),
        ("PRIORITY", b"6"),
        ("N_DROPPED", b"7"),
        ("MESSAGE", line),
    ];
    assert_eq!(fields(&datagram), expected);
}

/// The fields of a datagram (systemd.io/JOURNAL_NATIVE_PROTOCOL). A line has the name of a field. The value is on the same
/// line, or follows with its length before it.
fn fields(mut rest: &[u8]) -> Vec<(&str, &[u8])> {
    let mut all = Vec::new();
    while !rest.is_empty() {
        let Some((line, after)) = first_line(rest) else { panic!("a line without an end: {rest:?}") };
        if let Some((name, value)) = line.split_once('=') {
            all.push((name, value.as_bytes()));
            rest = after;
            continue;
        }
        let Some((length, after)) = after.split_first_chunk() else { panic!("no length: {after:?}") };
        let length = usize::try_from(u64::from_le_bytes(*length)).unwrap_or(usize::MAX);
        let Some((value, after)) = after.split_at_checked(length) else {
            panic!("{length} bytes of {after:?}")
        };
        all.push((line, value));
        let Some((b'\n', after)) = after.split_first() else { panic!("no end of the value: {after:?}") };
        rest = after;
    }
    all
}

/// Target: messages over a Unix socket, with any number of descriptors, and with or without the credentials of the sender.
/// No descriptor stays open.
pub(super) fn receive(data: &[u8]) {
    let Some(([count, with_sender], text)) = data.split_first_chunk() else { return };
    let failed = |what: &str, error: &dyn std::fmt::Display| -> ! { panic!("{what}: {error}") };
    let pair = || UnixDatagram::pair().unwrap_or_else(|error| failed("a pair of sockets", &error));
    let pipe = nix::unistd::pipe2(nix::fcntl::OFlag::O_CLOEXEC);
    let (reader, writer) = pipe.unwrap_or_else(|error| failed("a pipe", &error));
    let (here, there) = pair();
    if with_sender % 2 == 1 {
        setsockopt(&here, sockopt::PassCred, &true).unwrap_or_else(|error| failed("SO_PASSCRED", &error));
    }
    let sent = usize::from(count % 40);
    send(&there, text, &vec![&writer; sent], with_sender % 4 > 1);
    if with_sender % 8 > 3 {
        let mut small = [0; 16];
        let received = sys::receive_from_process(&here, &mut small);
        let (length, sender) = received.unwrap_or_else(|error| failed("a message", &error));
        assert_eq!(length, text.len());
        assert_eq!(sender, (with_sender % 2 == 1).then(std::process::id));
    } else {
        match sys::peek_fds(&here) {
            Ok((_, received)) => assert_eq!(received.len(), sent),
            // The credentials of the sender use a part of the buffer.
            Err(Errno::EMFILE) => assert!(sent > if with_sender % 2 == 1 { 8 } else { 16 }, "{sent}"),
            Err(error) => failed("a message", &error),
        }
        sys::discard_message(&here).unwrap_or_else(|error| failed("a message", &error));
    }
    drop((here, there, writer));
    let end = File::from(reader).read(&mut [0]);
    assert_eq!(end.unwrap_or_else(|error| failed("the pipe", &error)), 0);
}

fn send(socket: &UnixDatagram, text: &[u8], fds: &[&OwnedFd], with_sender: bool) {
    let fds: Vec<RawFd> = fds.iter().map(|fd| fd.as_raw_fd()).collect();
    let sender = UnixCredentials::new();
    let mut control = Vec::new();
    if with_sender {
        control.push(ControlMessage::ScmCredentials(&sender));
    }
    if !fds.is_empty() {
        control.push(ControlMessage::ScmRights(&fds));
    }
    let parts = [IoSlice::new(text)];
    if let Err(error) = sendmsg::<()>(socket.as_raw_fd(), &parts, &control, MsgFlags::MSG_DONTWAIT, None) {
        panic!("send {} bytes: {error}", text.len());
    }
}
