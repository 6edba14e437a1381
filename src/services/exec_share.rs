//! What the execs of one container can take of what all containers share: systemd's descriptor store, and `/run`.
//!
//! Whoever may exec into a container (`kubectl exec`) determines how many execs it has and what their process specs contain.

use std::fs;
use std::io;

use crate::id::{ExecId, TaskKey};
use crate::launch::contract::PROCESS_SPEC;
use crate::session::fds::StreamFds;
use crate::stdio::threads;
use crate::store::Store;
use crate::task::Task;
use crate::task::exec::ExecPhase;
use crate::task::wiring::Wiring;
use crate::unit::fd_store::STORE_LIMIT;

use super::{Entry, Process};

/// The largest number of execs of a container, with those that have ended and are not deleted. Each takes up to 16 KiB of
/// `/run`: its record twice, its pid file, and the report of `launch`.
const MOST_EXECS: usize = 5_000;

/// The largest size of all process specs of a container's execs that have not run yet, in bytes.
const MOST_SPEC_BYTES: u64 = 32 << 20;

/// The largest number of entries that the streams of a container's execs have in the descriptor store.
const MOST_ENTRIES: usize = STORE_LIMIT as usize / 4;

/// The largest number of pieces of work on a container's streams that wait for their turn. Each keeps a few descriptors open. The
/// execs that are not deleted have fewer pieces: each piece has an entry in the store.
const MOST_WAITING: usize = MOST_ENTRIES;

/// A container has as many execs as one container may have.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// It has too many of them.
    #[error(
        "task {task} has {MOST_EXECS} execs, which is the limit for one container: delete execs that have ended"
    )]
    Execs {
        /// The container.
        task: TaskKey,
    },
    /// The process specs are too large.
    #[error(
        "the process specs of the execs of task {task} that have not run yet would have more than {} MiB, which is the limit for one container: start or delete some of these execs", MOST_SPEC_BYTES >> 20
    )]
    Specs {
        /// The container.
        task: TaskKey,
    },
    /// The streams have too many entries.
    #[error(
        "the streams of the execs of task {task} would have more than {MOST_ENTRIES} entries in systemd's descriptor store, which is the limit for one container: end some of these execs, or delete those that have ended"
    )]
    Streams {
        /// The container.
        task: TaskKey,
    },
    /// The work on the streams is held up.
    #[error(
        "{MOST_WAITING} pieces of work on the streams of task {task} and its execs wait, which is the limit for one container: a process keeps some of these streams busy in the kernel; end that process"
    )]
    Busy {
        /// The container.
        task: TaskKey,
    },
}

/// Checks the execs of a container, among which the new one is already registered.
///
/// # Errors
/// [`Error::Execs`], [`Error::Specs`]
pub(crate) fn check_added(entry: &Entry) -> Result<(), Error> {
    let execs = entry.execs();
    if execs.len() > MOST_EXECS {
        return Err(Error::Execs { task: entry.key.clone() });
    }
    let bytes: u64 = execs.iter().map(|process| process.live().spec_bytes).sum();
    if bytes > MOST_SPEC_BYTES {
        return Err(Error::Specs { task: entry.key.clone() });
    }
    Ok(())
}

/// Checks whether there is room in the descriptor store for the streams of an exec, in addition to those of the other execs of
/// its container, and whether its output has a chance to be delivered. An exec without streams always has room.
///
/// # Errors
/// [`Error::Streams`], [`Error::Busy`]
pub(crate) fn check_streams(
    task: &Task,
    exec: &ExecId,
    wiring: &Wiring,
    fds: &StreamFds,
) -> Result<(), Error> {
    let own = entries_of(wiring);
    if own == 0 {
        return Ok(());
    }
    if threads::waiting(&task.key) > MOST_WAITING {
        return Err(Error::Busy { task: task.key.clone() });
    }
    let others = task.execs.iter().filter(|(id, _)| *id != exec).map(|(_, other)| other);
    let expected = |other: &ExecPhase, wiring| match other {
        ExecPhase::Starting { .. } => entries_of(wiring),
        // Before the start there are no streams, and those of a process that has run are all in the store.
        ExecPhase::Added | ExecPhase::Running { .. } | ExecPhase::Stopped { .. } => 0,
    };
    let starting: usize = others.clone().map(|other| expected(&other.phase, &other.wiring)).sum();
    // Usually the entries of all processes together are fewer than those that one container may have.
    if own + starting + fds.count() <= MOST_ENTRIES {
        return Ok(());
    }
    let stored = |wiring: &Wiring| {
        if entries_of(wiring) == 0 { 0 } else { fds.count_of(wiring.store_number) }
    };
    let of_others: usize =
        others.map(|other| expected(&other.phase, &other.wiring).max(stored(&other.wiring))).sum();
    if own + of_others > MOST_ENTRIES { Err(Error::Streams { task: task.key.clone() }) } else { Ok(()) }
}

