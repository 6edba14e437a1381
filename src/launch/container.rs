//! In a container's unit: mounts the rootfs and becomes the OCI runtime's `create`, or its `restore` for a container
//! with a checkpoint.

use std::convert::Infallible;
use std::os::unix::process::CommandExt;
use std::path::PathBuf;

use nix::mount::{MsFlags, mount};
use nix::sched::{CloneFlags, unshare};

use crate::oci::bundle::{self, Edits, Found};
use crate::oci::criu::CONFIG_ANNOTATION;
use crate::oci::mount as rootfs;
use crate::oci::namespaces;
use crate::store::Store;
use crate::task::Placement;
use crate::unit::name;
use crate::{cgroup, config};

use super::contract::{LAUNCH_ERROR, NOTIFY_SOCKET, PID_FILE, WATCHDOG_USEC};
use super::error::{Error, system};
use super::process::Process;
use super::streams::Streams;
use super::{cgroup as launch_cgroup, core_scheduling, inherited, restore, sandbox};

/// Returns only if it fails. Writes the reason to a file for the daemon.
pub(super) fn run(process: &Process<'_>) -> Result<(), Error> {
    let failed = prepare(process).and_then(|()| match &process.task.request.checkpoint {
        None => become_runtime(process),
        Some(images) => restore::run(process, images),
    });
    match failed {
        Ok(never) => match never {},
        Err(Error::Again) => Err(Error::Again),
        Err(error) => {
            // Without this file, the daemon takes the reason from the OCI runtime's log.
            let _ = std::fs::write(process.dir.join(LAUNCH_ERROR), error.to_string());
            Err(error)
        }
    }
}

fn prepare(process: &Process<'_>) -> Result<(), Error> {
    let task = process.task;
    namespaces::enter(&task.containerd)?;
    process.mark()?;
    let bundle = &task.request.bundle;
    let mut edits = Edits::default();
    let (path, is_in_unit) = match &task.placement {
        Placement::Unit { child, .. } => {
            let unit = cgroup::of_self()?;
            // In the cgroup of the unit, which is above what the container can write.
            cgroup::limit_descendants(&unit)?;
            (unit.join(child), true)
        }
        // The OCI runtime would resolve a relative path of the client against its own cgroup.
        Placement::Foreign { path, .. } => (path.clone(), false),
    };
    edits.cgroups_path = Some(path.clone());
    if task.notify {
        let socket = Store::new(config::STATE_DIR).notify_socket(&name::short_name(task.unit()));
        pass_on_notifications(&mut edits, socket);
    }
    if task.request.checkpoint.is_some() {
        edits.annotation = Some((CONFIG_ANNOTATION, restore::write_overrides(process)?));
    }
    let Found { namespaces, cgroup_owner } = bundle::edit(bundle, &edits)?;
    if let Some(owner) = cgroup_owner.filter(|_| is_in_unit) {
        // runc does this in its systemd driver only, and uses a cgroup that exists.
        cgroup::give_to(&path, owner)?;
    }
    namespaces.iter().try_for_each(|one| namespaces::check(&one.kind, &one.path))?;
    launch_cgroup::enter(process)?;
    // Create has already mounted the rootfs of a container that is restored.
    if !task.request.rootfs.is_empty() && task.request.checkpoint.is_none() {
        if !task.rootfs_on_host {
            own_mount_namespace()?;
        }
        rootfs::mount_all(&bundle.join("rootfs"), &task.request.rootfs)?;
    }
    if task.request.sandbox.is_some() {
        own_mount_namespace()?;
        sandbox::make_root()?;
    }
    core_scheduling::join(task, process.exec)?;
    inherited::set(&task.containerd)
}

fn become_runtime(process: &Process<'_>) -> Result<Infallible, Error> {
    let (bundle, pid_file) = (&process.task.request.bundle, process.dir.join(PID_FILE));
    let (cli, console) = (process.cli(), process.console.as_deref());
    let streams = Streams::open(process)?;
    process.with_runtime(|program| {
        let mut command = cli.create(program, bundle, &pid_file, console)?;
        streams.equip(&mut command)?;
        // `exec` also restores the default action of SIGPIPE, which Rust programs ignore.
        Err(Error::Exec { verb: "create", binary: program.to_owned(), source: command.exec() })
    })
}

/// The container gets the variables that systemd sets for a service that notifies, with its own socket instead of systemd's,
/// and the watchdog interval of the unit. The variable with the pid is left out: the pid has no meaning in the container.
fn pass_on_notifications(edits: &mut Edits, own: PathBuf) {
    let Some(socket) = std::env::var(NOTIFY_SOCKET).ok().filter(|path| path.starts_with('/')) else {
        return;
    };
    edits.env.push(format!("{NOTIFY_SOCKET}={socket}"));
    edits.env.extend(std::env::var(WATCHDOG_USEC).map(|usec| format!("{WATCHDOG_USEC}={usec}")));
    edits.binds.push((own, socket));
}

/// Makes a mount namespace that receives mounts of the host, and does not propagate its own.
fn own_mount_namespace() -> Result<(), Error> {
    unshare(CloneFlags::CLONE_NEWNS).map_err(system("make a mount namespace"))?;
    mount(None::<&str>, "/", None::<&str>, MsFlags::MS_REC | MsFlags::MS_SLAVE, None::<&str>)
        .map_err(system("make the mount namespace a slave of the host's"))
}
