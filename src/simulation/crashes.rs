//! Ends the daemon before each effect of each operation, and lets each effect fail in each way. In all cases, the
//! task continues as if nothing had happened, or is as it was before the call, and leaves nothing behind at the end.

use std::fs;
use std::path::Path;
use std::time::Duration;

use crate::cgroup;
use crate::effects::{Failure, Plan};
use crate::launch::contract::{LAUNCHED, PID_FILE};
use crate::launch::fake::Launches;
use crate::oci::criu::Checkpoint;
use crate::services::process::read_pid;
use crate::services::{Delivery, Error};
use crate::store::Store;

use super::harness::{Step, World, waiting_client};

/// The steps in the life of a task, and what they must show.
struct Life {
    steps: &'static [Step],
    world: fn(&str) -> World,
    /// The events that containerd must get.
    events: &'static [&'static str],
}

const WHOLE: Life = Life {
    steps: &Step::ALL,
    world: World::new,
    events: &[
        "create",
        "start",
        "exec-added",
        "exec-started",
        "exec-exit",
        "paused",
        "resumed",
        "exit",
        "delete",
    ],
};

/// The life of a task that is restored from a checkpoint.
const RESTORED: Life = Life { world: World::restoring, ..WHOLE };

/// A life in which the exec ends before `launch` hands it over to systemd.
const BRIEF: Life = Life {
    world: |name| {
        let world = World::new(name);
        world.launch.set(Launches::Brief);
        world
    },
    ..WHOLE
};

/// The life of a task of which checkpoints are taken.
const CHECKPOINTS: Life = Life {
    steps: &Step::CHECKPOINTS,
    world: World::new,
    events: &["create", "start", "paused", "resumed", "exit", "delete"],
};

/// No operation has this many effects.
const MANY: usize = 200;

fn undisturbed(world: &World, steps: &[Step]) {
    world.effects.plan(Plan::Undisturbed);
    world.take(steps, Delivery::First).unwrap().unwrap();
}

#[test]
fn a_task_leaves_nothing_after_its_delete() {
    for (name, life) in [("whole", &WHOLE), ("restored", &RESTORED), ("checkpoints", &CHECKPOINTS)] {
        let world = (life.world)(name);
        undisturbed(&world, life.steps);
        assert_eq!(world.events(), life.events);
        assert_eq!(world.remains(), Vec::<String>::new());
    }
}

/// What an undisturbed daemon shows after the steps, and how many containers were launched.
fn expected(life: &Life, name: &str, steps: usize) -> (Vec<String>, usize) {
    let world = (life.world)(name);
    undisturbed(&world, &life.steps[..steps]);
    (world.seen(), world.systemd.launched())
}

/// Stops the daemon before each effect of the step, and lets the next daemon serve the call again. Calls `meanwhile` while no
/// daemon runs.
fn stop_everywhere(life: &Life, at: usize, name: &str, meanwhile: fn(&World)) {
    let step = life.steps[at];
    let (expected, launched) = expected(life, name, at + 1);
    for effect in 0..MANY {
        let world = (life.world)(name);
        undisturbed(&world, &life.steps[..at]);
        // The daemon has just started, so its recovery is a part of the step.
        world.effects.plan(Plan::Stop(effect));
        let done = world.take(&[step], Delivery::First);
        let place = format!("{step:?} stopped before effect {effect} ({:?})", world.effects.log().last());
        let is_over = done.is_some();
        world.effects.plan(Plan::Undisturbed);
        if let Some(done) = done {
            succeeded(done, &place);
        } else {
            meanwhile(&world);
            let again = world.take(&[step], Delivery::Replayed).unwrap();
            succeeded(again, &place);
        }
        assert_eq!(world.seen(), expected, "{place}");
        assert_eq!(world.systemd.launched(), launched, "{place}");
        undisturbed_rest(life, &world, at, &place);
        assert_eq!(world.events(), life.events, "{place}");
        if is_over {
            assert!(effect > 0);
            return;
        }
    }
    unreachable!("{step:?} has no end");
}

pub(super) fn succeeded(result: Result<(), Error>, place: &str) {
    let error = result.err().map(|error| error.to_string());
    assert_eq!(error, None, "{place}");
}

/// Runs the rest of the life, and checks that it is undisturbed and leaves nothing.
fn undisturbed_rest(life: &Life, world: &World, at: usize, place: &str) {
    let rest = world.take(&life.steps[at + 1..], Delivery::First).unwrap();
    succeeded(rest, place);
    assert_eq!(world.remains(), Vec::<String>::new(), "{place}");
}

