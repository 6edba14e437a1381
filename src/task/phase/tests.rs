use super::*;

const EXIT: Exit = Exit { status: 7, at_usec: 5 };
const LATER: Exit = Exit { status: 0, at_usec: 9 };
const PID: u32 = 42;
const PROGRAM: Option<Program> = Some((1, 2));
const SEEN: ObservedExit = ObservedExit { pid: Some(PID), exit: EXIT };
const SEEN_LATER: ObservedExit = ObservedExit { pid: None, exit: LATER };

fn container() -> Container {
    Container { pid: PID, cgroup: "/web".into(), limits: None, oom_kills: 2 }
}

fn created() -> Event {
    Event::Created { container: container(), program: PROGRAM }
}

/// Each phase, with and without an exit that was noticed early or came before the start.
pub(in crate::task) fn phases() -> [Phase; 14] {
    let (container, program) = (container(), PROGRAM);
    [
        Phase::Creating { exit: None },
        Phase::Creating { exit: Some(SEEN) },
        Phase::Prepared,
        Phase::Restoring { exit: None },
        Phase::Restoring { exit: Some(SEEN) },
        Phase::Created { container: container.clone(), program },
        Phase::Starting { container: container.clone(), program, exit: None },
        Phase::Starting { container: container.clone(), program, exit: Some(EXIT) },
        Phase::Running { container: container.clone() },
        Phase::Paused { container: container.clone() },
        Phase::Ending { container: container.clone(), exit: EXIT, never_started: false },
        Phase::Ending { container: container.clone(), exit: EXIT, never_started: true },
        Phase::Stopped { container: container.clone(), exit: EXIT, never_started: false },
        Phase::Stopped { container, exit: EXIT, never_started: true },
    ]
}

/// A phase in one word; one that has an early exit, or one before the start, is in lower case.
fn short(phase: &Phase) -> &'static str {
    match phase {
        Phase::Creating { exit: None } => "Creating",
        Phase::Creating { exit: Some(_) } => "creating",
        Phase::Prepared => "Prepared",
        Phase::Restoring { exit: None } => "Restoring",
        Phase::Restoring { exit: Some(_) } => "restoring",
        Phase::Created { .. } => "Created",
        Phase::Starting { exit: None, .. } => "Starting",
        Phase::Starting { exit: Some(_), .. } => "starting",
        Phase::Running { .. } => "Running",
        Phase::Paused { .. } => "Paused",
        Phase::Ending { never_started: false, .. } => "Ending",
        Phase::Ending { never_started: true, .. } => "ending",
        Phase::Stopped { never_started: false, .. } => "Stopped",
        Phase::Stopped { never_started: true, .. } => "stopped",
    }
}

/// The phase after an event and the letters of what is announced; `-` for a refusal.
fn outcome(phase: &Phase, event: Event) -> String {
    let Ok(step) = transition(phase, event) else {
        return "-".to_owned();
    };
    let letters = step.announce.iter().map(|announce| match announce {
        TaskEvent::Created { .. } => 'C',
        TaskEvent::Started { .. } => 'S',
        TaskEvent::Paused => 'P',
        TaskEvent::Resumed => 'R',
        TaskEvent::Exited { .. } => 'E',
        other => unreachable!("{other:?}"),
    });
    let letters: String = letters.collect();
    if letters.is_empty() { short(&step.next).to_owned() } else { format!("{}+{letters}", short(&step.next)) }
}

#[test]
fn every_event_in_every_phase_does_what_the_table_says() {
    let events = [
        Event::Prepared,
        created(),
        Event::StartBegun,
        Event::InitStarted,
        Event::StartFailed,
        Event::Frozen,
        Event::Thawed,
        Event::Exited(SEEN_LATER),
        Event::ExecsGone,
    ];
    #[rustfmt::skip]
    let table = [
        // phase, Prepared, Created, StartBegun, Started, StartFailed, Frozen, Thawed, Exited, ExecsGone
        ("Creating", ["Prepared+C", "Created+C", "-", "-", "-", "Creating", "Creating", "creating", "Creating"]),
        ("creating", ["Prepared+C", "ending+C", "-", "-", "-", "creating", "creating", "creating", "creating"]),
        ("Prepared", ["-", "-", "Restoring", "-", "-", "Prepared", "Prepared", "Prepared", "Prepared"]),
        ("Restoring", ["-", "Running+S", "-", "-", "Prepared", "Restoring", "Restoring", "restoring", "Restoring"]),
        ("restoring", ["-", "Ending+S", "-", "-", "Prepared", "restoring", "restoring", "restoring", "restoring"]),
        ("Created", ["-", "-", "Starting", "-", "-", "Created", "Created", "ending", "Created"]),
        ("Starting", ["-", "-", "-", "Running+S", "Created", "Starting", "Starting", "starting", "Starting"]),
        ("starting", ["-", "-", "-", "Ending+S", "ending", "starting", "starting", "starting", "starting"]),
        ("Running", ["-", "-", "-", "-", "-", "Paused+P", "Running", "Ending", "Running"]),
        ("Paused", ["-", "-", "-", "-", "-", "Paused", "Running+R", "Ending", "Paused"]),
        ("Ending", ["-", "-", "-", "-", "-", "Ending", "Ending", "Ending", "Stopped+E"]),
        ("ending", ["-", "-", "-", "-", "-", "ending", "ending", "ending", "stopped+E"]),
        ("Stopped", ["-", "-", "-", "-", "-", "Stopped", "Stopped", "Stopped", "Stopped"]),
        ("stopped", ["-", "-", "-", "-", "-", "stopped", "stopped", "stopped", "stopped"]),
    ];
    assert_eq!(phases().len(), table.len());
    for (phase, (name, row)) in phases().iter().zip(table) {
        assert_eq!(short(phase), name);
        let outcomes = events.clone().map(|event| outcome(phase, event));
        assert_eq!(outcomes, row, "{phase:?}");
    }
}

