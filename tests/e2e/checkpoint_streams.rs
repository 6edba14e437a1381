//! Checkpoint and restore with each kind of streams: the original and each of its copies may have another kind.

use crate::common::checkpoint::{self, COUNTING, last, options};
use crate::common::container::Container;
use crate::common::leaks::{self, Traces};
use crate::common::lease::Images;
use crate::common::node::{Node, STOCK_RUNTIME};
use crate::common::spec::Spec;
use crate::common::stdio::{Fifos, Scratch};
use crate::common::task::{Io, SIGTERM};
use crate::common::{systemd, wait};
use crate::logger::Logger;

/// A checkpoint that ends the container.
fn last_checkpoint<'n>(original: &Container<'n>) -> Images<'n> {
    let images = original.checkpoint(options(|options| options.exit = true)).expect("checkpoint");
    assert_eq!(original.exit_status(), 137);
    original.delete().expect("delete");
    images
}

/// Waits for a number that follows `before` in the output of a restored container, and returns the last one.
fn counts_on_from(before: u32, what: &str, output: impl Fn() -> String) -> u32 {
    let numbers = wait::until(what, || {
        let output = output();
        let numbers = output.lines().filter_map(|line| line.trim_start_matches('e').parse::<u32>().ok());
        Some(numbers.collect::<Vec<_>>()).filter(|numbers| numbers.len() > 1)
    });
    assert!(numbers[0] > before, "{what}: {numbers:?} continue after {before}");
    numbers[numbers.len() - 1]
}

#[test]
fn a_task_of_runc_v2_moves_through_all_kinds_of_streams() {
    needs!(OurShim, Criu);
    let node = Node::exclusive();
    let restored = |name: &str, images: Images<'_>, io: &Io| {
        let copy = node.container(name, Spec::sh(COUNTING)).make();
        copy.create_from(&images, io).expect("create");
        let pid = copy.start().unwrap_or_else(|error| panic!("restore {name}: {error}"));
        assert_eq!(systemd::main_pid(&systemd::unit_of(&copy)), pid);
        copy
    };
    let journal_of = |copy: &Container<'_>| {
        let messages = systemd::messages(&[&format!("CONTAINER_ID={}", copy.id)]);
        messages.iter().map(|line| format!("{line}\n")).collect::<String>()
    };

    let fifos = Fifos::new("stock");
    let (mut stdout, _stderr) = (fifos.stdout(), fifos.stderr());
    let stock = node.container("stock", Spec::sh(COUNTING)).runtime(STOCK_RUNTIME).started(&fifos.io());
    let count = last(&stdout.until(|bytes| bytes.ends_with(b"3\n")));
    // The cgroup of a namespace that runc.v2 makes stays.
    let before = Traces::take();

    let logger = Logger::new("exec 5>&-");
    let logged = restored("logger", last_checkpoint(&stock), &logger.io("binary", ""));
    counts_on_from(count - 1, "the logger's stdout", || logger.scratch.read("out"));
    let count = counts_on_from(count - 1, "the logger's stderr", || logger.scratch.read("err"));

    let silent = restored("silent", last_checkpoint(&logged), &Io::default());
    logger.ended();
    let count = counts_on_from(count, "the journal", || journal_of(&silent));

    let scratch = Scratch::new("file");
    let uri = format!("file://{}", scratch.text("out"));
    let io = Io { stdout: uri.clone(), stderr: uri, ..Io::default() };
    let file = restored("file", last_checkpoint(&silent), &io);
    counts_on_from(count, "the file", || scratch.read("out"));
    wait::until_true("the file has both streams", || scratch.read("out").contains('e'));
    file.kill(SIGTERM).expect("kill");
    assert_eq!(file.exit_status(), 7, "its trap is restored");
    file.delete().expect("delete");
    checkpoint::remove_unpacked();
    drop((stock, logged, silent, file, stdout, fifos));
    leaks::assert_none("a chain of checkpoints", &before);
}

#[test]
fn runc_v2_restores_a_terminal_of_ours_and_refuses_other_streams() {
    needs!(OurShim, Criu);
    let node = Node::exclusive();
    for is_terminal in [true, false] {
        let spec = || if is_terminal { Spec::sh(COUNTING).terminal() } else { Spec::sh(COUNTING) };
        let io = |fifos: &Fifos| if is_terminal { fifos.terminal() } else { fifos.io() };
        let fifos = Fifos::new("ours");
        let (mut stdout, _stderr) = (fifos.stdout(), fifos.stderr());
        let ours = node.container("ours", spec()).started(&io(&fifos));
        let count = last(&stdout.until(|bytes| bytes.ends_with(b"3\n") || bytes.ends_with(b"3\r\n")));
        let images = ours.checkpoint(options(|options| {
            options.exit = true;
            options.terminal = is_terminal;
        }));
        let images = images.expect("checkpoint");
        assert_eq!(ours.exit_status(), 137);
        let fifos = Fifos::new("stock");
        let (mut stdout, _stderr) = (fifos.stdout(), fifos.stderr());
        let stock = node.container("stock", spec()).runtime(STOCK_RUNTIME).make();
        stock.create_from(&images, &io(&fifos)).expect("create");
        if is_terminal {
            stock.start().expect("restore");
            assert!(last(&stdout.until(|bytes| bytes.ends_with(b"\n"))) >= count);
            stock.kill(SIGTERM).expect("kill");
            assert_eq!(stock.exit_status(), 7);
        } else {
            let error = stock.start().expect_err("runc.v2 does not know the streams");
            assert!(error.message().contains("criu"), "{error}");
        }
    }
    checkpoint::remove_unpacked();
}
