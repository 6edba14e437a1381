//! Tests the answers of the calls in each phase of a process, and what the calls leave behind.

use tokio_util::sync::CancellationToken;

use crate::api::status;
use crate::id::{ExecId, Namespace, Owner, ProcessKey, TaskId, TaskKey};
use crate::oci::criu::Checkpoint;
use crate::ops::Status;
use crate::services::{Delivery, Error};

use super::harness::{EXEC_STATUS, Step, World, waiting_client};

const SIGTERM: u32 = nix::libc::SIGTERM as u32;
const SIGKILL: u32 = nix::libc::SIGKILL as u32;
const UP: usize = 2;
const EXEC_ADDED: usize = 3;
const EXEC_RUNS: usize = 4;
const EXEC_ENDED: usize = 5;

fn after(name: &str, steps: usize) -> World {
    let world = World::new(name);
    world.take(&Step::ALL[..steps], Delivery::First).unwrap().unwrap();
    world
}

fn probe() -> ExecId {
    ExecId::new("probe").unwrap()
}

#[test]
fn a_signal_needs_a_process_that_runs() {
    for (steps, expected) in [
        (EXEC_ADDED, Some("exec kill error: process not created: failed precondition")),
        (EXEC_RUNS, None),
        (EXEC_ENDED, Some("process already finished: not found")),
    ] {
        let world = after(&format!("kill-{steps}"), steps);
        let exec = world.exec();
        let killed = world
            .live(move |shim| async move { shim.tasks.kill(&exec, SIGTERM, false, Delivery::First).await });
        let error = killed.unwrap().err().map(|error| error.to_string());
        assert_eq!(error.as_deref(), expected, "after {steps} steps");
    }
}

#[test]
fn a_replayed_kill_of_a_process_that_has_ended_succeeds() {
    let world = after("kill-replayed", EXEC_ENDED);
    let exec = world.exec();
    let killed = world
        .live(move |shim| async move { shim.tasks.kill(&exec, SIGTERM, false, Delivery::Replayed).await });
    assert!(killed.unwrap().is_ok());
}

#[test]
fn a_number_that_is_no_signal_is_refused() {
    let world = after("kill-number", UP);
    for signal in [65, u32::MAX] {
        let init = world.init();
        let killed = world
            .live(move |shim| async move { shim.tasks.kill(&init, signal, true, Delivery::First).await });
        assert!(matches!(killed.unwrap(), Err(Error::Signal(refused)) if refused == signal));
    }
}

#[test]
fn signal_0_asks_whether_a_process_exists() {
    let world = after("kill-0", EXEC_RUNS);
    let (init, exec) = (world.init(), world.exec());
    let (alive, gone) = world
        .live(move |shim| async move {
            let alive = shim.tasks.kill(&init, 0, false, Delivery::First).await;
            shim.tasks.kill(&exec, nix::libc::SIGKILL as u32, false, Delivery::First).await.unwrap();
            shim.tasks.process(&exec).unwrap().1.ended().await;
            (alive, shim.tasks.kill(&exec, 0, false, Delivery::First).await)
        })
        .unwrap();
    assert!(alive.is_ok() && matches!(gone, Err(Error::Finished)), "{alive:?} {gone:?}");
}

#[test]
fn a_signal_to_all_reaches_the_execs_too() {
    let world = after("kill-all", EXEC_RUNS);
    let (init, exec) = (world.init(), world.exec());
    let exits = world.live(move |shim| async move {
        shim.tasks.kill(&init, SIGTERM, true, Delivery::First).await?;
        Ok::<_, Error>((shim.wait(&exec, Delivery::First).await?, shim.wait(&init, Delivery::First).await?))
    });
    let (exec, init) = exits.unwrap().unwrap();
    assert_eq!((exec.status, init.status), (128 + SIGTERM, 128 + SIGTERM));
}

#[test]
fn pids_says_which_processes_are_execs() {
    let world = after("pids", EXEC_RUNS);
    let task = world.task.clone();
    let (pids, init) = world
        .live(move |shim| async move { (shim.tasks.pids(&task).await.unwrap(), shim.tasks.init_pid(&task)) })
        .unwrap();
    let of = |exec: Option<ExecId>| pids.iter().filter(move |(_, found)| *found == exec).map(|(pid, _)| *pid);
    assert_eq!(of(None).map(Some).collect::<Vec<_>>(), [init]);
    assert_eq!(of(Some(probe())).count(), 1);
}

#[test]
fn the_former_init_process_of_a_task_that_has_ended_is_listed() {
    let world = after("pids-ended", 10);
    let task = world.task.clone();
    let (pids, init) = world
        .live(move |shim| async move { (shim.tasks.pids(&task).await.unwrap(), shim.tasks.init_pid(&task)) })
        .unwrap();
    assert_eq!(pids, [(init.unwrap(), None)]);
}

