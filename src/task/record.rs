//! The form in which a record holds a task. Records on disk have this form, so it does not change with
//! [`Task`].

use std::collections::{BTreeMap, BTreeSet};
use std::path::PathBuf;
use std::sync::Arc;

use serde::{Deserialize, Serialize};

use crate::id::{ExecId, TaskKey, UnitName};

use super::exec::Exec;
use super::lifecycle::{Container, Exit, Lifecycle, ObservedExit, Program};
use super::limits::{Attribute, Limits, UnitLimits};
use super::outbox::Outbox;
use super::phase::Phase;
use super::process::Process;
use super::request::{Containerd, Create, DeviceAllow, Mount, Property, Runtime, Sandbox, Stdio};
use super::wiring::Wiring;
use super::{Placement, Task, TaskMetadata};

/// A task in its record.
#[derive(Serialize, Deserialize)]
pub(super) struct Record {
    key: TaskKey,
    unit: UnitName,
    logger: Option<UnitName>,
    request: Request,
    wiring: Wiring,
    runtime: Runtime,
    containerd: Containerd,
    placement: Placement,
    cgroup: Option<PathBuf>,
    rootfs_on_host: bool,
    #[serde(default)]
    waiting_program: Option<Program>,
    #[serde(rename = "face")]
    metadata: TaskMetadata,
    #[serde(default)]
    properties: Vec<Property>,
    #[serde(default)]
    devices: Option<Vec<DeviceAllow>>,
    #[serde(default)]
    notify: bool,
    init: Name,
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    execs: BTreeMap<ExecId, Arc<Exec>>,
    outbox: Outbox,
    #[serde(default)]
    oom_kills: u64,
    #[serde(default)]
    limits: Option<Limits>,
    #[serde(default, skip_serializing_if = "BTreeSet::is_empty")]
    given_limits: BTreeSet<Attribute>,
    // The name in the records of all versions.
    #[serde(default, rename = "muted")]
    given_up: bool,
    #[serde(default)]
    is_leftover: bool,
}

#[derive(Serialize, Deserialize)]
struct Request {
    bundle: PathBuf,
    rootfs: Vec<Mount>,
    stdio: Stdio,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    sandbox: Option<Sandbox>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    checkpoint: Option<PathBuf>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    has_lease: Option<bool>,
}

/// The name of a phase, with the data for which the record has no separate field.
#[derive(Serialize, Deserialize)]
#[serde(tag = "name", rename_all = "snake_case")]
enum Name {
    Creating {
        exit: Option<ObservedExit>,
    },
    Prepared {},
    Restoring {
        exit: Option<ObservedExit>,
    },
    Created {
        pid: u32,
    },
    Starting {
        pid: u32,
        exit: Option<Exit>,
    },
    Running {
        pid: u32,
    },
    Paused {
        pid: u32,
    },
    Ending {
        pid: u32,
        exit: Exit,
        #[serde(default, skip_serializing_if = "is_false")]
        never_started: bool,
    },
    Stopped {
        pid: u32,
        exit: Exit,
        #[serde(default, skip_serializing_if = "is_false")]
        never_started: bool,
    },
}

fn is_false(flag: &bool) -> bool {
    !flag
}

impl Name {
    fn of(phase: &Phase) -> Self {
        let pid = phase.pid().unwrap_or_default();
        match *phase {
            Phase::Creating { exit } => Self::Creating { exit },
            Phase::Prepared => Self::Prepared {},
            Phase::Restoring { exit } => Self::Restoring { exit },
            Phase::Created { .. } => Self::Created { pid },
            Phase::Starting { exit, .. } => Self::Starting { pid, exit },
            Phase::Running { .. } => Self::Running { pid },
            Phase::Paused { .. } => Self::Paused { pid },
            Phase::Ending { exit, never_started, .. } => Self::Ending { pid, exit, never_started },
            Phase::Stopped { exit, never_started, .. } => Self::Stopped { pid, exit, never_started },
        }
    }

    fn phase(self, container: impl FnOnce(u32) -> Container, program: Option<Program>) -> Phase {
        match self {
            Self::Creating { exit } => Phase::Creating { exit },
            Self::Prepared {} => Phase::Prepared,
            Self::Restoring { exit } => Phase::Restoring { exit },
            Self::Created { pid } => Phase::Created { container: container(pid), program },
            Self::Starting { pid, exit } => Phase::Starting { container: container(pid), program, exit },
            Self::Running { pid } => Phase::Running { container: container(pid) },
            Self::Paused { pid } => Phase::Paused { container: container(pid) },
            Self::Ending { pid, exit, never_started } => {
                Phase::Ending { container: container(pid), exit, never_started }
            }
            Self::Stopped { pid, exit, never_started } => {
                Phase::Stopped { container: container(pid), exit, never_started }
            }
        }
    }
}

