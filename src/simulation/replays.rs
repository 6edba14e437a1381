//! Tests of calls that an earlier daemon has read: each is carried out once, and gets its own outcome.

use ttrpc::Code;

use crate::api::status;
use crate::effects::{Failure, Plan};
use crate::launch::fake::Launches;
use crate::services::{Delivery, Error};
use crate::suspect::Suspect;

use super::harness::{Step, World};
use super::runtime::Starts;
use super::scenarios::{UP, WITH_EXEC, up};

/// Takes a step in a new daemon, as the call with this number of its connection.
fn call(world: &World, step: Step, stream: u32, delivery: Delivery) -> Option<Result<(), Error>> {
    let node = world.parts();
    world.live(move |shim| {
        let request = Suspect::request(stream, "containerd.task.v2.Task", "Step", b"");
        request.watch(step.take(node(shim), delivery))
    })
}

fn text(result: Result<(), Error>) -> Option<String> {
    result.err().map(|error| error.to_string())
}

#[test]
fn the_replay_of_a_start_that_failed_and_ended_init_fails_as_well() {
    let mut world = up("start-failed", &UP[..1]);
    world.starts = Starts::FailAfterwards;
    let first = text(world.take(&[Step::Start], Delivery::First).unwrap());
    assert!(first.as_ref().is_some_and(|first| first.contains("a hook has failed")), "{first:?}");
    assert_eq!(world.events(), ["create", "exit"]);
    // The daemon ended before it answered.
    assert_eq!(text(world.take(&[Step::Start], Delivery::Replayed).unwrap()), first);
    world.take(&[Step::Delete], Delivery::First).unwrap().unwrap();
    assert_eq!(world.remains(), Vec::<String>::new());
}

/// The client gets success if and only if containerd gets the event of the start.
#[test]
fn a_start_that_fails_is_no_success_wherever_the_daemon_ends() {
    let mut failed = 0;
    for effect in 0..100 {
        let mut world = up("start-fails", &UP[..1]);
        world.starts = Starts::FailAfterwards;
        world.effects.plan(Plan::Stop(effect));
        let done = world.take(&[Step::Start], Delivery::First);
        let place = format!("stopped before effect {effect} ({:?})", world.effects.log().last());
        if done.is_some() {
            assert!(failed > 0);
            return;
        }
        world.effects.plan(Plan::Undisturbed);
        let replayed = text(world.take(&[Step::Start], Delivery::Replayed).unwrap());
        let is_started = world.events().contains(&"start");
        assert_eq!(replayed.is_none(), is_started, "{place}: {replayed:?}");
        failed += usize::from(!is_started);
    }
    unreachable!("the start has no end");
}

/// An earlier daemon had read the Start, and ended before it began.
#[test]
fn the_start_of_an_init_process_that_has_ended_is_refused_to_a_replay_as_well() {
    let world = up("start-too-late", &UP[..1]);
    world.systemd.end_unheard(&world.unit(), 3);
    let refused = [Delivery::First, Delivery::Replayed]
        .map(|delivery| text(world.take(&[Step::Start], delivery).unwrap()));
    assert_eq!(refused, [(); 2].map(|()| Some("cannot start a stopped process".to_owned())));
    assert_eq!(world.events(), ["create", "exit"]);
}

#[test]
fn a_checkpoint_that_was_not_begun_does_not_get_the_outcome_of_an_equal_one() {
    let world = up("checkpoint-again", &UP);
    let taken = |stream, delivery| {
        world.effects.plan(Plan::Undisturbed);
        call(&world, Step::Checkpoint, stream, delivery).unwrap().unwrap();
        world.effects.log().iter().filter(|effect| *effect == "runtime checkpoint").count()
    };
    assert_eq!(taken(3, Delivery::First), 1);
    // The daemon ended before it answered.
    assert_eq!(taken(3, Delivery::Replayed), 0);
    // The daemon answered, and then read another call.
    assert_eq!(taken(5, Delivery::Replayed), 1);
    assert_eq!(taken(5, Delivery::Replayed), 0);
}

#[test]
fn a_start_that_was_not_begun_does_not_get_the_error_of_an_earlier_one() {
    let world = up("start-again", &WITH_EXEC[..3]);
    world.launch.set(Launches::Fail("no such program".to_owned()));
    let failed = text(call(&world, Step::StartExec, 3, Delivery::First).unwrap());
    world.launch.set(Launches::Work);
    assert_eq!(text(call(&world, Step::StartExec, 3, Delivery::Replayed).unwrap()), failed);
    assert_eq!(failed.as_deref(), Some("no such program"));
    call(&world, Step::StartExec, 5, Delivery::Replayed).unwrap().unwrap();
}

/// The first Start fails, and init waits for another one.
#[test]
fn a_start_that_succeeds_is_no_failure_because_an_earlier_one_has_failed() {
    for effect in 0..100 {
        let world = up("start-after", &UP[..1]);
        world.effects.plan(Plan::Refuse("runtime start"));
        call(&world, Step::Start, 3, Delivery::First).unwrap().unwrap_err();
        world.effects.plan(Plan::Stop(effect));
        let done = call(&world, Step::Start, 5, Delivery::Replayed);
        let place = format!("stopped before effect {effect} ({:?})", world.effects.log().last());
        world.effects.plan(Plan::Undisturbed);
        let is_over = done.is_some();
        let done = done.or_else(|| call(&world, Step::Start, 5, Delivery::Replayed));
        assert_eq!(text(done.unwrap()), None, "{place}");
        assert_eq!(world.events(), ["create", "start"], "{place}");
        if is_over {
            assert!(effect > 0);
            return;
        }
    }
    unreachable!("the start has no end");
}

#[test]
fn the_replay_of_a_checkpoint_that_failed_gets_the_same_status_code() {
    let world = up("checkpoint-fails", &UP);
    let fails = |stream, delivery| call(&world, Step::Checkpoint, stream, delivery).unwrap().unwrap_err();
    world.effects.plan(Plan::Undisturbed);
    call(&world, Step::Checkpoint, 3, Delivery::First).unwrap().unwrap();
    let at = world.effects.log().iter().position(|effect| effect == "runtime checkpoint").unwrap();
    world.effects.plan(Plan::Fail(at, Failure::Timeout));
    let first = fails(5, Delivery::First);
    world.effects.plan(Plan::Undisturbed);
    // The daemon ended before it answered.
    let replayed = fails(5, Delivery::Replayed);
    assert_eq!(status::number(&first), Code::DEADLINE_EXCEEDED as i32, "{first}");
    assert_eq!(
        (status::number(&replayed), replayed.to_string()),
        (status::number(&first), first.to_string())
    );
}