#[test]
fn only_the_first_exit_counts_and_the_container_stays_the_same() {
    for phase in phases() {
        for event in [Event::Exited(SEEN_LATER), Event::StartFailed, Event::InitStarted, Event::ExecsGone] {
            let Ok(step) = transition(&phase, event) else { continue };
            if phase.container().is_some() {
                assert_eq!(step.next.container(), phase.container());
            }
            if let Phase::Ending { exit, .. } | Phase::Stopped { exit, .. } = &phase {
                assert!(
                    matches!(&step.next, Phase::Ending { exit: same, .. } | Phase::Stopped { exit: same, .. } if same == exit)
                );
            }
        }
    }
}

fn stopped(never_started: bool) -> Phase {
    Phase::Stopped { container: container(), exit: EXIT, never_started }
}

#[test]
fn what_only_an_exec_does_is_refused_in_every_phase() {
    for phase in phases() {
        assert_eq!(outcome(&phase, Event::ExecStarted { pid: PID }), "-", "{phase:?}");
    }
}

fn run(events: &[Event]) -> (Phase, Vec<TaskEvent>) {
    let mut phase = Phase::Creating { exit: None };
    let mut announce = Vec::new();
    for event in events {
        let step = transition(&phase, event.clone()).unwrap();
        phase = step.next;
        announce.extend(step.announce);
    }
    (phase, announce)
}

#[test]
fn an_exit_is_announced_once_and_the_first_one_wins() {
    let (phase, announce) = run(&[
        created(),
        Event::StartBegun,
        Event::InitStarted,
        Event::Exited(SEEN),
        Event::Exited(SEEN_LATER),
        Event::ExecsGone,
        Event::ExecsGone,
    ]);
    assert_eq!(phase.exit(), Some(EXIT));
    let exits = announce.iter().filter(|e| matches!(e, TaskEvent::Exited { .. })).count();
    assert_eq!(exits, 1);
}

#[test]
fn an_exit_inside_start_is_announced_after_the_start() {
    let (phase, announce) =
        run(&[created(), Event::StartBegun, Event::Exited(SEEN), Event::InitStarted, Event::ExecsGone]);
    assert_eq!(phase, stopped(false));
    assert_eq!(
        announce,
        [
            TaskEvent::Created { pid: Some(PID) },
            TaskEvent::Started { pid: PID },
            TaskEvent::Exited { pid: PID, exit: EXIT }
        ]
    );
}

#[test]
fn an_exit_inside_create_is_announced_after_the_create() {
    let (phase, announce) = run(&[Event::Exited(SEEN), created(), Event::ExecsGone]);
    assert_eq!(phase, stopped(true));
    assert_eq!(announce[0], TaskEvent::Created { pid: Some(PID) });
}

#[test]
fn the_exit_of_another_process_is_ignored() {
    let other = || Event::Exited(ObservedExit { pid: Some(PID + 1), exit: EXIT });
    let (phase, _) =
        run(&[other(), created(), other(), Event::StartBegun, other(), Event::InitStarted, other()]);
    assert_eq!(phase, Phase::Running { container: container() });
}

#[test]
fn a_freeze_is_announced_once_and_only_of_a_running_task() {
    let (phase, announce) = run(&[
        Event::Frozen,
        created(),
        Event::Frozen,
        Event::Thawed,
        Event::StartBegun,
        Event::InitStarted,
        Event::Frozen,
        Event::Frozen,
        Event::Thawed,
        Event::Thawed,
        Event::Frozen,
        Event::Exited(SEEN),
        Event::Thawed,
        Event::ExecsGone,
    ]);
    assert_eq!(phase, stopped(false));
    let told = announce.iter().filter(|told| matches!(told, TaskEvent::Paused | TaskEvent::Resumed));
    assert_eq!(told.collect::<Vec<_>>(), [&TaskEvent::Paused, &TaskEvent::Resumed, &TaskEvent::Paused]);
}

#[test]
fn a_failed_start_leaves_a_created_process() {
    let (phase, _) = run(&[created(), Event::StartBegun, Event::StartFailed]);
    assert_eq!(phase, Phase::Created { container: container(), program: PROGRAM });
}

#[test]
fn a_process_that_ended_before_its_start_has_not_run() {
    let before = [
        vec![Event::Exited(SEEN), created()],
        vec![created(), Event::Exited(SEEN)],
        vec![created(), Event::StartBegun, Event::Exited(SEEN), Event::StartFailed],
        vec![created(), Event::StartBegun, Event::StartFailed, Event::Exited(SEEN)],
    ];
    for mut events in before {
        assert!(!run(&events).0.has_run(), "{events:?}");
        events.push(Event::ExecsGone);
        assert_eq!(run(&events).0, stopped(true), "{events:?}");
        assert!(!stopped(true).has_run());
    }
    let (ended, _) = run(&[created(), Event::StartBegun, Event::InitStarted, Event::Exited(SEEN)]);
    assert!(ended.has_run());
}

#[test]
fn a_second_start_is_refused_in_containerds_words() {
    let refused = |phase: Phase| transition(&phase, Event::StartBegun).unwrap_err().to_string();
    assert_eq!(refused(Phase::Running { container: container() }), "cannot start a running process");
    assert_eq!(refused(Phase::Paused { container: container() }), "cannot start a paused process");
}