impl From<Task> for Record {
    fn from(task: Task) -> Self {
        let Process { unit, logger, stdio, wiring, description, phase } = task.init;
        let metadata = TaskMetadata { description, fields: task.fields };
        let container = phase.container();
        let limits = container.and_then(|container| container.limits.as_ref());
        let Create { bundle, rootfs, sandbox, checkpoint, has_lease } = task.request;
        Self {
            key: task.key,
            unit,
            logger,
            request: Request { bundle, rootfs, stdio, sandbox, checkpoint, has_lease },
            wiring,
            runtime: task.runtime,
            containerd: task.containerd,
            placement: task.placement,
            cgroup: container.map(|container| container.cgroup.clone()),
            rootfs_on_host: task.rootfs_on_host,
            waiting_program: phase.program(),
            metadata,
            properties: task.properties,
            devices: task.devices,
            notify: task.notify,
            init: Name::of(&phase),
            execs: task.execs,
            outbox: task.outbox,
            oom_kills: container.map_or(0, |container| container.oom_kills),
            limits: limits.map(|limits| limits.seen.clone()),
            given_limits: limits.map(|limits| limits.given.clone()).unwrap_or_default(),
            given_up: task.given_up,
            is_leftover: task.is_leftover,
        }
    }
}

impl From<Record> for Task {
    fn from(record: Record) -> Self {
        let Request { bundle, rootfs, stdio, sandbox, checkpoint, has_lease } = record.request;
        let (oom_kills, given) = (record.oom_kills, record.given_limits);
        let limits = record.limits.map(|seen| UnitLimits { seen, given });
        // Earlier versions recorded no cgroup for a process that had ended before they read its cgroup.
        let cgroup = record.cgroup.unwrap_or_else(|| record.placement.cgroup(&record.unit));
        let container = |pid| Container { pid, cgroup, limits, oom_kills };
        let phase = record.init.phase(container, record.waiting_program);
        Self {
            key: record.key,
            init: Process {
                unit: record.unit,
                logger: record.logger,
                stdio,
                wiring: record.wiring,
                description: record.metadata.description,
                phase,
            },
            request: Create { bundle, rootfs, sandbox, checkpoint, has_lease },
            runtime: record.runtime,
            containerd: record.containerd,
            placement: record.placement,
            rootfs_on_host: record.rootfs_on_host,
            fields: record.metadata.fields,
            properties: record.properties,
            devices: record.devices,
            notify: record.notify,
            execs: record.execs,
            outbox: record.outbox,
            given_up: record.given_up,
            is_leftover: record.is_leftover,
        }
    }
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use super::*;

