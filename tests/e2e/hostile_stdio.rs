//! Strange stdio strings: each is used or refused at once, nothing is created outside, and nothing else is affected.

use std::fs;
use std::os::unix::fs::symlink;
use std::os::unix::net::UnixListener;
use std::path::Path;
use std::time::{Duration, Instant};

use crate::common::bystander::Bystander;
use crate::common::node::Node;
use crate::common::spec::Spec;
use crate::common::stdio::Scratch;
use crate::common::task::Io;

const PWNED: &str = "/run/e2e-pwned-by-stdio";

/// How long a call may take that waits for nobody.
const SOON: Duration = Duration::from_secs(15);

fn strange(scratch: &Scratch) -> Vec<String> {
    let path = |name: &str| scratch.text(name);
    fs::write(scratch.join("regular"), "kept").expect("write a file");
    fs::create_dir(scratch.join("directory")).expect("make a directory");
    symlink("regular", scratch.join("link")).expect("make a symlink");
    symlink("circle", scratch.join("circle")).expect("make a symlink");
    symlink(PWNED, scratch.join("dangling")).expect("make a symlink");
    // Closed: nobody accepts.
    drop(UnixListener::bind(scratch.join("socket")).expect("make a socket"));
    let names = ["regular", "directory", "socket", "link", "circle", "none", "none/none"];
    let paths = names.iter().map(|name| path(name));
    let files = ["directory", "socket", "link", "circle", "none/../../x/none/../regular"];
    let files = files.iter().map(|name| format!("file://{}", path(name)));
    let more = [
        "",
        " ",
        "/",
        "//",
        "a",
        "a/b",
        ".",
        "..",
        "\n",
        "\0",
        "/dev/null\0",
        "/dev/null\n/dev/zero",
        "/dev/zero",
        "/dev/full",
        "/proc/self/fd/0",
        "/proc/1/root",
        "/proc/self/mem",
        "file:",
        "file://",
        "file:///",
        "file://a",
        "file://a/b",
        "file:///run/..",
        "file:///dev/full",
        "file:///dev/null",
        "file:///dev/zero?create=false",
        "file:///proc/self/fd/3",
        "file:///proc/sysrq-trigger/x",
        "file:///%00",
        "file:///%zz",
        "file:///run/%0a%0d?create=maybe",
        "FILE:///run/none",
        "binary:",
        "binary://",
        "binary:///",
        "binary://bin/true",
        "binary:///bin/true",
        "binary:///bin/false?",
        "binary:///dev/null",
        "binary:///run",
        "binary:///bin/sh/..",
        "binary:///bin/true?%zz=%",
        "binary:///bin/true?a=b&&=&a",
        "binary:///bin/true?a=%00",
        "binary:///bin/true?a=%0a[Service]%0aExecStartPre=/bin/touch%20/run/e2e-pwned-by-stdio",
        "binary:///bin/true?$PATH=%25n",
        "binary:///no/such/program?a=b",
        "binary:///bin/true#fragment",
        "fifo://",
        "fifo:///run",
        "fifo:///none/none",
        "pty:///dev/pts/0",
        "http://localhost/",
        "unix:///run/dbus/system_bus_socket",
        "strange:x",
        "://",
        ":",
        "%",
        "vsock://1:2",
    ]
    .map(str::to_string);
    let long = [
        format!("/{}", "x".repeat(300)),
        format!("/{}", "x/".repeat(40_000)),
        format!("binary:///bin/true?a={}", "x".repeat(1 << 20)),
        format!("file:///{}", "y".repeat(1 << 20)),
        format!("{}://", "z".repeat(1 << 20)),
    ];
    paths.chain(files).chain(more).chain(long).collect()
}

#[test]
fn a_strange_stream_costs_nothing_but_its_exec() {
    needs!(OurShim);
    let node = Node::exclusive();
    let bystander = Bystander::new(&node);
    let container = node.container("strange", Spec::sleeping()).started(&Io::default());
    let scratch = Scratch::new("strange");
    for text in strange(&scratch) {
        let with = [
            ("stdin", Io { stdin: text.clone(), ..Io::default() }),
            ("stdout", Io { stdout: text.clone(), ..Io::default() }),
            ("stderr", Io { stderr: text.clone(), ..Io::default() }),
        ];
        for (which, io) in with {
            let begun: String = format!("{which} {text:?}").chars().take(100).collect();
            let since = Instant::now();
            let outcome = match container.exec(Spec::sh("echo out; echo err >&2; exit 3")).add(&io) {
                Err(refusal) => Err(refusal),
                Ok(exec) => {
                    let started = exec.start().map(drop);
                    if started.is_ok() {
                        assert_eq!(exec.exit_status(), 3, "{begun}");
                    }
                    exec.delete().unwrap_or_else(|error| panic!("{begun}: delete: {error}"));
                    started
                }
            };
            match outcome {
                Ok(()) => println!("{begun}: runs {:?}", since.elapsed()),
                Err(refusal) => {
                    println!(
                        "{begun}: {:?} {} {:?}",
                        refusal.code(),
                        refusal.message().chars().take(160).collect::<String>(),
                        since.elapsed()
                    );
                    assert!(refusal.message().len() < 20_000, "{begun}: {} bytes", refusal.message().len());
                }
            }
            assert!(since.elapsed() < SOON, "{begun}: {:?}", since.elapsed());
        }
    }
    assert_eq!(container.exec_sh("exit 5").exit_status(), 5);
    for path in [PWNED, "/run/none"] {
        assert!(!Path::new(path).exists(), "{path}");
    }
    container.end();
    drop((container, scratch));
    bystander.assert_all_untouched("strange streams");
}