/// Lets each effect of the step fail in each way. Repeats a call that fails.
fn fail_everywhere(life: &'static Life, at: usize, name: &'static str) {
    // The tests run in parallel, because most of their time is spent waiting for threads.
    std::thread::scope(|scope| {
        for failure in Failure::ALL {
            scope.spawn(move || {
                let last = (0..MANY).find(|effect| !fail_at(life, at, name, *effect, failure));
                assert!(
                    last.is_some_and(|effects| effects > 0),
                    "{:?}, {failure:?}: {last:?}",
                    life.steps[at]
                );
            });
        }
    });
}

/// Returns false if the step has no such effect.
fn fail_at(life: &Life, at: usize, name: &str, effect: usize, failure: Failure) -> bool {
    let step = life.steps[at];
    let world = (life.world)(&format!("{name}-{failure:?}"));
    undisturbed(&world, &life.steps[..at]);
    let (first, second) = (world.parts(), world.parts());
    let effects = world.effects.clone();
    let done = world.live(move |shim| async move {
        effects.plan(Plan::Fail(effect, failure));
        let done = step.take(first(shim.clone()), Delivery::First).await;
        let place =
            format!("{step:?}, effect {effect} ({:?}) fails by {failure:?}", effects.log().get(effect));
        let was_reached = effects.was_reached();
        effects.plan(Plan::Undisturbed);
        if done.is_err() {
            let again = step.take(second(shim), Delivery::First).await;
            succeeded(again, &place);
        }
        (place, was_reached)
    });
    let (place, was_reached) = done.unwrap();
    undisturbed_rest(life, &world, at, &place);
    assert_eq!(world.events(), life.events, "{place}");
    was_reached
}

/// systemd handles the request of the killed daemon only after the next daemon has queried the unit.
#[test]
fn a_create_is_resumed_although_systemd_was_slow_to_start_its_unit() {
    stop_everywhere(&WHOLE, 0, "slow", |world| {
        let store = Store::new(world.state_dir());
        let record = store.load(&world.task).unwrap();
        if record.is_some_and(|found| found.task.init.phase.is_creating()) {
            let launched = store.dir(&world.task).join(LAUNCHED);
            world.systemd.hide_with_files(world.unit(), &[launched, world.runtime_root().join("web")]);
        }
    });
}

/// The init process ends while no daemon runs that could complete its Create. Another process of the node gets its pid.
#[test]
fn an_init_process_that_ends_before_its_create_is_completed_has_an_exit() {
    let stranger = Path::new("/stranger.service");
    cgroup::fake::make(stranger);
    fs::write(cgroup::dir(stranger).join("cgroup.events"), "populated 1\nfrozen 0\n").unwrap();
    let mut answered = 0;
    for effect in 0..MANY {
        let world = World::new("early-end");
        world.effects.plan(Plan::Stop(effect));
        let done = world.take(&[Step::Create], Delivery::First);
        let place = format!("stopped before effect {effect} ({:?})", world.effects.log().last());
        if done.is_some() {
            assert!(answered > 0, "no daemon has completed a Create of an earlier one");
            return;
        }
        world.effects.plan(Plan::Undisturbed);
        let pid = read_pid(&Store::new(world.state_dir()).dir(&world.task).join(PID_FILE));
        world.systemd.end_unheard(&world.unit(), 0);
        if let Some(pid) = pid {
            cgroup::fake::place(stranger, pid);
        }
        let (parts, init) = (world.parts(), world.init());
        let status = world.live(move |shim| async move {
            Step::Create.take(parts(shim.clone()), Delivery::Replayed).await.ok()?;
            // The process has ended, unless this daemon has begun the Create once more.
            let _ = shim.tasks.kill(&init, nix::libc::SIGKILL as u32, false, Delivery::First).await;
            let waited = tokio::time::timeout(Duration::from_secs(3600), shim.wait(&init, Delivery::First));
            let exit = waited.await.expect("the end of the init process").unwrap();
            shim.delete(&init, Delivery::First, waiting_client()).await.unwrap();
            Some(exit.status)
        });
        let status = status.unwrap();
        assert!(status.is_none_or(|status| [0, 137].contains(&status)), "{place}: {status:?}");
        answered += usize::from(status == Some(0));
        if let Some(pid) = pid {
            cgroup::fake::forget_process(pid);
        }
        assert!(!cgroup::fake::is_to_be_killed(stranger), "{place}");
    }
    unreachable!("the create has no end");
}

/// systemd does not know the process of such an exec, so the next daemon can't ask for its exit.
#[test]
fn the_end_of_a_brief_exec_is_recorded_with_its_start() {
    for effect in 0..MANY {
        let world = (BRIEF.world)("brief");
        undisturbed(&world, &BRIEF.steps[..3]);
        world.effects.plan(Plan::Stop(effect));
        let done = world.take(&[Step::StartExec], Delivery::First);
        let place = format!("stopped before effect {effect} ({:?})", world.effects.log().last());
        let is_over = done.is_some();
        world.effects.plan(Plan::Undisturbed);
        let done = done.or_else(|| world.take(&[Step::StartExec], Delivery::Replayed));
        succeeded(done.unwrap(), &place);
        undisturbed_rest(&BRIEF, &world, 3, &place);
        assert_eq!(world.events(), BRIEF.events, "{place}");
        if is_over {
            assert!(effect > 0);
            return;
        }
    }
    unreachable!("the start has no end");
}

