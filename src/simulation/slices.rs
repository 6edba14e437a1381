//! Tests when the daemon stops the slices of namespaces and pods.

use std::sync::Arc;
use std::time::Duration;

use tokio::sync::Notify;

use crate::cgroup;
use crate::effects::{Failure, Plan};
use crate::id::UnitName;
use crate::supervise::slices;

use super::harness::World;

/// Longer than an empty slice stays.
const A_WHILE: Duration = Duration::from_secs(2);

fn slice(name: &str) -> UnitName {
    UnitName::new(format!("containerd-{name}.slice")).unwrap()
}

/// Runs the background task from its start until `then` is over. `used` is the slice of a task.
fn run(world: &World, used: Option<UnitName>, then: impl Future<Output = ()> + Send + 'static) {
    let systemd = world.systemd.clone();
    let deleted = Arc::new(Notify::new());
    let again = deleted.clone();
    let is_used = move |slice: &UnitName| used.as_ref() == Some(slice);
    let done = world.live(move |_| async move {
        tokio::spawn(slices::run(systemd, deleted, is_used));
        tokio::time::sleep(A_WHILE).await;
        then.await;
        again.notify_one();
        tokio::time::sleep(A_WHILE).await;
    });
    done.unwrap();
}

#[test]
fn empty_slices_are_stopped_and_inner_ones_first() {
    let world = World::new("slices-empty");
    let (outer, inner) = (slice("empty"), slice("empty-pod1"));
    world.systemd.add_slice(outer.clone());
    world.systemd.add_slice(inner.clone());
    run(&world, None, async {});
    assert_eq!(world.systemd.stopped_slices(), [inner, outer].map(|slice| slice.to_string()));
}

#[test]
fn a_slice_stays_while_a_task_or_a_cgroup_needs_it() {
    let world = World::new("slices-used");
    let (used, full) = (slice("used"), slice("full"));
    world.systemd.add_slice(used.clone());
    world.systemd.add_slice(full.clone());
    let unit = full.slice_cgroup().join("web.service");
    cgroup::fake::make(&unit);
    let (systemd, dir) = (world.systemd.clone(), full.slice_cgroup());
    run(&world, Some(used), async move {
        assert_eq!(systemd.stopped_slices(), [""; 0]);
        cgroup::fake::remove(&unit);
    });
    assert_eq!(world.systemd.stopped_slices(), [full.to_string()]);
    cgroup::fake::remove(&dir);
}

#[test]
fn a_slice_that_systemd_does_not_stop_is_tried_again_after_the_next_delete() {
    for effect in 0..2 {
        let world = World::new("slices-refused");
        world.systemd.add_slice(slice("refused"));
        let (effects, systemd) = (world.effects.clone(), world.systemd.clone());
        world.effects.plan(Plan::Fail(1 + effect, Failure::Timeout));
        run(&world, None, async move {
            let log = effects.log();
            assert!(log.iter().any(|effect| effect == "list slices"), "{log:?}");
            assert_eq!(systemd.stopped_slices(), [""; 0], "{log:?}");
        });
        assert_eq!(world.systemd.stopped_slices(), [slice("refused").to_string()]);
    }
}
