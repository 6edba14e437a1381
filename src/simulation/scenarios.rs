//! Tests of what happens to tasks without a call: exits that systemd reports late, twice or not at all, units that
//! somebody else unloads, launches that fail.

use std::fs;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use ttrpc::Code;

use crate::api::status;
use crate::cgroup;
use crate::effects::{Failure, Plan};
use crate::id::UnitName;
use crate::launch::fake::{BRIEF_STATUS, Launches};
use crate::ops::Status;
use crate::services::{Delivery, Error};
use crate::store::Store;
use crate::task::lifecycle::Exit;
use crate::unit::name;

use super::harness::{Step, World, waiting_client};

pub(super) const UP: [Step; 2] = [Step::Create, Step::Start];
pub(super) const WITH_EXEC: [Step; 4] = [Step::Create, Step::Start, Step::AddExec, Step::StartExec];

/// Long enough for the daemon to apply every report. The clock is paused.
const A_WHILE: Duration = Duration::from_millis(500);

pub(super) fn up(name: &str, steps: &[Step]) -> World {
    let world = World::new(name);
    world.take(steps, Delivery::First).unwrap().unwrap();
    world
}

/// The exit of init that a daemon knows a while after `happens`.
pub(super) fn exit_after(world: &World, happens: impl FnOnce() + Send + 'static) -> Option<Exit> {
    let init = world.init();
    let exit = world.live(move |shim| async move {
        happens();
        tokio::time::sleep(A_WHILE).await;
        shim.tasks.state(&init).unwrap().exit
    });
    exit.unwrap()
}

#[test]
fn an_exit_is_published_once_however_often_systemd_reports_it() {
    let world = up("repeated", &UP);
    let (systemd, unit) = (world.systemd.clone(), world.unit());
    let exit = exit_after(&world, move || {
        systemd.end(&unit, 4);
        systemd.tell(&unit);
        systemd.tell(&unit);
    });
    assert_eq!(exit.map(|exit| exit.status), Some(4));
    assert_eq!(world.events(), ["create", "start", "exit"]);
}

#[test]
fn the_exit_of_an_earlier_process_changes_nothing() {
    let world = up("late", &UP);
    let (systemd, unit) = (world.systemd.clone(), world.unit());
    let exit = exit_after(&world, move || systemd.tell_late(&unit, 1, 9));
    assert_eq!(exit, None);
    assert_eq!(world.events(), ["create", "start"]);
}

#[test]
fn an_exit_during_the_loss_of_the_bus_is_found_afterwards() {
    let world = up("bus", &WITH_EXEC);
    let (systemd, unit, exec_unit) = (world.systemd.clone(), world.unit(), world.exec_unit());
    let exit = exit_after(&world, move || {
        systemd.end_unheard(&exec_unit, 3);
        systemd.end_unheard(&unit, 5);
        systemd.lose_signals();
    });
    assert_eq!(exit.map(|exit| exit.status), Some(5));
    assert_eq!(world.events(), ["create", "start", "exec-added", "exec-started", "exec-exit", "exit"]);
}

#[test]
fn a_reload_of_systemd_ends_nothing() {
    let world = up("reload", &WITH_EXEC);
    let systemd = world.systemd.clone();
    let exit = exit_after(&world, move || systemd.lose_signals());
    assert_eq!(exit, None);
    assert_eq!(world.events(), ["create", "start", "exec-added", "exec-started"]);
}

#[test]
fn an_exit_while_there_is_no_daemon_is_found_by_the_next_one() {
    let world = up("down", &WITH_EXEC);
    world.systemd.end_unheard(&world.exec_unit(), 3);
    world.systemd.end_unheard(&world.unit(), 6);
    let exit = exit_after(&world, || {});
    assert_eq!(exit.map(|exit| exit.status), Some(6));
    assert_eq!(world.events(), ["create", "start", "exec-added", "exec-started", "exec-exit", "exit"]);
}

#[test]
fn the_exit_code_is_lost_if_somebody_unloads_the_unit() {
    let world = up("unloaded", &UP);
    world.systemd.unload(&world.unit());
    let exit = exit_after(&world, || {});
    assert_eq!(exit.map(|exit| exit.status), Some(255));
}

