//! Tests of units and containers that others have made: whatever becomes of a task of ours with such a name, nothing of others is
//! touched.

use std::fs;
use std::path::PathBuf;

use ttrpc::Code;

use crate::api::status;
use crate::config;
use crate::effects::Plan;
use crate::id::{ProcessKey, UnitName};
use crate::launch::contract::LAUNCHED;
use crate::ops::{AddExec, CreateTask};
use crate::services::files::SlowFiles;
use crate::services::{Delivery, Error};
use crate::store::Store;
use crate::supervise::removal::{Removal, Stop};
use crate::task::request::Stdio;
use crate::unit::{self, name};

use super::crashes::succeeded;
use super::harness::{Step, World, runtime_files, waiting_client};
use super::scenarios::{UP, up};

/// No operation has this many effects.
const MANY: usize = 200;

const LIFE: [Step; 4] = [Step::Create, Step::Start, Step::Kill, Step::Delete];

fn take(world: &World, steps: &[Step]) -> Result<(), Error> {
    world.take(steps, Delivery::First).unwrap()
}

fn is_loaded(world: &World, unit: &UnitName) -> bool {
    world.systemd.units().iter().any(|(loaded, _)| *loaded == unit.to_string())
}

fn delete(world: &World, process: ProcessKey) {
    let deleted = world.live(move |shim| async move {
        shim.delete(&process, Delivery::First, waiting_client()).await.map(drop)
    });
    deleted.unwrap().unwrap();
}

/// Checks that the unit of somebody else runs, and that nothing else is left.
fn only_runs(world: &World, unit: &UnitName, place: &str) {
    assert!(world.systemd.runs(unit), "{place}");
    assert_eq!(world.remains(), [unit.to_string()], "{place}");
}

fn logging() -> Stdio {
    let uri = "binary:///bin/logger".to_owned();
    Stdio { stdout: uri.clone(), stderr: uri, ..Stdio::default() }
}

#[test]
fn a_container_gets_a_longer_name_while_somebody_else_has_a_unit_of_its_name() {
    let world = World::new("foreign");
    world.systemd.start_foreign(world.unit());
    take(&world, &LIFE[..2]).unwrap();
    let longer = name::candidates(&world.task).nth(1).unwrap();
    assert!(world.systemd.runs(&longer));
    take(&world, &LIFE[2..]).unwrap();
    only_runs(&world, &world.unit(), "deleted");
}

#[test]
fn a_create_that_finds_no_name_is_refused() {
    let world = World::new("foreign-all");
    name::candidates(&world.task).for_each(|unit| world.systemd.start_foreign(unit));
    let error = take(&world, &[Step::Create]).unwrap_err();
    assert!(matches!(error, Error::NoUnitName { .. }), "{error}");
    assert!(name::candidates(&world.task).all(|unit| world.systemd.runs(&unit)));
}

#[test]
fn a_unit_that_somebody_else_starts_during_a_create_or_a_start_outlives_the_rollback() {
    let world = World::new("foreign-race");
    world.systemd.start_foreign(world.unit());
    // Somebody else starts the unit after the daemon has looked.
    world.systemd.hide_once(world.unit());
    let error = take(&world, &[Step::Create]).unwrap_err();
    assert!(matches!(error, Error::Unit(unit::error::Error::Exists { .. })), "{error}");
    only_runs(&world, &world.unit(), "created");
    take(&world, &LIFE).unwrap();
    only_runs(&world, &world.unit(), "deleted");

    let world = World::restoring("foreign-restore");
    take(&world, &[Step::Create]).unwrap();
    world.systemd.start_foreign(world.unit());
    let error = take(&world, &[Step::Start]).unwrap_err();
    assert!(matches!(error, Error::Unit(unit::error::Error::Exists { .. })), "{error}");
    assert!(world.systemd.runs(&world.unit()));
    delete(&world, world.init());
    only_runs(&world, &world.unit(), "restored");
}

/// Ends the daemon before each effect of the Create, and lets somebody else do something before the next daemon serves the call
/// again. Then calls `check`, after the Create and after the end of the task, if somebody else has done it.
fn disturb_everywhere(world: fn() -> World, disturb: fn(&World) -> bool, check: fn(&World, bool, &str)) {
    let mut disturbed = 0;
    for effect in 0..MANY {
        let world = world();
        world.effects.plan(Plan::Stop(effect));
        let done = world.take(&[Step::Create], Delivery::First);
        let place = format!("stopped before effect {effect} ({:?})", world.effects.log().last());
        if done.is_some() {
            assert!(disturbed > 0);
            return;
        }
        world.effects.plan(Plan::Undisturbed);
        let is_disturbed = disturb(&world);
        disturbed += usize::from(is_disturbed);
        let created = world.take(&[Step::Create], Delivery::Replayed).unwrap();
        succeeded(created, &place);
        if is_disturbed {
            check(&world, false, &place);
        }
        succeeded(take(&world, &LIFE[1..]), &place);
        if is_disturbed {
            check(&world, true, &place);
        }
    }
    unreachable!("Create has no end");
}