#[test]
fn connect_to_a_task_that_does_not_exist_finds_no_process() {
    let world = after("connect", UP);
    let other = TaskKey::usual(Namespace::new("connect").unwrap(), TaskId::new("other").unwrap());
    let pid = world.live(move |shim| async move { shim.tasks.init_pid(&other) });
    assert_eq!(pid, Some(None));
}

#[test]
fn state_names_each_phase_of_an_exec() {
    for (steps, expected) in [
        (EXEC_ADDED, (Status::Created, false, None)),
        (EXEC_RUNS, (Status::Running, true, None)),
        (EXEC_ENDED, (Status::Stopped, true, Some(EXEC_STATUS))),
    ] {
        let world = after(&format!("state-{steps}"), steps);
        let exec = world.exec();
        let state = world.live(move |shim| async move { shim.tasks.state(&exec).unwrap() }).unwrap();
        let exit = state.exit.map(|exit| exit.status);
        assert_eq!((state.status, state.pid.is_some(), exit), expected, "after {steps} steps");
    }
}

#[test]
fn an_exec_that_runs_is_paused_with_its_task() {
    let world = after("state-paused", EXEC_RUNS);
    world.take(&[Step::Pause], Delivery::First).unwrap().unwrap();
    let exec = world.exec();
    let state = world.live(move |shim| async move { shim.tasks.state(&exec).unwrap().status });
    assert_eq!(state, Some(Status::Paused));
}

#[test]
fn a_process_whose_client_did_not_wait_for_the_delete_keeps_its_exit() {
    let gone = CancellationToken::new();
    gone.cancel();
    let world = after("gone", EXEC_ENDED);
    let (init, exec) = (world.init(), world.exec());
    let (exec_exit, init) = world
        .live(move |shim| async move {
            let refused = shim.delete(&exec, Delivery::First, &gone).await;
            assert!(matches!(refused, Err(Error::ClientGone { .. })), "{refused:?}");
            let state = shim.tasks.state(&exec).unwrap();
            assert_eq!(
                (state.status, state.exit.map(|exit| exit.status)),
                (Status::Stopped, Some(EXEC_STATUS))
            );
            let exec = shim.delete(&exec, Delivery::First, waiting_client()).await.unwrap();
            shim.tasks.kill(&init, SIGKILL, true, Delivery::First).await.unwrap();
            shim.wait(&init, Delivery::First).await.unwrap();
            let refused = shim.delete(&init, Delivery::First, &gone).await;
            assert!(matches!(refused, Err(Error::ClientGone { .. })), "{refused:?}");
            assert_eq!(shim.tasks.state(&init).unwrap().status, Status::Stopped);
            (exec.exit.unwrap().status, init)
        })
        .unwrap();
    assert_eq!(exec_exit, EXEC_STATUS);
    // The next daemon has it, too.
    let deleted = world
        .live(move |shim| async move { shim.delete(&init, Delivery::First, waiting_client()).await })
        .unwrap();
    assert_eq!(deleted.unwrap().exit.unwrap().status, 137);
    assert_eq!(world.events().iter().filter(|event| **event == "delete").count(), 1);
    assert_eq!(world.remains(), Vec::<String>::new());
}

#[test]
fn calls_for_an_exec_that_was_never_added_are_not_found() {
    let world = after("unknown", UP);
    let exec = ProcessKey { task: world.task.clone(), exec: Some(probe()) };
    let errors = world.live(move |shim| async move {
        [
            shim.tasks.state(&exec).err(),
            shim.close_stdin(&exec).err(),
            shim.tasks.resize(&exec, 80, 25).await.err(),
            shim.tasks.kill(&exec, SIGTERM, false, Delivery::First).await.err(),
            shim.start(&exec, Delivery::First).await.err(),
            shim.delete(&exec, Delivery::First, waiting_client()).await.err(),
            shim.wait(&exec, Delivery::First).await.err(),
        ]
    });
    for error in errors.unwrap() {
        assert!(matches!(error, Some(Error::UnknownExec { .. })), "{error:?}");
    }
}

#[test]
fn a_size_is_accepted_before_the_terminal_exists_and_refused_after_the_exit() {
    let world = after("resize", EXEC_ADDED);
    let exec = world.exec();
    world.live(move |shim| async move { shim.tasks.resize(&exec, 80, u32::MAX).await.unwrap() }).unwrap();
    world.take(&[Step::StartExec, Step::EndExec], Delivery::First).unwrap().unwrap();
    let exec = world.exec();
    let resized = world.live(move |shim| async move { shim.tasks.resize(&exec, 80, 25).await });
    assert!(matches!(resized.unwrap(), Err(Error::ResizeStopped)));
}

#[test]
fn an_exec_may_not_have_the_id_of_its_task_or_of_another_exec() {
    let world = after("exec-id", EXEC_ADDED);
    for (id, reason) in
        [("web", "exec id web is the id of the container,"), ("probe", "id probe: already exists")]
    {
        let mut call = world.exec_call();
        call.exec = ExecId::new(id).unwrap();
        let added = world.live(move |shim| async move { shim.add_exec(call, Delivery::First).await });
        let error = added.unwrap().unwrap_err();
        assert_eq!(status::number(&error), status::number(&Error::ExecExists { exec: id.to_owned() }));
        assert!(error.to_string().starts_with(reason), "{error}");
    }
}