#[test]
fn an_exec_whose_unit_is_unloaded_counts_as_killed() {
    let world = up("exec-unloaded", &WITH_EXEC);
    world.systemd.unload(&world.exec_unit());
    let exec = world.exec();
    let exit = world.live(move |shim| async move { shim.wait(&exec, Delivery::First).await });
    assert_eq!(exit.unwrap().unwrap().status, 137);
}

#[test]
fn the_start_job_of_a_long_exec_is_cancelled_and_nothing_waits_for_an_exec_that_has_ended() {
    // The exec runs for as long as a daemon of a test needs to settle.
    let world = up("start-job", &WITH_EXEC);
    let is_cancelled = || world.effects.log().iter().any(|effect| effect.starts_with("cancel the job of"));
    assert!(is_cancelled());
    world.effects.plan(Plan::Undisturbed);
    let (key, nodes) = (world.exec(), [world.parts(), world.parts()]);
    let users = world.live(move |shim| async move {
        let exec = Arc::downgrade(&shim.tasks.process(&key).unwrap().1);
        let [end, delete] = nodes.map(|node| node(shim.clone()));
        Step::EndExec.take(end, Delivery::First).await.unwrap();
        Step::DeleteExec.take(delete, Delivery::First).await.unwrap();
        tokio::time::sleep(A_WHILE).await;
        exec.strong_count()
    });
    assert_eq!(users, Some(0));
    assert!(!is_cancelled());
}

#[test]
fn a_late_record_of_a_create_that_was_rolled_back_does_not_replace_that_of_another_task() {
    let world = World::new("rolled-back");
    let (init, nodes) = (world.init(), [world.parts(), world.parts()]);
    let new = world.live(move |shim| async move {
        let [first, second] = nodes.map(|node| node(shim.clone()));
        Step::Create.take(first, Delivery::First).await.unwrap();
        let (old, _) = shim.tasks.process(&init).unwrap();
        shim.cleanup.roll_back_create(&old).await;
        Step::Create.take(second, Delivery::First).await.unwrap();
        old.task().init.description = "the old task".to_owned();
        shim.tasks.write_later(&old);
        tokio::time::sleep(A_WHILE).await;
        let (new, _) = shim.tasks.process(&init).unwrap();
        new.task().clone()
    });
    let recorded = Store::new(world.state_dir()).load_all(&Arc::default()).unwrap();
    let recorded: Vec<_> = recorded.into_iter().map(|found| found.unwrap().task).collect();
    assert_eq!(recorded, [new.unwrap()]);
}

/// An earlier version could leave records of processes that systemd never had as main processes.
#[test]
fn a_process_that_systemd_never_knew_has_ended_if_it_does_not_exist() {
    for (own, expected) in [(Some(3), 3), (None, 137)] {
        let world = up("exec-unknown", &WITH_EXEC);
        world.systemd.end_unknown(&world.exec_unit(), own);
        let exec = world.exec();
        let exit = world.live(move |shim| async move {
            tokio::time::sleep(A_WHILE).await;
            shim.tasks.state(&exec).unwrap().exit
        });
        assert_eq!(exit.unwrap().map(|exit| exit.status), Some(expected));
        world.take(&[Step::Kill, Step::Delete], Delivery::First).unwrap().unwrap();
        assert_eq!(world.remains(), Vec::<String>::new());
    }
    for own in [Some(3), None] {
        let world = up("init-unknown", &UP);
        world.systemd.end_unknown(&world.unit(), own);
        assert_eq!(exit_after(&world, || {}).map(|exit| exit.status), Some(255));
        let init = world.init();
        let deleted = world
            .live(move |shim| async move { shim.delete(&init, Delivery::First, waiting_client()).await });
        assert_eq!(deleted.unwrap().unwrap().exit.map(|exit| exit.status), Some(255));
        assert_eq!(world.remains(), Vec::<String>::new());
    }
}