#[test]
fn an_interrupted_create_does_not_touch_a_unit_that_somebody_else_starts_meanwhile() {
    let start_foreign = |world: &World| {
        let is_free = !is_loaded(world, &world.unit());
        if is_free {
            world.systemd.start_foreign(world.unit());
        }
        is_free
    };
    let check = |world: &World, is_over: bool, place: &str| {
        assert!(world.systemd.runs(&world.unit()), "{place}");
        if is_over {
            only_runs(world, &world.unit(), place);
        }
    };
    disturb_everywhere(|| World::new("foreign-meanwhile"), start_foreign, check);
}

/// Makes state of a container of somebody else.
fn record_foreign(dir: PathBuf) -> PathBuf {
    fs::create_dir_all(&dir).unwrap();
    fs::write(dir.join("state.json"), "{}").unwrap();
    dir
}

fn foreign_state(world: &World) -> PathBuf {
    world.runtime_root().join("web")
}

#[test]
fn a_container_of_another_shim_with_the_same_id_is_not_touched() {
    let world = World::new("foreign-state");
    let state = record_foreign(foreign_state(&world));
    take(&world, &LIFE).unwrap();
    assert!(state.join("state.json").exists());
    assert_eq!(world.remains(), [state.display().to_string()]);
}

#[test]
fn a_create_is_refused_if_it_cant_be_kept_apart_from_the_containers_of_others() {
    let world = World::new("foreign-states");
    let apart = PathBuf::from(format!("{}+containerd", world.runtime_root().display()));
    let states = [world.runtime_root(), apart].map(|root| record_foreign(root.join("web")));
    let error = take(&world, &[Step::Create]).unwrap_err();
    assert_eq!(status::number(&error), Code::ALREADY_EXISTS as i32, "{error}");
    assert!(error.to_string().contains(&states[1].parent().unwrap().display().to_string()), "{error}");
    assert!(states.iter().all(|state| state.join("state.json").exists()));
    fs::remove_dir_all(&states[1]).unwrap();
    take(&world, &LIFE).unwrap();
}

#[test]
fn an_interrupted_create_does_not_touch_a_container_that_another_shim_makes_meanwhile() {
    let make = |world: &World| {
        let is_free = !Store::new(world.state_dir()).dir(&world.task).join(LAUNCHED).exists();
        if is_free {
            record_foreign(foreign_state(world));
        }
        is_free
    };
    let check = |world: &World, _: bool, place: &str| {
        assert!(foreign_state(world).join("state.json").exists(), "{place}");
    };
    disturb_everywhere(|| World::new("foreign-state-meanwhile"), make, check);
}

#[test]
fn a_create_is_refused_while_the_container_of_a_lost_record_runs() {
    let world = up("lost-record", &UP);
    fs::remove_dir_all(world.state_dir().join(world.task.namespace.as_str())).unwrap();
    let error = take(&world, &[Step::Create]).unwrap_err();
    assert_eq!(status::number(&error), Code::ALREADY_EXISTS as i32, "{error}");
    assert!(error.to_string().contains(&format!("systemctl stop {}", world.unit())), "{error}");
    assert!(world.systemd.runs(&world.unit()));
    assert!(foreign_state(&world).exists());
    // Somebody stops it.
    world.systemd.unload(&world.unit());
    take(&world, &LIFE).unwrap();
    assert!(foreign_state(&world).exists());
}

#[test]
fn an_exec_gets_a_longer_name_while_somebody_else_has_a_unit_of_its_name() {
    let world = up("foreign-exec", &UP);
    world.systemd.start_foreign(world.exec_unit());
    take(&world, &[Step::AddExec, Step::StartExec]).unwrap();
    let longer = name::exec_candidates(&world.unit(), &world.exec_call().exec).nth(1).unwrap();
    assert!(world.systemd.runs(&longer) && world.systemd.runs(&world.exec_unit()));
}

fn delete_both(world: &World) {
    delete(world, world.exec());
    take(world, &LIFE[2..]).unwrap();
}

#[test]
fn a_unit_that_somebody_else_starts_before_an_exec_outlives_the_exec() {
    let world = up("foreign-start", &[Step::Create, Step::Start, Step::AddExec]);
    world.systemd.start_foreign(world.exec_unit());
    let error = take(&world, &[Step::StartExec]).unwrap_err();
    assert!(matches!(error, Error::Unit(unit::error::Error::Exists { .. })), "{error}");
    assert!(world.systemd.runs(&world.exec_unit()));
    delete_both(&world);
    only_runs(&world, &world.exec_unit(), "deleted");
}