#[test]
fn only_a_call_that_adds_a_process_takes_busy_files_for_an_id_in_use() {
    let world = World::new("files-busy");
    let (init, create) = (world.init(), world.create_call());
    let created = world.live(move |shim| async move {
        let _busy = shim.files.occupy(&init);
        shim.create(create, Delivery::First).await
    });
    assert!(matches!(created, Some(Err(Error::Exists { .. }))), "{created:?}");

    world.take(&[Step::Create, Step::Start], Delivery::First).unwrap().unwrap();
    let (exec, add) = (world.exec(), world.exec_call());
    let added = world.live(move |shim| async move {
        let _busy = shim.files.occupy(&exec);
        shim.add_exec(add, Delivery::First).await
    });
    assert!(matches!(added, Some(Err(Error::ExecExists { .. }))), "{added:?}");

    let init = world.init();
    let request = Checkpoint { image: "/image".into(), work: Some("/work".into()), ..Checkpoint::default() };
    let dumped = world.live(move |shim| async move {
        let _busy = shim.files.occupy(&init);
        shim.checkpoint(&init.task, request, Delivery::First).await
    });
    let error = dumped.unwrap().unwrap_err();
    assert!(matches!(error, Error::FilesBusy { .. }), "{error}");
    assert_eq!(status::number(&error), ttrpc::Code::RESOURCE_EXHAUSTED as i32);
}

#[test]
fn an_exec_that_runs_is_neither_started_nor_deleted() {
    let world = after("exec-runs", EXEC_RUNS);
    let exec = world.exec();
    let (started, deleted) = world
        .live(move |shim| async move {
            (
                shim.start(&exec, Delivery::First).await,
                shim.delete(&exec, Delivery::First, waiting_client()).await,
            )
        })
        .unwrap();
    assert_eq!(started.unwrap_err().to_string(), "cannot start a running process");
    assert!(matches!(deleted, Err(Error::NotDeletable { phase: "running" })));
}

#[test]
fn a_delete_wakes_those_who_wait_for_an_exec_that_never_ran() {
    let world = after("wait-added", EXEC_ADDED);
    let exec = world.exec();
    let (waited, deleted) = world
        .live(move |shim| async move {
            tokio::join!(
                shim.wait(&exec, Delivery::First),
                shim.delete(&exec, Delivery::First, waiting_client())
            )
        })
        .unwrap();
    assert!(matches!(waited, Err(Error::UnknownExec { .. })), "{waited:?}");
    assert_eq!(deleted.unwrap().pid, None);
}

#[test]
fn a_task_that_containerd_gives_up_is_killed_and_owes_nothing() {
    let world = after("given-up", EXEC_RUNS);
    let task = world.task.clone();
    let before = world.events();
    let deleted = world
        .live(move |shim| async move { shim.clean_up(&task, &Owner::default()).await })
        .unwrap()
        .unwrap();
    assert_eq!(deleted.exit.map(|exit| exit.status), Some(137));
    assert_eq!(world.remains(), Vec::<String>::new());
    assert_eq!(world.events(), before, "containerd publishes the end itself");
}

#[test]
fn the_task_of_another_containerd_is_not_given_up() {
    let world = after("given-up-other", UP);
    let (task, init) = (world.task.clone(), world.init());
    let (given_up, status) = world
        .live(move |shim| async move {
            let other = Owner::new("0123456789abcdef").unwrap();
            (shim.clean_up(&task, &other).await, shim.tasks.state(&init).unwrap().status)
        })
        .unwrap();
    assert!(matches!(given_up, Err(Error::UnknownTask { .. })));
    assert_eq!(status, Status::Running);
}

#[test]
fn the_statistics_of_a_task_that_has_ended_are_those_that_systemd_keeps() {
    let world = after("stats", 10);
    let task = world.task.clone();
    let stats = world.live(move |shim| async move { shim.stats(&task).await }).unwrap().unwrap();
    assert_eq!(stats.memory_events.map(|events| events.oom_kill), Some(0));
}

#[test]
fn an_update_of_a_task_that_has_ended_is_refused() {
    let world = after("update-ended", 10);
    let updated = world.take(&[Step::Update], Delivery::First).unwrap();
    assert_eq!(updated.unwrap_err().to_string(), "cannot update a stopped process");
}

#[test]
fn a_task_that_runs_is_not_resumed_and_a_paused_one_not_paused() {
    let world = after("resume-running", UP);
    let resumed = world.take(&[Step::Resume], Delivery::First).unwrap();
    assert_eq!(resumed.unwrap_err().to_string(), "cannot resume a running process");
    let paused = world.take(&[Step::Pause, Step::Pause], Delivery::First).unwrap();
    assert_eq!(paused.unwrap_err().to_string(), "cannot pause a paused process");
}