/// An earlier version recorded the start of an exec and its end, which `launch` had reported, one after the other.
#[test]
fn a_record_with_the_start_of_a_brief_exec_alone_is_completed_with_its_end() {
    let world = World::new("brief-half");
    world.launch.set(Launches::Brief);
    world.take(&WITH_EXEC, Delivery::First).unwrap().unwrap();
    let record = world.state_dir().join(world.task.namespace.as_str()).join("web/execs/probe/record.json");
    let mut written: serde_json::Value = serde_json::from_slice(&fs::read(&record).unwrap()).unwrap();
    let phase = &mut written["exec"]["phase"];
    assert_eq!(phase["name"], "stopped");
    *phase = serde_json::json!({"name": "running", "pid": phase["pid"]});
    fs::write(&record, written.to_string()).unwrap();
    let exec = world.exec();
    let exit = world.live(move |shim| async move { shim.wait(&exec, Delivery::First).await });
    assert_eq!(exit.unwrap().unwrap().status, BRIEF_STATUS);
    world.take(&[Step::DeleteExec, Step::Kill, Step::Delete], Delivery::First).unwrap().unwrap();
    assert_eq!(world.remains(), Vec::<String>::new());
}

#[test]
fn a_create_whose_launch_fails_says_why_and_leaves_nothing() {
    let world = World::new("launch-fails");
    world.launch.set(Launches::Fail("no such file".to_owned()));
    let failed = world.take(&[Step::Create], Delivery::First).unwrap();
    assert!(matches!(failed, Err(Error::Launch(reason)) if reason == "no such file"));
    assert_eq!(world.remains(), Vec::<String>::new());
    assert_eq!(world.events(), Vec::<&str>::new());
    world.launch.set(Launches::Work);
    world.take(&UP, Delivery::First).unwrap().unwrap();
}

/// Stops the daemon at each effect of a step whose launch fails, and replays the step in the next daemon. Returns how often
/// the next daemon knew that it had failed, and launched nothing.
fn answers_without_launch(name: &str, before: &[Step], step: Step, unit: fn(&World) -> UnitName) -> usize {
    let mut known = 0;
    for effect in 0..100 {
        let world = up(name, before);
        world.launch.set(Launches::Fail("no such program".to_owned()));
        world.effects.plan(Plan::Stop(effect));
        let done = world.take(&[step], Delivery::First);
        if done.is_some() {
            return known;
        }
        let starts = |world: &World| {
            world.effects.log().iter().filter(|done| **done == format!("start {}", unit(world))).count()
        };
        let is_launched = starts(&world) > 0;
        world.effects.plan(Plan::Undisturbed);
        let failed = world.take(&[step], Delivery::Replayed).unwrap();
        assert_eq!(failed.unwrap_err().to_string(), "no such program", "effect {effect}");
        known += usize::from(is_launched && starts(&world) == 0);
    }
    unreachable!("{step:?} has no end");
}

/// Takes a step whose launch fails, and replays it in the next daemon, as if the first one had ended before it answered.
/// Returns both errors.
fn failed_and_replayed(name: &str, before: &[Step], step: Step) -> [Error; 2] {
    let world = up(name, before);
    world.launch.set(Launches::Fail("no such program".to_owned()));
    let first = world.take(&[step], Delivery::First).unwrap().unwrap_err();
    world.launch.set(Launches::Work);
    let launched = world.effects.log().len();
    let replayed = world.take(&[step], Delivery::Replayed).unwrap().unwrap_err();
    assert!(!world.effects.log()[launched..].iter().any(|done| done.starts_with("start ")), "{step:?}");
    // The client may try again.
    world.take(&[step], Delivery::First).unwrap().unwrap();
    // The last attempt has not failed.
    world.take(&[step], Delivery::Replayed).unwrap().unwrap();
    [first, replayed]
}

#[test]
fn the_replay_of_a_failed_call_gets_the_same_error_and_begins_nothing() {
    let calls =
        [("create-replayed", &[][..], Step::Create), ("start-replayed", &WITH_EXEC[..3], Step::StartExec)];
    for (name, before, step) in calls {
        let [first, replayed] = failed_and_replayed(name, before, step);
        assert_eq!(replayed.to_string(), first.to_string());
        assert_eq!(status::code(&replayed), status::code(&first));
    }
}

