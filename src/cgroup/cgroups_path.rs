//! Parses `linux.cgroupsPath`, the cgroup that a client requests for a container (pure).
//!
//! The systemd form `slice:prefix:name` is the one of runc's systemd driver; anything else is a path. Default
//! paths of clients request nothing in particular: those containers go into our own slices.

use std::path::{Component, Path, PathBuf};

use crate::id::{Namespace, TaskId};

/// The cgroup that a client requests.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Requested {
    /// No path, or the default path of a client: our own slice, and the id as the name of the cgroup.
    Default,
    /// A unit in this slice, with the container in a child cgroup of this name.
    Slice {
        /// The name of the slice, `-.slice` for the root.
        slice: String,
        /// The name of the child cgroup.
        child: String,
    },
    /// Exactly this absolute path, even if it is outside of systemd's tree.
    Literal(PathBuf),
}

/// The longest path that a client may request, in bytes. The units and the cgroups below it still fit into a path of the
/// kernel (`PATH_MAX`). systemd can't remove a longer one, and keeps its unit until the reboot.
const LONGEST: usize = 3072;

/// The longest name of a directory, in bytes.
const LONGEST_NAME: usize = 255;

/// The cgroup that a relative path begins in. The OCI runtime would begin in the parent of its own cgroup, and
/// containerd-shim-runc-v2 runs it in that of a service: dockerd's or containerd's.
const BASE_OF_RELATIVE: &str = "/system.slice";

/// The parents of the cgroups that clients choose by default. The containerd namespace is another such parent.
const DEFAULT_PARENTS: [&str; 2] = ["k8s.io", "docker"];

impl Requested {
    /// True for the default path of a client for a container with another id: `/PARENT/ID`. `namespace` is the
    /// namespace of the container.
    pub fn is_default_of_another(&self, namespace: &Namespace) -> bool {
        let Self::Literal(path) = self else {
            return false;
        };
        let parts: Vec<_> = path.iter().skip(1).filter_map(|part| part.to_str()).collect();
        match parts[..] {
            [parent, id] => {
                (parent == namespace.as_str() || DEFAULT_PARENTS.contains(&parent)) && TaskId::new(id).is_ok()
            }
            _ => false,
        }
    }
}

/// `linux.cgroupsPath` is neither a path nor in the systemd form.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("linux.cgroupsPath {text:?} is not valid: {rule}")]
pub struct InvalidPath {
    text: String,
    rule: &'static str,
}

/// Reads `linux.cgroupsPath`.
///
/// # Errors
/// The text is neither a path without `..` nor `slice:prefix:name`.
pub fn parse(text: &str, namespace: &Namespace, id: &TaskId) -> Result<Requested, InvalidPath> {
    let malformed = |rule| InvalidPath { text: text.chars().take(200).collect(), rule };
    if text.is_empty() {
        return Ok(Requested::Default);
    }
    if text.contains('\0') || text.contains('\n') {
        return Err(malformed("it must not contain a NUL or a newline"));
    }
    if text.contains(':') && !text.starts_with('/') {
        return systemd_form(text, malformed);
    }
    // Docker makes such a path of `--cgroup-parent /a.slice`. The container would be in no slice.
    if text.matches(':').count() == 2 && text.split(':').next().is_some_and(|slice| slice.ends_with(".slice"))
    {
        return Err(malformed("in the systemd form, the name of the slice must not begin with \"/\""));
    }
    let path = Path::new(text.trim_start_matches('/'));
    if path.components().any(|part| !matches!(part, Component::Normal(_))) {
        return Err(malformed("the path must not contain \"..\" or \".\""));
    }
    if path.as_os_str().len() > LONGEST || path.iter().any(|part| part.len() > LONGEST_NAME) {
        return Err(malformed("the path must not be longer than 3072 bytes, and no part longer than 255"));
    }
    let (relative, path) = (path, Path::new("/").join(path));
    let mut defaults = std::iter::once(namespace.as_str()).chain(DEFAULT_PARENTS);
    if path == Path::new("/") || defaults.any(|parent| path == Path::new("/").join(parent).join(id.as_str()))
    {
        return Ok(Requested::Default);
    }
    let is_relative = !text.starts_with('/');
    Ok(Requested::Literal(if is_relative { Path::new(BASE_OF_RELATIVE).join(relative) } else { path }))
}

