//! A user without privileges floods the daemon over the system bus. The daemon believes nothing of it, keeps nothing of it, and
//! serves meanwhile.

use std::fs;
use std::os::fd::AsFd;
use std::os::unix::fs::PermissionsExt;
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::signal::Signal;
use zbus::Message;
use zbus::Variant as Value;

use crate::bus::{names, object};
use crate::common::bystander::Bystander;
use crate::common::node::Node;
use crate::common::spec::Spec;
use crate::common::stdio::Scratch;
use crate::common::task::{Io, SIGKILL};
use crate::common::{daemon, systemd, wait};

/// Connects as its own user, and writes the file in its second argument as often as the third says. Reads all answers.
const CLIENT: &str = r"
use IO::Socket::UNIX;
my $s = IO::Socket::UNIX->new(Peer => '/run/dbus/system_bus_socket') or die 'connect';
sub put { my ($d) = @_; while (length $d) { my $n = syswrite $s, $d; die 'closed' unless $n; substr($d, 0, $n) = '' } }
put(qq(\0AUTH EXTERNAL ) . unpack('H*', qq($>)) . qq(\r\n));
sysread $s, my $ok, 4096; die $ok unless $ok =~ /^OK/;
put(qq(BEGIN\r\n));
local $/; open my $h, '<', $ARGV[0]; put(<$h>); sysread $s, my $name, 4096;
open my $f, '<', $ARGV[1]; my $all = <$f>;
unless (fork) { 1 while sysread $s, my $b, 65536; exit }
put($all) for 1 .. $ARGV[2];
print 'sent';
shutdown $s, 2; wait;
";

fn hello() -> Vec<u8> {
    let hello = Message::method_call("/org/freedesktop/DBus", "Hello").destination("org.freedesktop.DBus");
    let hello = hello.interface("org.freedesktop.DBus").build(&());
    hello.expect("build Hello").data().to_vec()
}

/// A directory for messages that another user can read, with the one that [`CLIENT`] sends first.
fn messages_of_a_user(name: &str) -> Scratch {
    let scratch = Scratch::new(name);
    fs::set_permissions(scratch.join("."), fs::Permissions::from_mode(0o755)).expect("let others read");
    fs::write(scratch.join("hello"), hello()).expect("write a message");
    scratch
}

/// [`CLIENT`] as a user without privileges, who sends the messages in a file this often.
fn client(scratch: &Scratch, file: &str, times: u32) -> Command {
    let mut command = Command::new("setpriv");
    command.args(["--reuid=65534", "--regid=65534", "--clear-groups", "perl", "-e", CLIENT]);
    command.args([&scratch.text("hello"), file, &times.to_string()]);
    command
}

/// What a user may send to the daemon: signals of systemd and of the bus with contents right and wrong, and calls.
fn messages(to: &str, unit: &str) -> Vec<u8> {
    let mut all = Vec::new();
    let path = object(unit);
    let changed = vec![
        ("ExecMainCode", Value::from(1_i32)),
        ("ExecMainStatus", Value::from(42_i32)),
        ("MainPID", Value::from(0_u32)),
        ("ActiveState", Value::from("failed")),
    ];
    let changed: std::collections::HashMap<&str, Value> = changed.into_iter().collect();
    let deep = (0..30).fold(Value::from(1_u8), |inner, _| Value::Variant(Box::new(inner)));
    let mut signal = |path: &str,
                      interface: &str,
                      member: &str,
                      body: &dyn Fn(zbus::message::Builder) -> zbus::Result<Message>| {
        let builder = Message::signal(path, interface, member).destination(to);
        all.extend_from_slice(body(builder).expect("build a signal").data());
    };
    const MANAGER: &str = "org.freedesktop.systemd1.Manager";
    const ROOT: &str = "/org/freedesktop/systemd1";
    let job = zbus::ObjectPath::try_from("/org/freedesktop/systemd1/job/1").expect("a path");
    signal(&path, "org.freedesktop.DBus.Properties", "PropertiesChanged", &|b| {
        b.build(&("org.freedesktop.systemd1.Service", &changed, Vec::<&str>::new()))
    });
    signal(&path, "org.freedesktop.DBus.Properties", "PropertiesChanged", &|b| b.build(&(&deep)));
    signal(&path, "org.freedesktop.DBus.Properties", "PropertiesChanged", &|b| {
        b.build(&("x".repeat(10_000)))
    });
    signal(ROOT, MANAGER, "JobRemoved", &|b| b.build(&(1_u32, &job, unit, "failed")));
    signal(ROOT, MANAGER, "UnitRemoved", &|b| b.build(&(unit, &job)));
    signal(ROOT, MANAGER, "Reloading", &|b| b.build(&true));
    signal(ROOT, MANAGER, "Reloading", &|b| b.build(&()));
    signal("/org/freedesktop/DBus", "org.freedesktop.DBus", "NameOwnerChanged", &|b| {
        b.build(&("org.freedesktop.systemd1", ":1.0", ""))
    });
    signal("/", "a.b", "C", &|b| b.build(&()));
    all
}