#[test]
fn a_create_from_another_bundle_does_not_get_the_error_of_an_earlier_one() {
    let world = World::new("another-bundle");
    world.launch.set(Launches::Fail("no such program".to_owned()));
    world.take(&[Step::Create], Delivery::First).unwrap().unwrap_err();
    world.launch.set(Launches::Work);
    world.new_bundle();
    // An earlier daemon had read this Create, and ended before it began.
    world.take(&[Step::Create], Delivery::Replayed).unwrap().unwrap();
}

#[test]
fn a_create_that_failed_before_a_restart_is_not_begun_again() {
    assert!(answers_without_launch("create-failed", &[], Step::Create, World::unit) > 0);
}

#[test]
fn a_start_of_an_exec_that_failed_before_a_restart_is_not_begun_again() {
    let steps = &WITH_EXEC[..3];
    assert!(answers_without_launch("start-failed", steps, Step::StartExec, World::exec_unit) > 0);
}

#[test]
fn a_rollback_removes_what_the_runtime_records_until_its_unit_is_stopped() {
    let world = World::new("records-late");
    world.launch.set(Launches::RecordLate);
    assert!(matches!(world.take(&[Step::Create], Delivery::First).unwrap(), Err(Error::Launch(_))));
    assert_eq!(world.remains(), Vec::<String>::new());
}

#[test]
fn a_rollback_of_a_restore_removes_what_the_runtime_records_until_its_unit_is_stopped() {
    let world = World::restoring("restore-records-late");
    world.take(&[Step::Create], Delivery::First).unwrap().unwrap();
    world.launch.set(Launches::RecordLate);
    assert!(matches!(world.take(&[Step::Start], Delivery::First).unwrap(), Err(Error::Launch(_))));
    assert!(!world.runtime_root().join("web").exists());
    // Another start finds nothing of the first one.
    world.launch.set(Launches::Work);
    world.take(&[Step::Start, Step::Kill, Step::Delete], Delivery::First).unwrap().unwrap();
    assert_eq!(world.remains(), Vec::<String>::new());
}

/// The streams of a restored container are opened by its Start, those of any other container by its Create.
#[test]
fn a_restore_is_refused_while_the_descriptor_store_is_full_and_can_be_repeated() {
    for (make, is_refused) in [(World::restoring as fn(&str) -> World, true), (World::new, false)] {
        let mut world = make("full-store");
        world.take(&[Step::Create], Delivery::First).unwrap().unwrap();
        world.has_full_store = true;
        let started = world.take(&[Step::Start], Delivery::First).unwrap();
        let code = started.as_ref().err().map(status::code);
        assert_eq!(code, is_refused.then_some(Code::RESOURCE_EXHAUSTED), "{started:?}");
        world.has_full_store = false;
        if is_refused {
            world.take(&[Step::Start], Delivery::First).unwrap().unwrap();
        }
        world.take(&[Step::Kill, Step::Delete], Delivery::First).unwrap().unwrap();
        assert_eq!(world.remains(), Vec::<String>::new());
    }
}

#[test]
fn leftovers_of_a_failed_create_are_removed_after_a_while() {
    let mut leftovers = 0;
    for effect in 0..100 {
        let world = World::new("leftover");
        world.launch.set(Launches::Fail("no such file".to_owned()));
        let (effects, call) = (world.effects.clone(), world.create_call());
        let left = world.live(move |shim| async move {
            effects.plan(Plan::Fail(effect, Failure::TooManyFiles));
            shim.create(call, Delivery::First).await.unwrap_err();
            let left = shim.tasks.count();
            tokio::spawn(shim.clone().remove_leftovers());
            tokio::time::sleep(Duration::from_secs(15)).await;
            left
        });
        leftovers += left.unwrap();
        assert_eq!(world.remains(), Vec::<String>::new(), "effect {effect}");
        if !world.effects.was_reached() {
            assert!(leftovers > 0, "a rollback was cut off");
            return;
        }
    }
    unreachable!("the create has no end");
}