fn systemd_form(
    text: &str,
    malformed: impl Fn(&'static str) -> InvalidPath,
) -> Result<Requested, InvalidPath> {
    let parts: Vec<&str> = text.split(':').collect();
    let [slice, prefix, name] = parts[..] else {
        return Err(malformed("the systemd form must have three parts, slice:prefix:name"));
    };
    if name.is_empty() || [prefix, name].iter().any(|part| part.contains('/')) {
        return Err(malformed("prefix and name must not contain \"/\", and the name must not be empty"));
    }
    let slice = match slice {
        "" => "system.slice".to_owned(),
        "-" | "-.slice" => "-.slice".to_owned(),
        slice => {
            let stem =
                slice.strip_suffix(".slice").ok_or_else(|| malformed("the slice must end in \".slice\""))?;
            let sound = stem.split('-').all(|part| !part.is_empty()) && !stem.contains('/');
            if !sound {
                return Err(malformed(
                    "the name of the slice must not contain \"/\" or \"--\", and must not begin or end with \"-\"",
                ));
            }
            if nested_length(stem) > LONGEST {
                return Err(malformed(
                    "the slice is in too many others: the path of its cgroup must not be longer than 3072 bytes",
                ));
            }
            slice.to_owned()
        }
    };
    // runc uses this name too: agents of clients find the container by it.
    let child = match (prefix, name) {
        (_, name) if name.ends_with(".slice") => name.to_owned(),
        ("", name) => format!("{name}.scope"),
        (prefix, name) => format!("{prefix}-{name}.scope"),
    };
    Ok(Requested::Slice { slice, child: escape(&child) })
}

/// The length of the path of a slice: `a-b.slice` is in `a.slice`.
fn nested_length(stem: &str) -> usize {
    let ends = stem.match_indices('-').map(|(end, _)| end).chain([stem.len()]);
    ends.map(|end| end + "/.slice".len()).sum()
}

/// A name for a directory in a cgroup. A name that the kernel could use for a file of its own gets a leading
/// underscore, as in systemd.
pub fn escape(name: &str) -> String {
    const KERNELS: [&str; 10] =
        ["cgroup.", "cpu.", "cpuset.", "memory.", "io.", "pids.", "hugetlb.", "rdma.", "misc.", "irq."];
    let reserved = KERNELS.iter().any(|prefix| name.starts_with(prefix)) || name.starts_with(['_', '.']);
    if reserved { format!("_{name}") } else { name.to_owned() }
}

#[cfg(test)]
mod tests {
    use super::*;

    const ID: &str = "web";

    #[test]
    fn a_path_that_is_too_long_for_the_kernel_is_refused() {
        assert_eq!(nested_length("a-bc"), "/a.slice/a-bc.slice".len());
        let nested = |depth: usize| format!("{}a.slice:x:y", "a-".repeat(depth));
        assert!(read(&nested(50)).is_ok());
        let parts = |count: usize| "/x".repeat(count);
        assert!(read(&parts(1500)).is_ok());
        for text in [nested(60), nested(120), parts(1600), "x".repeat(256)] {
            let refused = read(&text).unwrap_err().to_string();
            assert!(refused.contains("3072"), "{refused}");
        }
    }

    #[test]
    fn the_default_path_of_another_container_is_known() {
        let namespace = Namespace::new("default").unwrap();
        for (path, is_default) in [
            ("/default/other", true),
            ("/docker/other", true),
            ("/other/web", false),
            ("/default/a/b", false),
        ] {
            assert_eq!(read(path).unwrap().is_default_of_another(&namespace), is_default, "{path}");
        }
    }

    fn read(text: &str) -> Result<Requested, InvalidPath> {
        parse(text, &Namespace::new("default").unwrap(), &TaskId::new(ID).unwrap())
    }

    fn slice(slice: &str, child: &str) -> Result<Requested, InvalidPath> {
        Ok(Requested::Slice { slice: slice.to_owned(), child: child.to_owned() })
    }

    #[test]
    fn defaults_of_clients_request_nothing() {
        for text in ["", "/", "/default/web", "/k8s.io/web", "/docker/web"] {
            assert_eq!(read(text), Ok(Requested::Default), "{text:?}");
        }
    }

    #[test]
    fn the_systemd_form_names_slice_and_child() {
        assert_eq!(
            read("kubepods-burstable.slice:cri-containerd:ab"),
            slice("kubepods-burstable.slice", "cri-containerd-ab.scope")
        );
        assert_eq!(read("system.slice:docker:ab"), slice("system.slice", "docker-ab.scope"));
        assert_eq!(read(":runc:ab"), slice("system.slice", "runc-ab.scope"));
        assert_eq!(read("-:runc:ab"), slice("-.slice", "runc-ab.scope"));
    }

    #[test]
    fn another_path_is_taken_literally() {
        for text in ["/kubepods/burstable/pod1/ab", "/default/other", "/x"] {
            assert_eq!(read(text), Ok(Requested::Literal(text.into())), "{text:?}");
        }
    }

    #[test]
    fn a_relative_path_begins_where_services_are() {
        for (text, path) in
            [("foo/web", "/system.slice/foo/web"), ("x", "/system.slice/x"), ("a//b/", "/system.slice/a/b")]
        {
            assert_eq!(read(text), Ok(Requested::Literal(path.into())), "{text:?}");
            assert_eq!(
                read(path),
                Ok(Requested::Literal(path.into())),
                "{text:?}, written by an earlier attempt"
            );
        }
        assert_eq!(read("docker/web"), Ok(Requested::Default));
        for text in ["../../x", "foo/../x", "./x", ".."] {
            assert!(read(text).is_err(), "{text:?}");
        }
    }

    #[test]
    fn mistakes_are_named() {
        for text in [
            "a:b",
            "a:b:c:d",
            "/a.slice:p:n",
            "/a/b.slice:p:n",
            "foo:p:n",
            "a--b.slice:p:n",
            "a/b.slice:p:n",
            "x.slice:p:",
            "/a/../b",
            "a\0b",
        ] {
            assert!(read(text).is_err(), "{text:?}");
        }
        assert!(read("foo:p:n").is_err_and(|e| e.to_string().contains(".slice")));
    }

    #[test]
    fn the_kernels_own_file_names_are_escaped() {
        assert_eq!(escape("cgroup.procs"), "_cgroup.procs");
        assert_eq!(escape("web"), "web");
    }
}
