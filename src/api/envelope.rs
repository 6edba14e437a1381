//! Converts the events of tasks to containerd's messages (pure).

use std::path::Path;

use containerd_shim_protos::events::task::{
    TaskCreate, TaskDelete, TaskExecAdded, TaskExecStarted, TaskExit, TaskIO, TaskOOM, TaskPaused,
    TaskResumed, TaskStart,
};
use containerd_shim_protos::shim::event::Envelope;
use containerd_shim_protos::topics;
use protobuf::MessageField;

use crate::services::Outgoing;
use crate::task::lifecycle::Exit;
use crate::task::outbox::TaskEvent;

use super::convert::{self, Error, any, time};

/// An event in the envelope that containerd accepts.
///
/// # Errors
/// The message can't be encoded.
pub fn envelope(outgoing: &Outgoing) -> Result<Envelope, Error> {
    let task = &outgoing.task;
    let id = task.key.id.to_string();
    let (topic, event) = match &outgoing.event {
        TaskEvent::Created { pid } => {
            let stdio = &task.init.stdio;
            let io = TaskIO {
                stdin: stdio.stdin.clone(),
                stdout: stdio.stdout.clone(),
                stderr: stdio.stderr.clone(),
                terminal: stdio.terminal,
                ..TaskIO::default()
            };
            let mut event = TaskCreate {
                container_id: id,
                bundle: task.request.bundle.to_string_lossy().into_owned(),
                io: MessageField::some(io),
                pid: convert::pid(*pid),
                checkpoint: task
                    .request
                    .checkpoint
                    .as_deref()
                    .unwrap_or(Path::new(""))
                    .to_string_lossy()
                    .into_owned(),
                ..TaskCreate::default()
            };
            // The crate does not export the type of these mounts: fill them in without naming it.
            event.rootfs.resize_with(task.request.rootfs.len(), Default::default);
            for (shown, mount) in event.rootfs.iter_mut().zip(&task.request.rootfs) {
                shown.type_.clone_from(&mount.kind);
                shown.source.clone_from(&mount.source);
                shown.target.clone_from(&mount.target);
                shown.options.clone_from(&mount.options);
            }
            (topics::TASK_CREATE_EVENT_TOPIC, any("containerd.events.TaskCreate", &event)?)
        }
        TaskEvent::Started { pid } => {
            let event = TaskStart { container_id: id, pid: *pid, ..TaskStart::default() };
            (topics::TASK_START_EVENT_TOPIC, any("containerd.events.TaskStart", &event)?)
        }
        TaskEvent::Paused => {
            let event = TaskPaused { container_id: id, ..TaskPaused::default() };
            (topics::TASK_PAUSED_EVENT_TOPIC, any("containerd.events.TaskPaused", &event)?)
        }
        TaskEvent::Resumed => {
            let event = TaskResumed { container_id: id, ..TaskResumed::default() };
            (topics::TASK_RESUMED_EVENT_TOPIC, any("containerd.events.TaskResumed", &event)?)
        }
        TaskEvent::OutOfMemory => {
            let event = TaskOOM { container_id: id, ..TaskOOM::default() };
            (topics::TASK_OOM_EVENT_TOPIC, any("containerd.events.TaskOOM", &event)?)
        }
        TaskEvent::Exited { pid, exit } => {
            let event = exited(id.clone(), id, *pid, *exit);
            (topics::TASK_EXIT_EVENT_TOPIC, any("containerd.events.TaskExit", &event)?)
        }
        TaskEvent::ExecAdded { exec } => {
            let exec_id = exec.to_string();
            let event = TaskExecAdded { container_id: id, exec_id, ..TaskExecAdded::default() };
            (topics::TASK_EXEC_ADDED_EVENT_TOPIC, any("containerd.events.TaskExecAdded", &event)?)
        }
        TaskEvent::ExecStarted { exec, pid } => {
            let exec_id = exec.to_string();
            let event =
                TaskExecStarted { container_id: id, exec_id, pid: *pid, ..TaskExecStarted::default() };
            (topics::TASK_EXEC_STARTED_EVENT_TOPIC, any("containerd.events.TaskExecStarted", &event)?)
        }
        TaskEvent::ExecExited { exec, pid, exit } => {
            let event = exited(id, exec.to_string(), *pid, *exit);
            (topics::TASK_EXIT_EVENT_TOPIC, any("containerd.events.TaskExit", &event)?)
        }
        TaskEvent::Deleted { pid, exit } => {
            let event = TaskDelete {
                container_id: id,
                pid: convert::pid(*pid),
                exit_status: exit.status,
                exited_at: MessageField::some(time(exit.at_usec)),
                ..TaskDelete::default()
            };
            (topics::TASK_DELETE_EVENT_TOPIC, any("containerd.events.TaskDelete", &event)?)
        }
    };
    Ok(Envelope {
        timestamp: MessageField::some(time(outgoing.at_usec)),
        namespace: task.key.namespace.to_string(),
        topic: topic.to_owned(),
        event: MessageField::some(event),
        ..Envelope::default()
    })
}

fn exited(container_id: String, id: String, pid: u32, exit: Exit) -> TaskExit {
    TaskExit {
        container_id,
        id,
        pid,
        exit_status: exit.status,
        exited_at: MessageField::some(time(exit.at_usec)),
        ..TaskExit::default()
    }
}
