use super::exec::ExecPhase;
use super::lifecycle::{Container, ObservedExit};
use super::*;

const INIT: u32 = 7;
const EXEC: u32 = 8;

fn exit(status: u32) -> Exit {
    Exit { status, at_usec: 5 }
}

fn exited(pid: u32, status: u32) -> Event {
    Event::Exited(ObservedExit { pid: Some(pid), exit: exit(status) })
}

fn exec_id() -> ExecId {
    ExecId::new("probe").unwrap()
}

/// A task that runs, with one exec in this phase.
fn running(exec: ExecPhase) -> Task {
    let mut task: Task = serde_json::from_slice(include_bytes!("../../fuzz/corpus/record/task")).unwrap();
    let container = Container { pid: INIT, cgroup: "/web".into(), limits: None, oom_kills: 2 };
    task.init.phase = Phase::Running { container };
    let exec = Exec {
        unit: UnitName::new("containerd-default-web:probe.service").unwrap(),
        logger: None,
        stdio: Default::default(),
        wiring: Default::default(),
        description: String::new(),
        phase: exec,
    };
    task.execs.insert(exec_id(), Arc::new(exec));
    task
}

/// The events in the outbox, which is empty afterwards.
fn owed(task: &mut Task) -> Vec<TaskEvent> {
    let next = || {
        let owed = task.outbox.first()?.clone();
        task.outbox.accepted(owed.seq);
        Some(owed.event)
    };
    std::iter::from_fn(next).collect()
}

#[test]
fn the_exit_of_init_is_published_after_that_of_an_exec_that_ends_later() {
    let mut task = running(ExecPhase::Running { pid: EXEC });
    assert_eq!(task.apply(None, exited(INIT, 3), 1), Ok(Vec::new()));
    assert_eq!((task.init.exit(), owed(&mut task)), (None, Vec::new()));
    let notices = task.apply(Some(&exec_id()), exited(EXEC, 4), 1).unwrap();
    let of = |exec: Option<ExecId>, status| ExitNotice { exec, exit: exit(status) };
    assert_eq!(notices, [of(Some(exec_id()), 4), of(None, 3)]);
    let expected = [
        TaskEvent::ExecExited { exec: exec_id(), pid: EXEC, exit: exit(4) },
        TaskEvent::Exited { pid: INIT, exit: exit(3) },
    ];
    assert_eq!(owed(&mut task), expected);
}

#[test]
fn the_exit_of_init_waits_for_a_start_of_an_exec_and_for_no_exec_that_does_not_run() {
    let stopped = ExecPhase::Stopped { pid: EXEC, exit: exit(4) };
    for (phase, is_published) in
        [(ExecPhase::Added, true), (ExecPhase::Starting { exit: None }, false), (stopped, true)]
    {
        let mut task = running(phase.clone());
        let notices = task.apply(None, exited(INIT, 3), 1).unwrap();
        assert_eq!(
            (notices.len(), task.init.exit().is_some()),
            (is_published.into(), is_published),
            "{phase:?}"
        );
    }
}

#[test]
fn an_event_of_an_exec_that_was_deleted_changes_nothing() {
    let mut task = running(ExecPhase::Added);
    task.execs.clear();
    let before = task.clone();
    assert_eq!(task.apply(Some(&exec_id()), exited(EXEC, 4), 1), Ok(Vec::new()));
    assert_eq!(task, before);
}

#[test]
fn a_refused_event_changes_nothing() {
    let mut task = running(ExecPhase::Running { pid: EXEC });
    let before = task.clone();
    assert!(task.apply(Some(&exec_id()), Event::StartBegun, 1).is_err());
    assert_eq!(task, before);
}

#[test]
fn each_kill_for_lack_of_memory_is_announced_once_and_not_too_many_at_a_time() {
    let mut task = running(ExecPhase::Added);
    let mut announced = |kills| {
        task.note_oom_kills(kills, 1);
        owed(&mut task).len()
    };
    // Two were announced before.
    assert_eq!([2, 5, 5, 4, 6].map(&mut announced), [0, 3, 0, 0, 1]);
    assert_eq!([1_000_000, 1_000_001].map(&mut announced), [100, 1]);
}

#[test]
fn a_task_that_containerd_has_given_up_owes_nothing() {
    let mut task = running(ExecPhase::Running { pid: EXEC });
    task.given_up = true;
    task.note_oom_kills(9, 1);
    task.apply(Some(&exec_id()), exited(EXEC, 4), 1).unwrap();
    assert_eq!(owed(&mut task), []);
}
