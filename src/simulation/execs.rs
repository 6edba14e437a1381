//! Tests of execs whose units systemd is slow to stop.

use std::sync::Arc;
use std::time::Duration;

use crate::ops::Shim;
use crate::services::Delivery;

use super::harness::{Node, Step, waiting_client};
use super::scenarios::{WITH_EXEC, up};

/// Long enough for everything that waits for nothing. The clock is paused.
const A_WHILE: Duration = Duration::from_secs(1);

const EXEC_DELETED: [Step; 2] = [Step::EndExec, Step::DeleteExec];

/// Takes steps in a daemon.
async fn take<N: FnOnce(Arc<Shim>) -> Node>(shim: Arc<Shim>, steps: Vec<(Step, N)>) {
    for (step, node) in steps {
        step.take(node(shim.clone()), Delivery::First).await.unwrap();
    }
}

#[test]
fn the_delete_of_an_exec_does_not_wait_until_systemd_has_stopped_its_unit_and_the_next_exec_does() {
    let world = up("slow-stop", &WITH_EXEC);
    let (exec, unit, slow) = (world.exec(), world.exec_unit(), world.systemd.slow_stops());
    let (delete, add, start) =
        (world.nodes(&EXEC_DELETED), world.nodes(&[Step::AddExec]), world.nodes(&[Step::StartExec]));
    let lived = world.live(move |shim| async move {
        take(shim.clone(), delete).await;
        let adding = tokio::spawn(take(shim.clone(), add));
        tokio::time::sleep(A_WHILE).await;
        assert!(!adding.is_finished(), "systemd still stops the unit of the first exec");
        slow.notify_one();
        adding.await.unwrap();
        assert_eq!(shim.tasks.process(&exec).unwrap().1.unit, unit);
        take(shim, start).await;
    });
    lived.unwrap();
}

#[test]
fn an_exec_gets_another_unit_if_systemd_does_not_stop_that_of_a_deleted_one() {
    let world = up("stuck-stop", &WITH_EXEC);
    let (exec, unit, slow) = (world.exec(), world.exec_unit(), world.systemd.slow_stops());
    let (again, delete) = (world.nodes(&[Step::EndExec, Step::DeleteExec, Step::AddExec]), world.exec());
    let add = world.nodes(&[Step::AddExec]);
    let lived = world.live(move |shim| async move {
        take(shim.clone(), again).await;
        assert_ne!(shim.tasks.process(&exec).unwrap().1.unit, unit);
        let is_found = shim.tasks.registry.by_unit(&unit).is_some();
        assert!(!is_found, "what systemd reports of the first unit is not about the second exec");
        slow.notify_one();
        tokio::time::sleep(A_WHILE).await;
        shim.delete(&delete, Delivery::First, waiting_client()).await.unwrap();
        take(shim.clone(), add).await;
        assert_eq!(shim.tasks.process(&exec).unwrap().1.unit, unit);
    });
    lived.unwrap();
}

#[test]
fn the_delete_of_a_task_waits_until_systemd_has_stopped_the_units_of_deleted_execs() {
    let world = up("slow-stop-of-task", &WITH_EXEC);
    let slow = world.systemd.slow_stops();
    let (end, delete) =
        (world.nodes(&[Step::EndExec, Step::DeleteExec, Step::Kill]), world.nodes(&[Step::Delete]));
    let lived = world.live(move |shim| async move {
        take(shim.clone(), end).await;
        let deleting = tokio::spawn(take(shim, delete));
        tokio::time::sleep(A_WHILE).await;
        assert!(!deleting.is_finished());
        slow.notify_one();
        deleting.await.unwrap();
    });
    lived.unwrap();
    assert_eq!(world.remains(), Vec::<String>::new());
}
