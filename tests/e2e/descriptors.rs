//! The descriptors of the daemon, and of systemd's descriptor store: restarts do not use them up, and a daemon with too few
//! serves what it can.

use containerd_client::types::v1::Status;

use crate::attached::{self, Client};
use crate::common::bystander::Bystander;
use crate::common::daemon::{self, DropIn};
use crate::common::node::Node;
use crate::common::shim;
use crate::common::spec::Spec;
use crate::common::stdio::Fifos;
use crate::common::task::{Io, SIGKILL};
use crate::common::wait;

/// The daemon makes at most this number of empty entries at once.
const SPARE: usize = 4;

/// How many files the serving daemon has open.
fn open_files() -> usize {
    daemon::open_files(wait::until("the daemon serves", daemon::serving))
}

#[test]
fn restarts_use_no_more_descriptors() {
    needs!(OurShim);
    let node = Node::exclusive();
    for spec in [Spec::new(&["/bin/cat"]), Spec::new(&["/bin/cat"]).terminal()] {
        let start = |spec, io: &Io| node.container("stored", spec).started(io);
        let (container, mut client) = Client::attached(spec.clone(), start);
        let (exec, mut exec_client) = attached::exec(&container, spec);
        daemon::killed();
        let before = (daemon::stored(), open_files());
        for turn in 0..6 {
            daemon::killed();
            for client in [&mut client, &mut exec_client] {
                client.enter(&format!("turn {turn}\n"));
                client.stdout.until(|bytes| String::from_utf8_lossy(bytes).contains(&format!("turn {turn}")));
            }
        }
        let after = (daemon::stored(), open_files());
        let most = (before.0 + SPARE, before.1 + SPARE);
        assert!(after.0 <= most.0 && after.1 <= most.1, "first {before:?}, then {after:?}");
        exec.kill(SIGKILL).expect("kill the exec");
        assert_eq!(exec.exit_status(), 137);
        exec.delete().expect("delete the exec");
        container.end();
    }
}

#[test]
fn a_daemon_that_may_open_too_few_files_serves_and_refuses_new_work() {
    needs!(OurShim);
    let node = Node::exclusive();
    let mut running: Vec<_> = (0..24)
        .map(|_| {
            let start = |spec, io: &Io| node.container("many", spec).started(io);
            Client::attached(Spec::new(&["/bin/cat"]), start)
        })
        .collect();
    let too_few = open_files() - 24;
    // The unit's own command has a flag that lifts such limits, so that settings for all services do no harm.
    let limit = DropIn::new(&format!(
        "[Service]\nLimitNOFILE={too_few}\nExecStart=\nExecStart={} serve\n",
        shim::BINARY
    ));
    wait::until("a daemon with few descriptors serves", daemon::serving);
    let restarts = daemon::restarts();
    for (container, _) in &running {
        assert_eq!(container.phase(), Status::Running);
    }
    let fifos = Fifos::new("refused");
    let (_stdout, _stderr) = (fifos.stdout(), fifos.stderr());
    let refused = node.container("refused", Spec::sleeping()).make();
    let error = refused.create(&fifos.output()).expect_err("there is no room for descriptors");
    assert!(
        error.message().contains("could not open what") && error.message().contains("RLIMIT_NOFILE"),
        "{error}"
    );
    // Running processes can still end.
    let (killed, _client) = running.pop().expect("a container");
    killed.kill(SIGKILL).expect("kill");
    assert_eq!(killed.exit_status(), 137);
    killed.delete().expect("delete");
    drop(killed);
    assert_eq!(daemon::restarts(), restarts, "the daemon does not end");
    drop(limit);
    wait::until("a daemon with enough descriptors serves", daemon::serving);
    for (container, client) in &mut running {
        client.enter("still here\n");
        client.until("still here\n");
        assert_eq!(container.phase(), Status::Running);
    }
    refused.create(&fifos.output()).expect("create");
}

/// The input is closed before there is a process that could read it.
#[test]
fn processes_whose_input_was_closed_early_leave_nothing_in_the_store() {
    needs!(OurShim);
    let node = Node::exclusive();
    let bystander = Bystander::new(&node);
    for spec in [Spec::new(&["/bin/cat"]), Spec::new(&["/bin/cat"]).terminal()] {
        let (container, client) = Client::attached(spec.clone(), |spec, io| {
            let container = node.container("closed", spec).created(io);
            container.close_stdin().expect("close stdin");
            container.start().expect("start");
            container
        });
        let ended = |client: Client, process: &crate::common::task::Process| {
            if spec.has_terminal() {
                process.kill(SIGKILL).expect("kill");
            } else {
                // A FIFO ends when all its writers have closed it.
                drop(client.stdin);
            }
            assert_eq!(process.exit_status(), if spec.has_terminal() { 137 } else { 0 });
            process.delete().expect("delete");
        };
        ended(client, &container);
        drop(container);
        let container = node.container("closed", spec.sleeping_instead()).started(&Io::default());
        let (exec, client) = Client::attached(spec.clone(), |spec, io| {
            let exec = container.exec(spec).added(io);
            exec.close_stdin().expect("close stdin");
            exec.start().expect("start");
            exec
        });
        ended(client, &exec);
        drop(exec);
        container.end();
    }
    bystander.assert_all_untouched("input that was closed early");
}
