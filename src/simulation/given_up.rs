//! Tests of tasks that containerd has given up (`delete`, or a Delete during a Create). containerd does not ask again: the
//! daemon removes them, whatever fails, and whenever the daemon ends.

use std::fs;
use std::future::poll_fn;
use std::pin::Pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::task::Poll;
use std::time::Duration;

use crate::config;
use crate::effects::{Effects, Failure, Plan};
use crate::id::{Owner, TaskId, TaskKey};
use crate::ops::Shim;
use crate::services::{Delivery, Error, WaitsFor};
use crate::store::Store;
use crate::unit::name;

use super::harness::{Step, World, waiting_client};
use super::runtime::Starts;
use super::scenarios::{UP, WITH_EXEC, up};

/// Long enough for an operation to begin, and to hang.
const A_WHILE: Duration = Duration::from_millis(500);

/// Longer than everything in the daemon has to wait. The clock is paused.
const ANY_LIMIT: Duration = Duration::from_secs(3600);

/// Whether the record says that the task is given up. `None` if there is no record.
fn recorded(world: &World) -> Option<bool> {
    let found = Store::new(world.state_dir()).load(&world.task).unwrap();
    found.map(|found| found.task.given_up)
}

/// Polls a Create until the daemon has the task. It does no further step then. Returns its result if it ends before.
async fn until_registered<F: Future>(shim: &Shim, task: &TaskKey, create: Pin<&mut F>) -> Option<F::Output> {
    poll_until(create, || shim.tasks.entry(task).is_ok()).await
}

/// Polls `work` until `is_enough`. Returns its result if it ends before.
async fn poll_until<F: Future>(mut work: Pin<&mut F>, is_enough: impl Fn() -> bool) -> Option<F::Output> {
    while !is_enough() {
        if let Poll::Ready(done) = poll_fn(|context| Poll::Ready(work.as_mut().poll(context))).await {
            return Some(done);
        }
        tokio::task::yield_now().await;
    }
    None
}

/// Takes steps, and then another step. Meanwhile containerd gives the task up, and the daemon ends before one effect after the
/// other. Checks that the next daemon, which gets no call, leaves nothing of a task whose record says that it is given up.
fn give_up_everywhere(name: &str, steps: &[Step], step: Step, starts: Starts) {
    let mut given_up = 0;
    for effect in 0..100 {
        let mut world = up(name, steps);
        world.starts = starts;
        let (effects, node, task) = (world.effects.clone(), world.parts(), world.task.clone());
        let done = world.live(move |shim| async move {
            if step == Step::Create {
                effects.plan(Plan::Stop(effect));
            }
            let mut under_way = Box::pin(step.take(node(shim.clone()), Delivery::First));
            if step == Step::Create {
                let created = until_registered(&shim, &task, under_way.as_mut()).await;
                assert!(created.is_none(), "{created:?}");
            } else {
                let ended = tokio::time::timeout(A_WHILE, &mut under_way).await;
                assert!(ended.is_err(), "{ended:?}");
                effects.plan(Plan::Stop(effect));
            }
            let owner = Owner::default();
            let deleting = tokio::time::timeout(ANY_LIMIT, shim.clean_up(&task, &owner));
            let (deleted, done) = tokio::join!(deleting, under_way);
            let deleted = deleted.expect("the end of the operation that is under way");
            assert!(matches!(deleted, Ok(_) | Err(Error::UnknownTask { .. })), "{deleted:?}");
            assert!(done.is_err(), "{done:?}");
        });
        let place = format!("stopped before effect {effect} ({:?})", world.effects.log().last());
        let is_recorded = recorded(&world);
        world.effects.plan(Plan::Undisturbed);
        world.live(|_| async {}).unwrap();
        if is_recorded != Some(false) {
            assert_eq!(world.remains(), Vec::<String>::new(), "{place}");
        }
        assert!(!world.events().contains(&"exit"), "{place}");
        given_up += usize::from(is_recorded == Some(true));
        if done.is_some() {
            assert!(given_up > 2, "no daemon has ended meanwhile");
            return;
        }
    }
    unreachable!("the cleanup has no end");
}

