//! The files that the containers of a pod share: `/etc/hostname`, `/etc/hosts`, `/etc/resolv.conf` and `/dev/shm`.
//!
//! containerd's CRI plugin mounts them into each container of a pod, from fixed paths in its own directories. The plugin
//! also makes the files, except if the shim makes the sandbox: then the shim has to make them.

use std::fs::{self, File};
use std::io;
use std::os::fd::AsRawFd;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use nix::mount::{MsFlags, mount};

use crate::files;
use crate::path_error::{PathError, io_error};
use crate::sys::user_namespace;
use crate::task::request::Places;

use super::mount::{self as mounts, unmount_all};
use super::pod::{Dns, Namespace, Pod};

/// The directory of the sandbox controller `shim` in the state directory and the root directory of containerd 2.
const CONTROLLER: &str = "io.containerd.sandbox.controller.v1.shim";
/// The directory of the CRI plugin in both.
const CRI: &str = "io.containerd.grpc.v1.cri";

const HOSTNAME: &str = "hostname";
const HOSTS: &str = "hosts";
const RESOLV_CONF: &str = "resolv.conf";
const SHM: &str = "shm";
const USER_NAMESPACE: &str = "user-namespace";

/// The largest file of the node that is copied for a pod, in bytes.
const MAX_FILE: u64 = 4 << 20;

/// Why the files can't be made or removed.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// A file can't be made, read or removed.
    #[error("files of the pod: {0}")]
    Io(#[from] PathError),
    /// The mount can't be made or removed.
    #[error("files of the pod: {0}")]
    Mount(#[from] mounts::Error),
}

/// The directories in which the CRI plugin looks for the files of the pod `id`, for the containerd that has made `bundle`.
/// `None` if `bundle` is not in the directory in which containerd 2 makes bundles of sandboxes, or if there is no CRI plugin.
pub fn places(bundle: &Path, id: &str) -> Option<Places> {
    let root = fs::read_link(bundle.join("work")).ok()?;
    // DIRECTORY/CONTROLLER/NAMESPACE/ID
    let directory = |path: &Path| -> Option<PathBuf> {
        let controller = path.ancestors().nth(2)?;
        (controller.file_name()? == CONTROLLER).then(|| controller.parent().map(Path::to_owned))?
    };
    let (state, root) = (directory(bundle)?.join(CRI), directory(&root)?.join(CRI));
    let of_pod = |plugin: PathBuf| plugin.join("sandboxes").join(id);
    root.is_dir().then(|| Places { files: of_pod(root), mounts: of_pod(state) })
}

/// Makes the files of a pod. An earlier attempt may have made some of them.
///
/// # Errors
/// A file or the mount can't be made.
pub fn make(pod: &Pod, places: &Places) -> Result<(), Error> {
    make_dir(&places.files)?;
    let put = |name: &str, text: &[u8]| {
        let new = places.files.join(format!(".{name}.new"));
        let path = places.files.join(name);
        files::replace(&path, &new, 0o644, text).map_err(io_error("write", &path))
    };
    let hostname = match pod.hostname.as_str() {
        "" => of_node("/proc/sys/kernel/hostname")?,
        own => format!("{own}\n").into_bytes(),
    };
    put(HOSTNAME, &hostname)?;
    put(HOSTS, &of_node("/etc/hosts")?)?;
    let resolv_conf = match &pod.dns {
        Some(dns) => resolv_conf(dns).into_bytes(),
        None => of_node("/etc/resolv.conf")?,
    };
    put(RESOLV_CONF, &resolv_conf)?;
    if pod.ipc == Namespace::Pod {
        mount_shm(&places.mounts.join(SHM))?;
    }
    Ok(())
}

/// Mounts the user namespace that owns the network namespace `network` at a path, for a pod with a user namespace. containerd
/// 2 makes both namespaces before it calls, and only processes in that user namespace can configure the network. `None` if
/// the node's user namespace owns the network namespace: then the pod gets a new user namespace.
///
/// # Errors
/// `network` is no network namespace, or its owner can't be mounted.
pub fn pin_user_namespace(network: &Path, places: &Places) -> Result<Option<PathBuf>, Error> {
    let opened = File::open(network).map_err(io_error("open", network))?;
    let owner = user_namespace::owner(&opened).map_err(io_error("find the user namespace of", network))?;
    let owner = File::from(owner);
    let inode = |file: &File| file.metadata().map(|found| (found.dev(), found.ino()));
    let node = Path::new("/proc/self/ns/user");
    let of_node = File::open(node).and_then(|opened| inode(&opened)).map_err(io_error("look at", node))?;
    if inode(&owner).map_err(io_error("look at the user namespace of", network))? == of_node {
        return Ok(None);
    }
    make_dir(&places.mounts)?;
    let pinned = places.mounts.join(USER_NAMESPACE);
    // An earlier attempt may have mounted it.
    unmount_all(&pinned)?;
    File::create(&pinned).map_err(io_error("make", &pinned))?;
    let source = format!("/proc/self/fd/{}", owner.as_raw_fd());
    let mounted = mount(Some(source.as_str()), &pinned, None::<&str>, MsFlags::MS_BIND, None::<&str>);
    mounted.map_err(io_error("mount", &pinned))?;
    Ok(Some(pinned))
}

/// Removes the files of a pod. It is no error if some do not exist.
///
/// # Errors
/// A file or the mount can't be removed.
pub fn remove(places: &Places) -> Result<(), Error> {
    let shm = places.mounts.join(SHM);
    unmount_all(&shm)?;
    let user_namespace = places.mounts.join(USER_NAMESPACE);
    unmount_all(&user_namespace)?;
    gone(fs::remove_file(&user_namespace), &user_namespace)?;
    for name in [HOSTNAME, HOSTS, RESOLV_CONF] {
        let path = places.files.join(name);
        gone(fs::remove_file(&path), &path)?;
    }
    for path in [&shm, &places.mounts, &places.files] {
        gone(fs::remove_dir(path), path)?;
    }
    Ok(())
}

fn gone(removed: io::Result<()>, path: &Path) -> Result<(), PathError> {
    match removed {
        // Other programs may have put files into this directory, and have to remove them.
        Err(error) if matches!(error.kind(), io::ErrorKind::NotFound | io::ErrorKind::DirectoryNotEmpty) => {
            Ok(())
        }
        removed => removed.map_err(io_error("remove", path)),
    }
}

fn make_dir(path: &Path) -> Result<(), PathError> {
    files::make_dir(path, 0o755).map_err(io_error("make", path))
}

/// A file of the node; empty if the node has none.
fn of_node(path: &str) -> Result<Vec<u8>, PathError> {
    let path = Path::new(path);
    match files::read_regular(path, MAX_FILE) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(Vec::new()),
        read => read.map_err(io_error("read", path)),
    }
}