    /// As version 2 of the record has it, of a version that knew fewer fields.
    const OLD: &str = r#"{
        "key": {"namespace": "default", "id": "web"},
        "unit": "containerd-default-web.service",
        "logger": null,
        "request": {"bundle": "/b", "rootfs": [], "stdio": {"stdin": "", "stdout": "/o", "stderr": "", "terminal": false}},
        "wiring": {"terminal": false, "stdin": "null", "stdout": {"fifo": "/o"}, "stderr": "null", "logger": null},
        "runtime": {"binary": "/bin/runc", "root": "/run/runc/default", "no_pivot": false, "no_new_keyring": false,
            "io_owner": [0, 0], "path": "", "log": "auto"},
        "containerd": {"ttrpc_address": "", "grpc_address": "", "path": "", "rlimits": []},
        "placement": {"unit": {"slice": "containerd-default.slice", "child": "web"}},
        "cgroup": null,
        "rootfs_on_host": false,
        "face": {"description": "web", "fields": []},
        "init": {"name": "running", "pid": 7},
        "outbox": {"next": 3, "owed": []}
    }"#;

    #[test]
    fn an_old_record_is_read_and_a_running_task_always_has_a_cgroup() {
        let task: Task = serde_json::from_str(OLD).unwrap();
        assert_eq!(task.init.pid(), Some(7));
        assert_eq!((task.init.description.as_str(), task.init.stdio.stdout.as_str()), ("web", "/o"));
        let cgroup =
            Path::new("/containerd.slice/containerd-default.slice/containerd-default-web.service/web");
        assert_eq!(task.init.phase.container().unwrap().cgroup, cgroup);
        assert_eq!(task.request.has_lease, None);
    }

    /// As version 2 of the record has it, with every field.
    const PRESENT: &str = r#"{
        "key": {"namespace": "default", "id": "web"},
        "unit": "containerd-default-web.service",
        "logger": "containerd-default-web::log.service",
        "request": {"bundle": "/b", "rootfs": [{"kind": "bind", "source": "/s", "target": "", "options": ["ro"]}],
            "stdio": {"stdin": "/i", "stdout": "/o", "stderr": "", "terminal": true}, "has_lease": true},
        "wiring": {"terminal": true, "stdin": {"fifo": "/i"}, "stdin_closed": true, "stdout": {"fifo": "/o"},
            "stderr": "null", "logger": null, "kept": 5},
        "runtime": {"binary": "/bin/runc", "root": "/run/runc/default", "no_pivot": false, "no_new_keyring": false,
            "io_owner": [0, 0], "path": "", "environment": "/e", "cgroup": null, "limit_sec": 30,
            "log": "auto"},
        "containerd": {"ttrpc_address": "", "grpc_address": "", "path": "", "rlimits": [], "processors": [],
            "namespaces": null},
        "placement": {"foreign": {"slice": "containerd-default.slice", "path": "/x"}},
        "cgroup": "/x",
        "rootfs_on_host": true,
        "waiting_program": null,
        "face": {"description": "web", "fields": [["CONTAINER_ID", "web"]]},
        "properties": [],
        "devices": null,
        "notify": true,
        "init": {},
        "execs": {"e": {
            "unit": "containerd-default-web:e.service",
            "logger": null,
            "stdio": {"stdin": "", "stdout": "", "stderr": "", "terminal": false},
            "wiring": {"terminal": false, "stdin": "null", "stdin_closed": false, "stdout": "null", "stderr": "null",
                "logger": null, "kept": 6},
            "description": "sh",
            "phase": {"name": "running", "pid": 9}
        }},
        "outbox": {"next": 3, "owed": []},
        "oom_kills": 2,
        "limits": {},
        "given_limits": ["memory.max"],
        "muted": true,
        "is_leftover": true
    }"#;

    /// So a daemon of an earlier version reads the record after a downgrade.
    #[test]
    fn a_record_is_written_as_it_was_read() {
        let (seen, exit) =
            (r#"{"pid": 7, "exit": {"status": 3, "at_usec": 5}}"#, r#"{"status": 3, "at_usec": 5}"#);
        let phases = [
            r#"{"name": "creating", "exit": null}"#.to_owned(),
            format!(r#"{{"name": "creating", "exit": {seen}}}"#),
            r#"{"name": "prepared"}"#.to_owned(),
            r#"{"name": "restoring", "exit": null}"#.to_owned(),
            format!(r#"{{"name": "restoring", "exit": {seen}}}"#),
            r#"{"name": "created", "pid": 7}"#.to_owned(),
            r#"{"name": "starting", "pid": 7, "exit": null}"#.to_owned(),
            format!(r#"{{"name": "starting", "pid": 7, "exit": {exit}}}"#),
            r#"{"name": "running", "pid": 7}"#.to_owned(),
            r#"{"name": "paused", "pid": 7}"#.to_owned(),
            format!(r#"{{"name": "ending", "pid": 7, "exit": {exit}}}"#),
            format!(r#"{{"name": "ending", "pid": 7, "exit": {exit}, "never_started": true}}"#),
            format!(r#"{{"name": "stopped", "pid": 7, "exit": {exit}}}"#),
            format!(r#"{{"name": "stopped", "pid": 7, "exit": {exit}, "never_started": true}}"#),
        ];
        for phase in phases {
            let mut record: serde_json::Value = serde_json::from_str(PRESENT).unwrap();
            record["init"] = serde_json::from_str(&phase).unwrap();
            let name = record["init"]["name"].as_str().unwrap().to_owned();
            match name.as_str() {
                // There is no container yet.
                "creating" | "prepared" | "restoring" => {
                    if name != "creating" {
                        record["request"]["checkpoint"] = "/c".into();
                        record["runtime"]["criu_work"] = "/w".into();
                    }
                    record["cgroup"] = serde_json::Value::Null;
                    record["limits"] = serde_json::Value::Null;
                    record.as_object_mut().unwrap().remove("given_limits");
                    record["oom_kills"] = 0.into();
                }
                "created" | "starting" => record["waiting_program"] = serde_json::json!([1, 2]),
                _ => {}
            }
            let task: Task = serde_json::from_value(record.clone()).unwrap();
            assert_eq!(serde_json::to_value(&task).unwrap(), record);
        }
    }

    #[test]
    fn every_phase_comes_back_from_the_record_as_it_was() {
        let mut task: Task = serde_json::from_str(OLD).unwrap();
        for phase in super::super::phase::tests::phases() {
            task.init.phase = phase;
            let text = serde_json::to_string(&task).unwrap();
            assert_eq!(serde_json::from_str::<Task>(&text).unwrap(), task, "{text}");
        }
    }
}