#[test]
fn a_task_that_is_given_up_during_a_start_that_hangs_is_removed_by_whatever_daemon() {
    give_up_everywhere("given-up-start", &UP[..1], Step::Start, Starts::Hang);
}

#[test]
fn a_task_that_is_given_up_during_its_create_is_removed_by_whatever_daemon() {
    give_up_everywhere("given-up-create", &[], Step::Create, Starts::Work);
}

/// A client gives up its Create and deletes the task, and the daemon ends before one effect after the other. The next daemon gets
/// the calls that were not answered, the Delete before or after the Create.
fn delete_during_create_everywhere(is_delete_first: bool) {
    let mut given_up = 0;
    for effect in 0..100 {
        let world = World::new("deleted-create");
        let (effects, node, init) = (world.effects.clone(), world.parts(), world.init());
        let answered = Arc::new(AtomicBool::new(false));
        let answer = answered.clone();
        let done = world.live(move |shim| async move {
            effects.plan(Plan::Stop(effect));
            let mut create = Box::pin(Step::Create.take(node(shim.clone()), Delivery::First));
            let created = until_registered(&shim, &init.task, create.as_mut()).await;
            assert!(created.is_none(), "{created:?}");
            let delete = async {
                let deleting = shim.delete(&init, Delivery::First, waiting_client());
                let deleted = tokio::time::timeout(ANY_LIMIT, deleting).await.expect("the end of the Delete");
                assert!(matches!(deleted, Err(Error::UnknownTask { .. })), "{deleted:?}");
                answer.store(true, Ordering::Relaxed);
            };
            tokio::join!(delete, create)
        });
        let place = format!("stopped before effect {effect} ({:?})", world.effects.log().last());
        let is_recorded = recorded(&world);
        world.effects.plan(Plan::Undisturbed);
        if done.is_some() {
            assert_eq!(world.remains(), Vec::<String>::new(), "{place}");
            assert!(given_up > 2, "no daemon has ended meanwhile");
            return;
        }
        let (node, init) = (world.parts(), world.init());
        let replayed = world.live(move |shim| async move {
            let mut create = Box::pin(Step::Create.take(node(shim.clone()), Delivery::Replayed));
            let delete = async {
                if !answered.load(Ordering::Relaxed) {
                    let _ = shim.delete(&init, Delivery::Replayed, waiting_client()).await;
                }
            };
            // Before the record, there is nothing of which the Delete could know.
            if is_delete_first && is_recorded.is_some() {
                delete.await;
                create.await
            } else {
                match until_registered(&shim, &init.task, create.as_mut()).await {
                    Some(created) => {
                        delete.await;
                        created
                    }
                    None => tokio::join!(delete, create).1,
                }
            }
        });
        assert_eq!(world.remains(), Vec::<String>::new(), "{place}, and then {replayed:?}");
        given_up += usize::from(is_recorded == Some(true));
    }
    unreachable!("the removal has no end");
}

#[test]
fn a_task_that_is_deleted_during_its_create_is_removed_by_whatever_daemon() {
    delete_during_create_everywhere(false);
    delete_during_create_everywhere(true);
}

#[test]
fn a_task_that_is_deleted_during_its_create_is_removed_later_if_it_can_not_be_removed_at_once() {
    for effect in 0..100 {
        let world = World::new("deleted-fails");
        let (effects, node, init) = (world.effects.clone(), world.parts(), world.init());
        let lived = world.live(move |shim| async move {
            let mut create = Box::pin(Step::Create.take(node(shim.clone()), Delivery::First));
            until_registered(&shim, &init.task, create.as_mut()).await;
            effects.plan(Plan::Fail(effect, Failure::Timeout));
            let mut delete = Box::pin(shim.delete(&init, Delivery::First, waiting_client()));
            // The Create does no step before it is given up: it would fail by itself.
            let is_given_up = || shim.tasks.entry(&init.task).is_ok_and(|entry| entry.task().given_up);
            let deleted = match poll_until(delete.as_mut(), is_given_up).await {
                Some(deleted) => {
                    let _ = create.await;
                    deleted
                }
                None => tokio::join!(delete, create).0,
            };
            assert!(matches!(deleted, Err(Error::UnknownTask { .. })), "{deleted:?}");
            tokio::spawn(shim.clone().remove_leftovers());
            tokio::time::sleep(Duration::from_secs(15)).await;
        });
        lived.unwrap();
        assert_eq!(world.remains(), Vec::<String>::new(), "effect {effect}");
        if !world.effects.was_reached() {
            assert!(effect > 3, "the removal has few effects: {:?}", world.effects.log());
            return;
        }
    }
    unreachable!("the removal has no end");
}