/// Ends the daemon before each effect of a start, and lets somebody else start a unit of that name before the next daemon serves
/// the call again. Deletes the process at the end.
fn start_everywhere(world: fn() -> World, start: Step, unit: fn(&World) -> UnitName, delete: fn(&World)) {
    let mut disturbed = 0;
    for effect in 0..MANY {
        let world = world();
        world.effects.plan(Plan::Stop(effect));
        let done = world.take(&[start], Delivery::First);
        let place = format!("stopped before effect {effect} ({:?})", world.effects.log().last());
        world.effects.plan(Plan::Undisturbed);
        if done.is_some() {
            assert!(disturbed > 0);
            return;
        }
        if is_loaded(&world, &unit(&world)) {
            continue;
        }
        disturbed += 1;
        world.systemd.start_foreign(unit(&world));
        let error = world.take(&[start], Delivery::Replayed).unwrap().unwrap_err();
        assert!(matches!(error, Error::Unit(unit::error::Error::Exists { .. })), "{place}: {error}");
        delete(&world);
        only_runs(&world, &unit(&world), &place);
    }
    unreachable!("the start has no end");
}

#[test]
fn an_interrupted_start_does_not_touch_a_unit_that_somebody_else_starts_meanwhile() {
    let added = || up("foreign-exec-meanwhile", &[Step::Create, Step::Start, Step::AddExec]);
    start_everywhere(added, Step::StartExec, World::exec_unit, delete_both);
    let prepared = || {
        let world = World::restoring("foreign-restore-meanwhile");
        take(&world, &[Step::Create]).unwrap();
        world
    };
    start_everywhere(prepared, Step::Start, World::unit, |world| delete(world, world.init()));
}

#[test]
fn loggers_do_not_touch_units_of_others() {
    let world = World::new("foreign-logger");
    let logger = name::logger(&world.unit()).unwrap();
    world.systemd.start_foreign(logger.clone());
    let create = || CreateTask { stdio: logging(), ..world.create_call() };
    // Somebody else starts the unit after the daemon has looked.
    world.systemd.hide_once(logger.clone());
    let call = create();
    let created = world.live(move |shim| async move { shim.create(call, Delivery::First).await });
    let error = created.unwrap().unwrap_err();
    assert!(matches!(error, Error::Unit(unit::error::Error::Exists { .. })), "{error}");
    only_runs(&world, &logger, "refused");
    let call = create();
    world.live(move |shim| async move { shim.create(call, Delivery::First).await }).unwrap().unwrap();
    let longer = name::candidates(&world.task).nth(1).unwrap();
    assert!(is_loaded(&world, &name::logger(&longer).unwrap()));
    take(&world, &[Step::Start]).unwrap();

    let call = AddExec { stdio: logging(), ..world.exec_call() };
    world.live(move |shim| async move { shim.add_exec(call, Delivery::First).await }).unwrap().unwrap();
    let task = Store::new(world.state_dir()).load(&world.task).unwrap().unwrap().task;
    let of_exec = task.execs[&world.exec_call().exec].logger.clone().unwrap();
    world.systemd.start_foreign(of_exec.clone());
    take(&world, &[Step::StartExec]).unwrap_err();
    assert!(world.systemd.runs(&of_exec));
    delete_both(&world);
    assert!(world.systemd.runs(&of_exec) && world.systemd.runs(&logger));
}

#[test]
fn the_delete_command_does_not_touch_the_unit_of_somebody_else() {
    let world = World::new("foreign-delete");
    // Before the unit of the container is started.
    let store = Store::new(world.state_dir());
    let task = (0..MANY).find_map(|effect| {
        world.effects.plan(Plan::Stop(effect));
        assert!(world.take(&[Step::Create], Delivery::First).is_none());
        store.load(&world.task).unwrap()
    });
    let (task, dir) = (task.unwrap().task, store.dir(&world.task));
    world.effects.plan(Plan::Undisturbed);
    world.systemd.start_foreign(world.unit());
    let state = record_foreign(foreign_state(&world));
    let runtime = world.runtime();
    let removed = async {
        let (manager, oci, files) = (&*world.systemd, &runtime, &SlowFiles::new(config::FILES_LIMIT));
        let runtime_files = &runtime_files();
        let removal =
            Removal { manager, oci, files, runtime_files, task: &task, dir: &dir, stop: Stop::Killed };
        removal.of_task(async { Vec::new() }).await
    };
    let threads = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
    assert_eq!(threads.block_on(removed).text(), "");
    assert!(world.systemd.runs(&world.unit()) && state.join("state.json").exists());
}