#[test]
fn an_exec_whose_launch_fails_can_be_started_again() {
    let world = up("exec-fails", &WITH_EXEC[..3]);
    world.launch.set(Launches::Fail("no such program".to_owned()));
    let failed = world.take(&[Step::StartExec], Delivery::First).unwrap();
    assert!(matches!(failed, Err(Error::Launch(reason)) if reason == "no such program"));
    world.launch.set(Launches::Work);
    world.take(&[Step::StartExec, Step::EndExec, Step::DeleteExec], Delivery::First).unwrap().unwrap();
    assert_eq!(world.events(), ["create", "start", "exec-added", "exec-started", "exec-exit"]);
}

#[test]
fn a_paused_task_takes_no_exec_and_is_not_deleted() {
    let world = up("paused", &[Step::Create, Step::Start, Step::Pause]);
    let added = world.take(&[Step::AddExec], Delivery::First).unwrap();
    assert!(matches!(added, Err(Error::NoExecIn { .. })));
    let deleted = world.take(&[Step::Delete], Delivery::First).unwrap();
    assert!(matches!(deleted, Err(Error::NotDeletable { phase: "paused" })));
    let init = world.init();
    let state = world.live(move |shim| async move { shim.tasks.state(&init).unwrap().status });
    assert_eq!(state, Some(Status::Paused));
}

#[test]
fn a_created_task_is_killed_by_its_delete() {
    let world = up("delete-created", &UP[..1]);
    world.take(&[Step::Delete], Delivery::First).unwrap().unwrap();
    assert_eq!(world.events(), ["create", "exit", "delete"]);
    assert_eq!(world.remains(), Vec::<String>::new());
}

#[test]
fn an_id_is_taken_until_its_task_is_deleted() {
    let world = up("taken", &UP);
    let again = world.take(&[Step::Create], Delivery::First).unwrap();
    assert!(matches!(again, Err(Error::Exists { .. })));
    world.take(&[Step::Kill, Step::Delete, Step::Create], Delivery::First).unwrap().unwrap();
}

/// The cgroups of the task's unit and of its container.
pub(super) fn cgroups(world: &World) -> (PathBuf, PathBuf) {
    let slice = name::namespace_slice(&world.task.namespace).unwrap();
    let unit = Path::new("/").join(slice.as_str()).join(world.unit().as_str());
    (unit.clone(), unit.join("web"))
}

#[test]
fn a_freeze_by_somebody_else_is_published() {
    let world = up("frozen", &UP);
    let (_, container) = cgroups(&world);
    let exit = exit_after(&world, move || cgroup::fake::set_frozen(&container, true));
    assert_eq!(exit, None);
    assert_eq!(world.events(), ["create", "start", "paused"]);
    let (_, container) = cgroups(&world);
    exit_after(&world, move || cgroup::fake::set_frozen(&container, false));
    assert_eq!(world.events(), ["create", "start", "paused", "resumed"]);
}

#[test]
fn each_kill_for_lack_of_memory_is_published_once() {
    let world = up("oom", &UP);
    let (unit, _) = cgroups(&world);
    let file = cgroup::dir(&unit).join("memory.events");
    std::fs::write(&file, "oom 0\noom_kill 0\n").unwrap();
    for kills in [1, 3, 3] {
        let file = file.clone();
        exit_after(&world, move || std::fs::write(file, format!("oom 9\noom_kill {kills}\n")).unwrap());
    }
    assert_eq!(world.events(), ["create", "start", "oom", "oom", "oom"]);
}

#[test]
fn a_limit_that_somebody_sets_on_the_unit_reaches_the_container() {
    let world = up("set-property", &UP);
    let (unit, container) = cgroups(&world);
    let file = cgroup::dir(&unit).join("pids.max");
    exit_after(&world, move || std::fs::write(file, "7\n").unwrap());
    let limit = std::fs::read_to_string(cgroup::dir(&container).join("pids.max")).unwrap();
    assert_eq!(limit.trim(), "7");
}