#[test]
fn a_flood_of_messages_over_the_bus_is_not_believed_and_delays_nothing() {
    needs!(OurShim);
    let node = Node::exclusive();
    let bystander = Bystander::new(&node);
    let container = node.container("flooded", Spec::sleeping()).started(&Io::default());
    let exec = container.exec(Spec::sleeping()).started(&Io::default());
    let scratch = messages_of_a_user("flood");
    let units = [systemd::unit_of(&container), systemd::unit_of_exec(&container, &exec)];
    let mut clients = Vec::new();
    for (number, name) in names().into_iter().enumerate() {
        let file = scratch.text(&format!("flood-{number}"));
        let all: Vec<u8> = units.iter().flat_map(|unit| messages(&name, unit)).collect();
        fs::write(&file, all).expect("write messages");
        let mut command = client(&scratch, &file, 600);
        clients.push(command.stdout(Stdio::piped()).spawn().expect("start a client"));
    }
    let begun = Instant::now();
    let mut lives = 0;
    while clients.iter_mut().any(|client| client.try_wait().expect("wait for a client").is_none()) {
        let since = Instant::now();
        bystander.assert_untouched("during the flood");
        println!("an exec after {:?}", since.elapsed());
        assert!(since.elapsed() < Duration::from_secs(10), "{:?}", since.elapsed());
        lives += 1;
    }
    println!("{lives} execs while it lasted: {:?}", begun.elapsed());
    for client in clients {
        let output = client.wait_with_output().expect("wait for a client");
        assert_eq!(String::from_utf8_lossy(&output.stdout), "sent", "the bus takes all of it");
    }
    assert_eq!(container.exec_sh("exit 5").exit_status(), 5);
    exec.kill(SIGKILL).expect("the exec runs still");
    assert_eq!(exec.exit_status(), 137);
    container.kill(SIGKILL).expect("the container runs still");
    assert_eq!(container.exit_status(), 137);
    wait::until("the daemon serves", daemon::serving);
    exec.delete().expect("delete");
    container.delete().expect("delete");
    drop((exec, container, scratch));
    bystander.assert_all_untouched("a flood of messages");
}

/// A signal for one client that dbus-daemon passes on, and that zbus can't read: its body has arrays and structures whose depth
/// the two count in different ways. zbus ends a connection with such a message.
fn too_deep(to: &str) -> Vec<u8> {
    let signature = format!("{}y{}", "aa(".repeat(17), ")".repeat(17));
    let mut fields = Vec::new();
    for (code, kind, value) in [(1, b'o', "/a"), (2, b's', "b.c"), (3, b's', "D"), (6, b's', to)] {
        fields.resize(fields.len().next_multiple_of(8), 0);
        fields.extend([code, 1, kind, 0]);
        fields.extend(u32::try_from(value.len()).expect("a short value").to_le_bytes());
        fields.extend(value.bytes().chain([0]));
    }
    fields.resize(fields.len().next_multiple_of(8), 0);
    fields.extend([8, 1, b'g', 0, u8::try_from(signature.len()).expect("a short signature")]);
    fields.extend(signature.bytes().chain([0]));
    let length = u32::try_from(fields.len()).expect("a short header");
    fields.resize(fields.len().next_multiple_of(8), 0);
    // Little-endian, a signal, no flags, version 1; the lengths of the body and of the fields; the body is an empty array.
    let mut message = vec![b'l', 4, 0, 1];
    for number in [4, 2, length] {
        message.extend(number.to_le_bytes());
    }
    [message, fields, vec![0; 4]].concat()
}

#[test]
fn no_message_of_a_user_ends_a_connection_of_the_daemon_to_the_bus() {
    needs!(OurShim);
    let node = Node::exclusive();
    let bystander = Bystander::new(&node);
    let scratch = messages_of_a_user("deep");
    let before = names();
    for (number, name) in before.iter().enumerate() {
        let file = scratch.text(&format!("deep-{number}"));
        fs::write(&file, too_deep(name)).expect("write a message");
        let sent = client(&scratch, &file, 1).output().expect("run a client");
        assert_eq!(String::from_utf8_lossy(&sent.stdout), "sent", "{sent:?}");
    }
    // A new unit is referenced over a connection of its own.
    let container = node.container("after-deep", Spec::sleeping()).started(&Io::default());
    assert_eq!(container.exec_sh("exit 5").exit_status(), 5);
    container.end();
    drop((container, scratch));
    assert_eq!(names(), before, "the daemon has the same connections");
    bystander.assert_all_untouched("messages that zbus can't read");
}

/// Whoever closes the last copy of a descriptor may have to wait for its sender. The bus drops what a client does not accept;
/// otherwise, the descriptor would wait for the daemon, which is stopped meanwhile.
#[test]
fn the_daemon_accepts_no_descriptors_from_the_bus() {
    needs!(OurShim);
    let node = Node::exclusive();
    let bystander = Bystander::new(&node);
    let names = names();
    let serving = wait::until("the daemon serves", daemon::serving);
    daemon::signal(serving, Signal::SIGSTOP);
    let mut readers = Vec::new();
    for name in &names {
        let (reader, writer) = nix::unistd::pipe().expect("make a pipe");
        let body = (zbus::Fd::from(writer),);
        let sent = node.block_on(async {
            let connection = zbus::Connection::system().await.expect("connect to the bus");
            connection.emit_signal(Some(name.as_str()), "/", "a.b", "C", &body).await
        });
        sent.expect("send a signal");
        readers.push((name, reader));
    }
    for (name, reader) in readers {
        let mut fds = [PollFd::new(reader.as_fd(), PollFlags::empty())];
        let ready = poll(&mut fds, PollTimeout::from(5000_u16)).expect("poll a pipe");
        assert_eq!(ready, 1, "the bus keeps a descriptor for {name}");
    }
    daemon::signal(serving, Signal::SIGCONT);
    bystander.assert_all_untouched("descriptors");
}
