//! Tests of calls that an earlier daemon has read: each is carried out once, and gets its own outcome.

use crate::effects::Plan;
use crate::services::{Delivery, Error};

use super::harness::Step;
use super::runtime::Starts;
use super::scenarios::{UP, up};

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