#[test]
fn a_task_that_is_given_up_is_removed_later_if_it_can_not_be_removed_at_once() {
    let mut failures = 0;
    for effect in 0..100 {
        let world = up("given-up-fails", &WITH_EXEC);
        let (effects, task) = (world.effects.clone(), world.task.clone());
        let failed = world.live(move |shim| async move {
            effects.plan(Plan::Fail(effect, Failure::Timeout));
            let failed = shim.clean_up(&task, &Owner::default()).await.is_err();
            tokio::spawn(shim.remove_leftovers());
            tokio::time::sleep(Duration::from_secs(15)).await;
            failed
        });
        failures += usize::from(failed.unwrap());
        assert_eq!(world.remains(), Vec::<String>::new(), "effect {effect}");
        if !world.effects.was_reached() {
            assert!(failures > 0, "a removal was cut off");
            return;
        }
    }
    unreachable!("the removal has no end");
}

/// Makes a second task beside that of the world. Then `block` keeps the daemon from the removal of the first one for 20 minutes.
fn removes_another_meanwhile<B: Future<Output = ()> + Send>(
    name: &str,
    block: impl FnOnce(Arc<Shim>, Arc<Effects>, TaskKey) -> B + Send + 'static,
) {
    let world = up(name, &UP[..1]);
    let (effects, task, mut other) = (world.effects.clone(), world.task.clone(), world.create_call());
    other.key.id = TaskId::new("other").unwrap();
    let bundle = other.request.bundle.with_file_name("other-bundle");
    fs::create_dir(&bundle).unwrap();
    fs::copy(other.request.bundle.join("config.json"), bundle.join("config.json")).unwrap();
    world.called_from(&bundle);
    other.request.bundle = bundle;
    let other_key = other.key.clone();
    let left = world.live(move |shim| async move {
        shim.create(other, Delivery::First).await.unwrap();
        let give_up = |key: &TaskKey| {
            let entry = shim.tasks.entry(key).unwrap();
            shim.tasks.note(&entry, |task| {
                task.give_up();
                Ok(Vec::new())
            })
        };
        tokio::spawn(shim.clone().remove_leftovers());
        give_up(&task).unwrap();
        let is_there = |key: &TaskKey| shim.tasks.entry(key).is_ok();
        let meanwhile = async {
            tokio::time::sleep(Duration::from_secs(1200)).await;
            assert!(is_there(&task));
            give_up(&other_key).unwrap();
            tokio::time::sleep(Duration::from_secs(15)).await;
            is_there(&other_key)
        };
        tokio::select! {
            () = block(shim.clone(), effects.clone(), task.clone()) => unreachable!("blocks for ever"),
            is_left = meanwhile => {
                effects.plan(Plan::Undisturbed);
                tokio::time::sleep(Duration::from_secs(300)).await;
                (is_left, is_there(&task))
            }
        }
    });
    assert_eq!(left, Some((false, false)), "(the other one after 15 s, the first one after 300 s)");
}

#[test]
fn a_task_that_can_not_be_removed_does_not_delay_the_removal_of_another() {
    removes_another_meanwhile("left-fails", |_, effects, task| async move {
        let stop: &str = format!("stop {}", name::candidates(&task).next().unwrap()).leak();
        loop {
            effects.plan(Plan::Refuse(stop));
            tokio::time::sleep(Duration::from_millis(500)).await;
        }
    });
    removes_another_meanwhile("left-hangs", |shim, _, task| async move {
        let entry = shim.tasks.entry(&task).unwrap();
        let _verb = entry.init.verb.lock().await;
        std::future::pending().await
    });
}

