//! The daemon ends before each effect of each operation, and each effect fails in each way: whatever happens, the
//! task goes on as if nothing had, or is as it was before the call; and nothing is left of it in the end.

use crate::effects::{Failure, Plan};
use crate::services::{Attempt, Error};

use super::harness::{Step, World};

/// What containerd hears of a whole life.
const EVENTS: [&str; 9] =
    ["create", "start", "exec-added", "exec-started", "exec-exit", "paused", "resumed", "exit", "delete"];

/// More effects than any operation has.
const MANY: usize = 200;

fn undisturbed(world: &World, steps: &[Step]) {
    world.effects.plan(Plan::Undisturbed);
    world.take(steps, Attempt::First).unwrap().unwrap();
}

#[test]
fn a_whole_life_leaves_nothing() {
    let world = World::new("whole-life");
    undisturbed(&world, &Step::ALL);
    assert_eq!(world.events(), EVENTS);
    assert_eq!(world.remains(), Vec::<String>::new());
}

/// What is seen after each of the steps if nothing disturbs them.
fn expected(name: &str, steps: usize) -> Vec<String> {
    let world = World::new(name);
    undisturbed(&world, &Step::ALL[..steps]);
    world.seen()
}

/// Stops the daemon before each effect of the step, and has the next daemon serve the call again. `meanwhile` happens
/// while there is no daemon.
fn stop_everywhere(at: usize, name: &str, meanwhile: fn(&World)) {
    let step = Step::ALL[at];
    let expected = expected(name, at + 1);
    for effect in 0..MANY {
        let world = World::new(name);
        undisturbed(&world, &Step::ALL[..at]);
        // Recovery is part of it: the daemon has just begun.
        world.effects.plan(Plan::Stop(effect));
        let done = world.take(&[step], Attempt::First);
        let place = format!("{step:?} stopped before effect {effect} ({:?})", world.effects.log().last());
        let is_over = done.is_some();
        world.effects.plan(Plan::Undisturbed);
        if let Some(done) = done {
            succeeded(done, &place);
        } else {
            meanwhile(&world);
            let again = world.take(&[step], Attempt::Replayed).unwrap();
            succeeded(again, &place);
        }
        assert_eq!(world.seen(), expected, "{place}");
        assert_eq!(world.systemd.launched(), 1, "{place}");
        undisturbed_rest(&world, at, &place);
        assert_eq!(world.events(), EVENTS, "{place}");
        if is_over {
            assert!(effect > 0);
            return;
        }
    }
    unreachable!("{step:?} has no end");
}

fn succeeded(result: Result<(), Error>, place: &str) {
    let error = result.err().map(|error| error.to_string());
    assert_eq!(error, None, "{place}");
}

/// The rest of the life, which is as if nothing had happened, and leaves nothing.
fn undisturbed_rest(world: &World, at: usize, place: &str) {
    let rest = world.take(&Step::ALL[at + 1..], Attempt::First).unwrap();
    succeeded(rest, place);
    assert_eq!(world.remains(), Vec::<String>::new(), "{place}");
}

/// Has each effect of the step fail in each way; a call that fails is made again.
fn fail_everywhere(at: usize) {
    // Side by side: most of the time is spent waiting for threads.
    std::thread::scope(|scope| {
        for failure in Failure::ALL {
            scope.spawn(move || (0..MANY).find(|effect| !fail_at(at, *effect, failure)));
        }
    });
}

/// False if the step has no such effect.
fn fail_at(at: usize, effect: usize, failure: Failure) -> bool {
    let step = Step::ALL[at];
    let world = World::new(&format!("fail-{at}-{failure:?}"));
    undisturbed(&world, &Step::ALL[..at]);
    let (first, second) = (world.parts(), world.parts());
    let effects = world.effects.clone();
    let done = world.live(move |shim| async move {
        effects.plan(Plan::Fail(effect, failure));
        let done = step.take(first(shim.clone()), Attempt::First).await;
        let place =
            format!("{step:?}, effect {effect} ({:?}) fails by {failure:?}", effects.log().get(effect));
        let was_reached = effects.was_reached();
        effects.plan(Plan::Undisturbed);
        if done.is_err() {
            let again = step.take(second(shim), Attempt::First).await;
            succeeded(again, &place);
        }
        (place, was_reached)
    });
    let (place, was_reached) = done.unwrap();
    undisturbed_rest(&world, at, &place);
    assert_eq!(world.events(), EVENTS, "{place}");
    was_reached
}

/// systemd carries out what the killed daemon has asked for only after the next daemon has looked.
#[test]
fn a_create_is_resumed_although_systemd_was_slow_to_start_its_unit() {
    stop_everywhere(0, "slow", |world| world.systemd.hide_once(world.unit()));
}

macro_rules! each_step {
    ($($at:literal $stop:ident $fail:ident,)*) => {
        $(
            #[test]
            fn $stop() {
                stop_everywhere($at, concat!("stop-", $at), |_| {});
            }

            #[test]
            fn $fail() {
                fail_everywhere($at);
            }
        )*
    };
}

each_step! {
    0 the_daemon_may_end_anywhere_in_create any_effect_of_create_may_fail,
    1 the_daemon_may_end_anywhere_in_start any_effect_of_start_may_fail,
    2 the_daemon_may_end_anywhere_in_exec any_effect_of_exec_may_fail,
    3 the_daemon_may_end_anywhere_in_the_start_of_an_exec any_effect_of_the_start_of_an_exec_may_fail,
    4 the_daemon_may_end_anywhere_in_the_end_of_an_exec any_effect_of_the_end_of_an_exec_may_fail,
    5 the_daemon_may_end_anywhere_in_the_delete_of_an_exec any_effect_of_the_delete_of_an_exec_may_fail,
    6 the_daemon_may_end_anywhere_in_pause any_effect_of_pause_may_fail,
    7 the_daemon_may_end_anywhere_in_resume any_effect_of_resume_may_fail,
    8 the_daemon_may_end_anywhere_in_update any_effect_of_update_may_fail,
    9 the_daemon_may_end_anywhere_in_an_end any_effect_of_an_end_may_fail,
    10 the_daemon_may_end_anywhere_in_delete any_effect_of_delete_may_fail,
}
