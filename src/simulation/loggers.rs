//! Tests of processes whose output goes to the logger of a `binary://` URI.

use crate::launch::fake::Launches;
use crate::ops::{AddExec, CreateTask, Status};
use crate::services::{Delivery, Error};
use crate::task::request::Stdio;
use crate::unit::name;

use super::harness::{Step, World};

fn stdio(scheme: &str) -> Stdio {
    let uri = format!("{scheme}:///bin/logger");
    Stdio { stdout: uri.clone(), stderr: uri, ..Stdio::default() }
}

fn create(world: &World, scheme: &str) -> CreateTask {
    CreateTask { stdio: stdio(scheme), ..world.create_call() }
}

/// All units except those of the task and of the exec.
fn loggers(world: &World) -> Vec<String> {
    let own = [world.unit().to_string(), world.exec_unit().to_string()];
    let units = world.systemd.units().into_iter().map(|(unit, _)| unit);
    units.filter(|unit| !own.contains(unit)).collect()
}

#[test]
fn a_container_has_a_logger_until_it_is_deleted() {
    let world = World::new("logger");
    let (call, init) = (create(&world, "binary-v2"), world.init());
    let created = world.live(move |shim| async move {
        shim.create(call, Delivery::First).await?;
        shim.start(&init, Delivery::First).await
    });
    created.unwrap().unwrap();
    assert_eq!(loggers(&world), [name::logger(&world.unit()).unwrap().to_string()]);
    world.take(&[Step::Kill, Step::Delete], Delivery::First).unwrap().unwrap();
    assert_eq!(world.remains(), Vec::<String>::new());
}

#[test]
fn a_logger_of_version_1_may_close_its_pipe_without_a_byte_and_one_of_version_2_may_not() {
    for (scheme, is_ready) in [("binary", true), ("binary-v2", false)] {
        let world = World::new("logger-silent");
        world.launch.set(Launches::SilentLogger);
        let call = create(&world, scheme);
        let created =
            world.live(move |shim| async move { shim.create(call, Delivery::First).await }).unwrap();
        assert_eq!(created.is_ok(), is_ready, "{scheme}: {created:?}");
        if let Err(error) = created {
            assert!(matches!(error, Error::Logger { .. }), "{error:?}");
            assert_eq!(world.remains(), Vec::<String>::new());
        }
    }
}

#[test]
fn an_exec_whose_logger_is_not_ready_can_be_started_again() {
    let world = World::new("logger-exec");
    world.take(&[Step::Create, Step::Start], Delivery::First).unwrap().unwrap();
    world.launch.set(Launches::SilentLogger);
    let (call, exec) = (AddExec { stdio: stdio("binary-v2"), ..world.exec_call() }, world.exec());
    let started = world.live(move |shim| async move {
        shim.add_exec(call, Delivery::First).await?;
        let started = shim.start(&exec, Delivery::First).await;
        assert_eq!(shim.tasks.state(&exec)?.status, Status::Created);
        started
    });
    assert!(matches!(started.unwrap(), Err(Error::Logger { .. })));
    assert_eq!(loggers(&world), Vec::<String>::new());
    world.launch.set(Launches::Work);
    world.take(&[Step::StartExec], Delivery::First).unwrap().unwrap();
    assert_eq!(loggers(&world).len(), 1);
    world.take(&[Step::EndExec, Step::DeleteExec], Delivery::First).unwrap().unwrap();
    assert_eq!(loggers(&world), Vec::<String>::new());
}

#[test]
fn a_logger_that_never_reports_fails_the_create_after_a_limit() {
    let world = World::new("logger-hangs");
    world.launch.set(Launches::HangingLogger);
    let call = create(&world, "binary");
    let created = world.live(move |shim| async move {
        let begun = tokio::time::Instant::now();
        let created = shim.create(call, Delivery::First).await;
        (created, begun.elapsed())
    });
    let (created, waited) = created.unwrap();
    assert!(matches!(created, Err(Error::Logger { .. })), "{created:?}");
    assert!(waited >= crate::config::STDIO_LIMIT && waited < 2 * crate::config::STDIO_LIMIT, "{waited:?}");
    assert_eq!(world.remains(), Vec::<String>::new());
}
