//! Tests what happens to events and Deletes while containerd can't be reached, and when it is back.

use std::sync::Arc;
use std::time::Duration;

use tokio::time::Instant;

use crate::id::ProcessKey;
use crate::ops::Shim;
use crate::services::Delivery;

use super::containerd::FakeContainerd;
use super::harness::waiting_client;
use super::scenarios::{UP, WITH_EXEC, up};

const SIGKILL: u32 = nix::libc::SIGKILL as u32;

/// Long enough for the longest pauses between attempts to reach containerd. The next attempt is a second later.
const OUTAGE: Duration = Duration::from_secs(20);

/// Ends the process of a task.
async fn end(shim: &Shim, init: &ProcessKey) {
    shim.tasks.kill(init, SIGKILL, false, Delivery::First).await.unwrap();
    shim.wait(init, Delivery::First).await.unwrap();
}

/// How long a Delete takes.
async fn delete(shim: &Arc<Shim>, process: &ProcessKey) -> Duration {
    let begun = Instant::now();
    shim.delete(process, Delivery::First, waiting_client()).await.unwrap();
    begun.elapsed()
}

/// Lets containerd be away for a while, in which a task ends.
async fn outage(shim: &Shim, init: &ProcessKey, containerd: &FakeContainerd) {
    containerd.leave();
    end(shim, init).await;
    tokio::time::sleep(OUTAGE).await;
    containerd.come_back();
}

#[test]
fn a_containerd_that_is_back_and_calls_gets_its_events_at_once() {
    let world = up("outage-call", &UP);
    let (containerd, init) = (world.containerd(), world.init());
    let events = world.live(move |shim| async move {
        outage(&shim, &init, &containerd).await;
        shim.tasks.publishing.note_sign();
        tokio::time::sleep(Duration::from_millis(100)).await;
        containerd.events()
    });
    assert_eq!(events.unwrap(), ["create", "start", "exit"]);
}

#[test]
fn a_delete_is_answered_after_the_exit_of_the_task_was_accepted() {
    let world = up("outage-delete", &UP);
    let (containerd, init) = (world.containerd(), world.init());
    let (events, took) = world
        .live(move |shim| async move {
            outage(&shim, &init, &containerd).await;
            let took = delete(&shim, &init).await;
            (containerd.events(), took)
        })
        .unwrap();
    assert_eq!(events, ["create", "start", "exit"]);
    assert!(took < Duration::from_millis(500), "{took:?}");
    assert_eq!(world.events(), ["create", "start", "exit", "delete"]);
}

#[test]
fn a_delete_of_an_exec_is_answered_after_its_exit_was_accepted() {
    let world = up("outage-exec", &WITH_EXEC);
    let (containerd, systemd) = (world.containerd(), world.systemd.clone());
    let (exec, unit) = (world.exec(), world.exec_unit());
    let events = world.live(move |shim| async move {
        containerd.leave();
        systemd.end(&unit, 3);
        shim.wait(&exec, Delivery::First).await.unwrap();
        tokio::time::sleep(OUTAGE).await;
        containerd.come_back();
        delete(&shim, &exec).await;
        containerd.events()
    });
    assert_eq!(events.unwrap(), ["create", "start", "exec-added", "exec-started", "exec-exit"]);
}

/// The next daemon has the exit of the task in the record, and serves the Delete once more.
#[test]
fn a_replayed_delete_is_answered_after_the_exit_of_the_task_was_accepted() {
    let world = up("outage-replay", &UP);
    let (containerd, init) = (world.containerd(), world.init());
    containerd.leave();
    let ending = init.clone();
    world.live(move |shim| async move { end(&shim, &ending).await }).unwrap();
    let events = world.live(move |shim| async move {
        tokio::time::sleep(OUTAGE).await;
        containerd.come_back();
        shim.delete(&init, Delivery::Replayed, waiting_client()).await.unwrap();
        containerd.events()
    });
    assert_eq!(events.unwrap(), ["create", "start", "exit"]);
}

#[test]
fn a_delete_does_not_wait_for_a_containerd_that_is_away() {
    let world = up("outage-away", &UP);
    let (containerd, init) = (world.containerd(), world.init());
    let took = world.live(move |shim| async move {
        containerd.leave();
        end(&shim, &init).await;
        tokio::time::sleep(OUTAGE).await;
        let took = delete(&shim, &init).await;
        containerd.come_back();
        shim.tasks.publishing.note_sign();
        took
    });
    assert!(took.unwrap() < Duration::from_millis(500), "{took:?}");
    // No event is lost.
    assert_eq!(world.events(), ["create", "start", "exit", "delete"]);
}

#[test]
fn a_delete_waits_for_a_containerd_that_hangs_but_not_for_long() {
    let world = up("outage-hangs", &UP);
    let (containerd, init) = (world.containerd(), world.init());
    let took = world.live(move |shim| async move {
        containerd.hang();
        end(&shim, &init).await;
        delete(&shim, &init).await
    });
    let took = took.unwrap();
    assert!(took >= Duration::from_secs(2) && took < Duration::from_secs(3), "{took:?}");
}

#[test]
fn a_delete_waits_for_nothing_if_all_events_were_accepted() {
    let world = up("outage-none", &UP);
    let (containerd, init) = (world.containerd(), world.init());
    let signs = world.live(move |shim| async move {
        end(&shim, &init).await;
        tokio::time::sleep(OUTAGE).await;
        containerd.hang();
        let before = *shim.tasks.publishing.signs().borrow();
        let took = delete(&shim, &init).await;
        assert!(took < Duration::from_millis(500), "{took:?}");
        *shim.tasks.publishing.signs().borrow() - before
    });
    assert_eq!(signs, Some(0), "the publisher was not woken");
}
