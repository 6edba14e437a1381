//! Output of a process that writes from an address that it does not have (EFAULT, write(2)).

use std::thread;
use std::time::Duration;

use nix::libc;

use crate::attached::Client;
use crate::busy_streams::program;
use crate::common::node::Node;
use crate::common::task::Io;
use crate::common::{options, systemd, wait};

/// The variable that makes a process of the container write from a bad address.
const FAULTS: &str = "E2E_FAULTS";

/// Runs in the container: writes from an address that it does not have, and then a line.
#[test]
#[expect(unsafe_code, reason = "an address that is not valid")]
fn as_a_process_with_a_bad_address() {
    if std::env::var_os(FAULTS).is_none() {
        return;
    }
    // More buffers than a pipe has that was not enlarged. What is shorter than a page is written to the buffer before.
    const PAGE: usize = 4096;
    const MIB: libc::c_int = 1 << 20;
    for stream in [1, 2] {
        // SAFETY: this changes no memory.
        assert!(unsafe { libc::fcntl(stream, libc::F_SETPIPE_SZ, MIB) } >= MIB);
    }
    for number in 0..40 {
        for (stream, length, times) in [(1, 10, 1), (2, PAGE, 30)] {
            for _ in 0..times {
                // SAFETY: the kernel reads no memory of this process, which has nothing there.
                let written = unsafe { libc::write(stream, std::ptr::without_provenance(1), length) };
                assert_eq!(written, -1);
            }
        }
        wait::elapse(Duration::from_millis(5));
        println!("line {number}");
        eprintln!("line {number}");
    }
    println!("the end");
}

/// Before Linux 6.15, such a write leaves a buffer without bytes in the pipe, which looks like its end to tee(2).
#[test]
fn a_write_from_a_bad_address_ends_no_output() {
    needs!(OurShim);
    let node = Node::shared();
    for log in ["auto", "tee", "client"] {
        let spec = program("bad_address::as_a_process_with_a_bad_address").env(&format!("{FAULTS}=1"));
        let start = |spec, io: &Io| node.container("fault", spec).options(options::log(log)).started(io);
        let (container, mut client) = Client::attached(spec, start);
        let Client { stdout, stderr, .. } = &mut client;
        // Both at the same time: the process waits for either.
        let [stdout, stderr] = thread::scope(|scope| {
            let reading = [stdout, stderr].map(|stream| scope.spawn(|| stream.text()));
            reading.map(|text| text.join().expect("the output"))
        });
        let lines = |text: &str| text.lines().filter(|line| line.starts_with("line ")).count();
        assert_eq!((lines(&stdout), lines(&stderr)), (40, 40), "{log}");
        assert_eq!(container.exit_status(), 0, "{log}");
        if log != "client" {
            wait::until_true("the journal has the last line", || {
                systemd::messages(&["--unit", &systemd::unit_of(&container)])
                    .iter()
                    .any(|line| line == "the end")
            });
        }
        container.delete().expect("delete");
    }
}