/// The most entries that the streams of a process have in the descriptor store: one for each stream, one for each journal's
/// copy, and for a terminal its socket, the connection and the master side.
fn entries_of(wiring: &Wiring) -> usize {
    use crate::task::wiring::{Input, JournalCopy};
    let copies = wiring.copies();
    let asides = copies.iter().filter(|(_, _, to)| to.journal == JournalCopy::Aside).count();
    let input = usize::from(matches!(wiring.stdin, Input::Fifo(_)));
    let terminal = if wiring.terminal { 3 } else { 0 };
    input + copies.len() + asides + terminal
}

/// After a restart: notes the size of the process spec of an exec.
pub(crate) fn note_spec(store: &Store, process: &Process) {
    let spec = fs::metadata(store.process_dir(&process.key).join(PROCESS_SPEC));
    process.live().spec_bytes = spec.map_or(0, |file| file.len());
}

/// Removes the process spec of an exec whose record says that it runs or has run: nobody starts it again.
pub(crate) fn remove_spec(store: &Store, entry: &Entry, process: &Process) {
    if process.exec().is_none() || process.live().spec_bytes == 0 {
        return;
    }
    if !entry.task().process(process.exec()).is_some_and(|exec| exec.has_run()) {
        return;
    }
    match fs::remove_file(store.process_dir(&process.key).join(PROCESS_SPEC)) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => {
            tracing::warn!(process = %process.key, %error, "{}: can't remove its process spec, which stays until its delete: {error}", process.key);
        }
        Ok(()) | Err(_) => process.live().spec_bytes = 0,
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use super::*;
    use crate::api::status;
    use crate::id::UnitName;
    use crate::ops::AddExec;
    use crate::services::{self, Delivery};
    use crate::simulation::harness::{Step, World};
    use crate::stdio::fifo;
    use crate::task::exec::Exec;
    use crate::task::request::Stdio;
    use crate::task::wiring::{Copied, Input, Output};

    const WITH_ADDED: [Step; 3] = [Step::Create, Step::Start, Step::AddExec];

    fn id(number: usize) -> ExecId {
        ExecId::new(format!("other-{number}")).unwrap()
    }

    /// The error of a call that the limit refuses: it names the container, and the caller may try again.
    fn refusal(refused: Result<(), services::Error>) -> String {
        let error = refused.unwrap_err();
        assert_eq!(status::code(&error), ttrpc::Code::RESOURCE_EXHAUSTED, "{error}");
        let text = error.to_string();
        assert!(text.contains("/web") && text.contains("limit for one container: "), "{text}");
        text
    }

    #[test]
    fn a_container_can_have_thousands_of_execs_but_no_more() {
        let world = World::new("many-execs");
        world.take(&[Step::Create, Step::Start], Delivery::First).unwrap().unwrap();
        let (init, call, again) = (world.init(), world.exec_call(), world.exec_call());
        let exec = world.exec();
        let (refused, is_gone, added) = world
            .live(move |shim| async move {
                let (entry, _) = shim.tasks.process(&init).unwrap();
                for number in 0..MOST_EXECS {
                    let unit = UnitName::new(format!("other-{number}.service")).unwrap();
                    shim.tasks.registry.insert_exec(&entry, &id(number), unit, None).ok().unwrap();
                }
                let refused = shim.add_exec(call, Delivery::First).await;
                let is_gone = shim.tasks.process(&exec).is_err();
                shim.tasks.registry.remove_exec(&entry, &id(7));
                (refused, is_gone, shim.add_exec(again, Delivery::First).await)
            })
            .unwrap();
        assert!(refusal(refused).contains("5000 execs"));
        assert!(is_gone, "a refused exec does not exist");
        added.unwrap();
    }

    #[test]
    fn the_specs_of_execs_that_have_not_run_are_bounded_and_those_of_others_removed() {
        let world = World::new("many-specs");
        let more = |number: usize| AddExec { exec: id(number), ..world.exec_call() };
        let (first, second, third) = (more(1), more(2), more(3));
        world.take(&WITH_ADDED, Delivery::First).unwrap().unwrap();
        let (exec, init) = (world.exec(), world.init());
        let spec = Store::new(world.state_dir()).process_dir(&exec).join(PROCESS_SPEC);
        let file = spec.clone();
        // In a second daemon: it finds the spec of the first.
        let (refused, refused_again, added) = world
            .live(move |shim| async move {
                let (entry, process) = shim.tasks.process(&exec).unwrap();
                assert_eq!(process.live().spec_bytes, fs::metadata(&file).unwrap().len());
                // As large as all specs together may be.
                process.live().spec_bytes = MOST_SPEC_BYTES;
                let refused = shim.add_exec(first, Delivery::First).await;
                let refused_again = shim.add_exec(second, Delivery::First).await;
                assert_eq!(entry.execs().len(), 1);
                shim.start(&exec, Delivery::First).await.unwrap();
                (refused, refused_again, shim.add_exec(third, Delivery::First).await)
            })
            .unwrap();
        refusal(refused);
        assert!(refusal(refused_again).contains("32 MiB"));
        added.unwrap();
        assert!(!spec.exists(), "a process that runs needs no spec");
        // An earlier version has left it.
        fs::write(&spec, "{}").unwrap();
        world.live(|_| async {}).unwrap();
        assert!(!spec.exists(), "a process that runs needs no spec");
        assert!(Store::new(world.state_dir()).exec_dir(&init.task, &id(3)).join(PROCESS_SPEC).exists());
    }

    #[test]
    fn the_streams_of_the_execs_of_a_container_take_a_part_of_the_descriptor_store() {
        let world = World::new("many-streams");
        world.take(&WITH_ADDED, Delivery::First).unwrap().unwrap();
        let clients = tempfile::tempdir().unwrap();
        let path = clients.path().join("stdout");
        fifo::make(&path).unwrap();
        let (init, plain) = (world.init(), AddExec { exec: id(9_000), ..world.exec_call() });
        let stdio = Stdio { stdout: path.display().to_string(), terminal: true, ..Stdio::default() };
        let terminal = AddExec { exec: id(9_001), stdio, ..world.exec_call() };
        let exec = world.exec();
        let (refused, not_started, added) = world
            .live(move |shim| async move {
                let (entry, _) = shim.tasks.process(&init).unwrap();
                let wiring = Wiring {
                    terminal: true,
                    stdin: Input::Fifo("/x".into()),
                    stdout: Output::Copied(Copied::default()),
                    ..Wiring::default()
                };
                assert_eq!(entries_of(&wiring), 5);
                {
                    let mut task = entry.task();
                    let added = Exec::clone(&task.execs[exec.exec.as_ref().unwrap()]);
                    let starting = Exec {
                        wiring: wiring.clone(),
                        phase: ExecPhase::Starting { exit: None },
                        ..added.clone()
                    };
                    for number in 0..MOST_ENTRIES / 5 {
                        task.execs.insert(id(number), Arc::new(starting.clone()));
                    }
                    // It was added before the others.
                    task.execs.insert(exec.exec.clone().unwrap(), Arc::new(Exec { wiring, ..added }));
                }
                let refused = shim.add_exec(terminal, Delivery::First).await;
                let not_started = shim.start(&exec, Delivery::First).await.map(drop);
                (refused, not_started, shim.add_exec(plain, Delivery::First).await)
            })
            .unwrap();
        assert!(refusal(refused).contains("3000 entries"));
        assert!(refusal(not_started).contains("3000 entries"));
        added.unwrap();
    }
}