/// A client may name the work path of an earlier checkpoint, in which criu's log says that it has succeeded.
#[test]
fn the_log_of_an_earlier_checkpoint_is_no_success_of_the_next_one() {
    let is_taken = |done: &[String]| done.iter().any(|effect| effect == "runtime checkpoint");
    let mut stops = [0, 0];
    for effect in 0..MANY {
        let world = World::new("old-log");
        undisturbed(&world, &[Step::Create, Step::Start]);
        let work = world.state_dir().with_file_name("work");
        fs::create_dir_all(&work).unwrap();
        fs::write(work.join("dump.log"), "Dumping finished successfully").unwrap();
        let request = Checkpoint { image: "/image".into(), work: Some(work), ..Checkpoint::default() };
        world.effects.plan(Plan::Stop(effect));
        let (task, first) = (world.task.clone(), request.clone());
        let done =
            world.live(move |shim| async move { shim.checkpoint(&task, first, Delivery::First).await });
        let log = world.effects.log();
        if let Some(done) = done {
            assert!(stops.iter().all(|stops| *stops > 0), "before and after the checkpoint: {stops:?}");
            return done.unwrap();
        }
        // The last one is the effect before which the daemon ended.
        let was_taken = is_taken(&log[..log.len() - 1]);
        stops[usize::from(was_taken)] += 1;
        world.effects.plan(Plan::Undisturbed);
        let task = world.task.clone();
        let again =
            world.live(move |shim| async move { shim.checkpoint(&task, request, Delivery::Replayed).await });
        again.unwrap().unwrap();
        assert!(
            was_taken || is_taken(&world.effects.log()),
            "stopped before effect {effect}: {:?}",
            log.last()
        );
    }
    unreachable!("the checkpoint has no end");
}

macro_rules! each_step {
    ($($life:ident $at:literal $stop:ident $fail:ident,)*) => {
        $(
            #[test]
            fn $stop() {
                stop_everywhere(&$life, $at, concat!("stop-", stringify!($life), $at), |_| {});
            }

            #[test]
            fn $fail() {
                fail_everywhere(&$life, $at, concat!("fail-", stringify!($life), $at));
            }
        )*
    };
}

each_step! {
    WHOLE 0 the_daemon_may_end_anywhere_in_create any_effect_of_create_may_fail,
    WHOLE 1 the_daemon_may_end_anywhere_in_start any_effect_of_start_may_fail,
    WHOLE 2 the_daemon_may_end_anywhere_in_exec any_effect_of_exec_may_fail,
    WHOLE 3 the_daemon_may_end_anywhere_in_the_start_of_an_exec any_effect_of_the_start_of_an_exec_may_fail,
    WHOLE 4 the_daemon_may_end_anywhere_in_the_end_of_an_exec any_effect_of_the_end_of_an_exec_may_fail,
    WHOLE 5 the_daemon_may_end_anywhere_in_the_delete_of_an_exec any_effect_of_the_delete_of_an_exec_may_fail,
    WHOLE 6 the_daemon_may_end_anywhere_in_pause any_effect_of_pause_may_fail,
    WHOLE 7 the_daemon_may_end_anywhere_in_resume any_effect_of_resume_may_fail,
    WHOLE 8 the_daemon_may_end_anywhere_in_update any_effect_of_update_may_fail,
    WHOLE 9 the_daemon_may_end_anywhere_in_an_end any_effect_of_an_end_may_fail,
    WHOLE 10 the_daemon_may_end_anywhere_in_delete any_effect_of_delete_may_fail,
    RESTORED 0 the_daemon_may_end_anywhere_in_a_create_with_a_checkpoint any_effect_of_a_create_with_a_checkpoint_may_fail,
    RESTORED 1 the_daemon_may_end_anywhere_in_a_restore any_effect_of_a_restore_may_fail,
    CHECKPOINTS 2 the_daemon_may_end_anywhere_in_a_checkpoint any_effect_of_a_checkpoint_may_fail,
    CHECKPOINTS 4 the_daemon_may_end_anywhere_in_a_checkpoint_of_a_paused_task
        any_effect_of_a_checkpoint_of_a_paused_task_may_fail,
    CHECKPOINTS 6 the_daemon_may_end_anywhere_in_a_last_checkpoint any_effect_of_a_last_checkpoint_may_fail,
}