#[test]
fn a_create_is_recorded_as_given_up_in_time_while_its_disk_does_not_answer() {
    let world = World::new("deleted-no-disk");
    let (node, init) = (world.parts(), world.init());
    let state = world.state_dir();
    let task = world.task.clone();
    let recorded = world.live(move |shim| async move {
        let mut create = Box::pin(Step::Create.take(node(shim.clone()), Delivery::First));
        assert!(until_registered(&shim, &init.task, create.as_mut()).await.is_none());
        let turns = WaitsFor::Disk.all_turns(&init.task).await;
        let begun = tokio::time::Instant::now();
        let delete = async {
            let deleted = shim.delete(&init, Delivery::Replayed, waiting_client()).await;
            let recorded = Store::new(state).load(&task).unwrap().map(|found| found.task.given_up);
            drop(turns);
            (deleted, recorded, begun.elapsed())
        };
        tokio::join!(delete, create).0
    });
    let (deleted, recorded, elapsed) = recorded.unwrap();
    assert!(matches!(deleted, Err(Error::UnknownTask { .. })), "{deleted:?}");
    assert!(elapsed <= config::DELETE_LIMIT, "it took {elapsed:?}");
    // `None` if nothing is left already.
    assert_ne!(recorded, Some(false));
    assert_eq!(world.remains(), Vec::<String>::new());
}

#[test]
fn the_id_of_a_task_that_is_given_up_is_free_for_a_create() {
    let world = up("given-up-again", &UP);
    let (effects, node, task) = (world.effects.clone(), world.parts(), world.task.clone());
    let deleted = world.live(move |shim| async move {
        effects.plan(Plan::Refuse("stop "));
        let deleted = shim.clean_up(&task, &Owner::default()).await;
        Step::Create.take(node(shim), Delivery::First).await.unwrap();
        deleted
    });
    assert!(matches!(deleted, Some(Err(Error::NotRemoved { .. }))), "{deleted:?}");
    world.take(&[Step::Start, Step::Kill, Step::Delete], Delivery::First).unwrap().unwrap();
    assert_eq!(world.events(), ["create", "start", "create", "start", "exit", "delete"]);
}

/// Two callers remove the task, and a new task has its id before the second one gets its turn.
#[test]
fn a_task_is_not_removed_in_place_of_an_earlier_one_with_its_id() {
    let world = up("namesake", &UP[..1]);
    let (init, nodes) = (world.init(), [world.parts(), world.parts(), world.parts()]);
    let removed = world.live(move |shim| async move {
        let [create, start, update] = nodes.map(|node| node(shim.clone()));
        let (old, _) = shim.tasks.process(&init).unwrap();
        let verb = old.init.verb.clone().lock_owned().await;
        let (owner, task) = (Owner::default(), init.task.clone());
        let removing = async {
            tokio::join!(shim.delete(&init, Delivery::First, waiting_client()), shim.clean_up(&task, &owner))
        };
        let meanwhile = async {
            tokio::time::sleep(A_WHILE).await;
            shim.cleanup.roll_back_create(&old).await;
            Step::Create.take(create, Delivery::First).await.unwrap();
            Step::Start.take(start, Delivery::First).await.unwrap();
            drop(verb);
        };
        let (removed, ()) = tokio::join!(removing, meanwhile);
        Step::Update.take(update, Delivery::First).await.unwrap();
        removed
    });
    let (deleted, cleaned_up) = removed.unwrap();
    assert!(matches!(deleted, Err(Error::UnknownTask { .. })), "{deleted:?}");
    assert!(matches!(cleaned_up, Err(Error::UnknownTask { .. })), "{cleaned_up:?}");
    world.take(&[Step::Kill, Step::Delete], Delivery::First).unwrap().unwrap();
    assert_eq!(world.remains(), Vec::<String>::new());
}