fn resolv_conf(dns: &Dns) -> String {
    let mut text = String::new();
    let mut line = |word: &str, values: &[String]| {
        if !values.is_empty() {
            text.push_str(&format!("{word} {}\n", values.join(" ")));
        }
    };
    line("search", &dns.searches);
    dns.servers.iter().for_each(|server| line("nameserver", std::slice::from_ref(server)));
    line("options", &dns.options);
    text
}

/// Mounts the pod's /dev/shm, with the size that containerd gives it.
fn mount_shm(path: &Path) -> Result<(), Error> {
    make_dir(path)?;
    // An earlier attempt may have mounted it.
    unmount_all(path)?;
    let flags = MsFlags::MS_NOEXEC | MsFlags::MS_NOSUID | MsFlags::MS_NODEV;
    let mounted = mount(Some("shm"), path, Some("tmpfs"), flags, Some("mode=1777,size=67108864"));
    Ok(mounted.map_err(io_error("mount", path))?)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::symlink;

    #[test]
    fn the_files_of_a_pod_are_in_the_directories_of_its_containerd() {
        let dir = tempfile::tempdir().unwrap();
        let bundle = dir.path().join("state").join(CONTROLLER).join("k8s.io/id");
        let work = dir.path().join("root").join(CONTROLLER).join("k8s.io/id");
        fs::create_dir_all(&bundle).unwrap();
        symlink(&work, bundle.join("work")).unwrap();
        assert_eq!(places(&bundle, "id"), None, "there is no CRI plugin");
        fs::create_dir_all(dir.path().join("root").join(CRI)).unwrap();
        let found = places(&bundle, "id").unwrap();
        assert_eq!(found.files, dir.path().join("root").join(CRI).join("sandboxes/id"));
        assert_eq!(found.mounts, dir.path().join("state").join(CRI).join("sandboxes/id"));
        let other = dir.path().join("bundle");
        fs::create_dir_all(&other).unwrap();
        symlink(&work, other.join("work")).unwrap();
        assert_eq!(places(&other, "id"), None);
    }

    #[test]
    fn a_pod_has_the_name_servers_that_it_is_given() {
        let dns = Dns {
            servers: vec!["10.0.0.1".to_owned(), "10.0.0.2".to_owned()],
            searches: vec!["a.local".to_owned(), "b.local".to_owned()],
            options: vec!["ndots:5".to_owned()],
        };
        assert_eq!(
            resolv_conf(&dns),
            "search a.local b.local\nnameserver 10.0.0.1\nnameserver 10.0.0.2\noptions ndots:5\n"
        );
        assert_eq!(resolv_conf(&Dns::default()), "");
    }

    #[test]
    fn only_a_network_of_another_user_namespace_has_an_owner_to_pin() {
        let dir = tempfile::tempdir().unwrap();
        let places = Places { files: dir.path().join("a"), mounts: dir.path().join("b") };
        let pinned = pin_user_namespace(Path::new("/proc/self/ns/net"), &places);
        assert_eq!(pinned.unwrap(), None);
        assert!(!places.mounts.exists());
        assert!(pin_user_namespace(Path::new("/dev/null"), &places).is_err());
        assert!(pin_user_namespace(&dir.path().join("missing"), &places).is_err());
    }

    #[test]
    fn files_are_made_again_and_removed() {
        let dir = tempfile::tempdir().unwrap();
        let places = Places { files: dir.path().join("a/b"), mounts: dir.path().join("c/d") };
        // A pod with the IPC namespace of the node has its /dev/shm too, and needs no mount.
        let pod = Pod {
            hostname: "web".to_owned(),
            ipc: Namespace::Node,
            dns: Some(Dns::default()),
            ..Pod::default()
        };
        make(&pod, &places).unwrap();
        make(&pod, &places).unwrap();
        assert_eq!(fs::read_to_string(places.files.join("hostname")).unwrap(), "web\n");
        assert!(places.files.join("hosts").is_file() && places.files.join("resolv.conf").is_file());
        remove(&places).unwrap();
        remove(&places).unwrap();
        assert!(!places.files.exists());
    }
}
