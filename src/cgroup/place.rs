//! Where a client wants the container's cgroup: the forms of `linux.cgroupsPath` (pure).
//!
//! The systemd form `slice:prefix:name` is what runc's systemd driver reads; anything else is a
//! path. The default paths of clients that have no wish of their own go into our own slices.

use std::path::{Component, Path, PathBuf};

use crate::id::{Namespace, TaskId};

/// A client's wish.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Wish {
    /// None, or the client's default path: our own slice, and the id as the cgroup's name.
    Ours,
    /// A unit in that slice, with the container in a child of that name.
    Slice {
        /// The slice's name, `-.slice` for the root.
        slice: String,
        /// The child's name.
        child: String,
    },
    /// Exactly that path, whatever it means for systemd.
    Literal(PathBuf),
}

/// A wish that can't be understood.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("linux.cgroupsPath {text:?} is not valid: {rule}")]
pub struct Malformed {
    text: String,
    rule: &'static str,
}

/// Reads `linux.cgroupsPath`.
///
/// # Errors
/// Neither an absolute path without `..` nor `slice:prefix:name`.
pub fn parse(text: &str, namespace: &Namespace, id: &TaskId) -> Result<Wish, Malformed> {
    let malformed = |rule| Malformed { text: text.chars().take(200).collect(), rule };
    if text.is_empty() {
        return Ok(Wish::Ours);
    }
    if text.contains('\0') || text.contains('\n') {
        return Err(malformed("it contains a NUL or a newline"));
    }
    if text.contains(':') && !text.starts_with('/') {
        return systemd_form(text, malformed);
    }
    let path = Path::new(text.trim_start_matches('/'));
    if path.components().any(|part| !matches!(part, Component::Normal(_))) {
        return Err(malformed("a path must not contain \"..\" or \".\""));
    }
    let path = Path::new("/").join(path);
    let defaults = [namespace.as_str(), "k8s.io", "docker"];
    if path == Path::new("/")
        || defaults.iter().any(|parent| path == Path::new("/").join(parent).join(id.as_str()))
    {
        return Ok(Wish::Ours);
    }
    Ok(Wish::Literal(path))
}

fn systemd_form(text: &str, malformed: impl Fn(&'static str) -> Malformed) -> Result<Wish, Malformed> {
    let parts: Vec<&str> = text.split(':').collect();
    let [slice, prefix, name] = parts[..] else {
        return Err(malformed("the systemd form has three parts, slice:prefix:name"));
    };
    if name.is_empty() || [prefix, name].iter().any(|part| part.contains('/')) {
        return Err(malformed("prefix and name must not contain \"/\", and the name must not be empty"));
    }
    let slice = match slice {
        "" => "system.slice".to_owned(),
        "-" | "-.slice" => "-.slice".to_owned(),
        slice => {
            let stem = slice
                .strip_suffix(".slice")
                .ok_or_else(|| malformed("its first part must end in \".slice\""))?;
            let sound = stem.split('-').all(|part| !part.is_empty()) && !stem.contains('/');
            if !sound {
                return Err(malformed(
                    "the slice's name must not contain \"/\", nor begin or end with or double a \"-\"",
                ));
            }
            slice.to_owned()
        }
    };
    // As runc names it; clients' agents find the container by this name.
    let child = match (prefix, name) {
        (_, name) if name.ends_with(".slice") => name.to_owned(),
        ("", name) => format!("{name}.scope"),
        (prefix, name) => format!("{prefix}-{name}.scope"),
    };
    Ok(Wish::Slice { slice, child: escape(&child) })
}

/// A name that can stand as a directory in a cgroup: names of the kernel's own files get a leading
/// underscore, as systemd does it.
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

    fn read(text: &str) -> Result<Wish, Malformed> {
        parse(text, &Namespace::new("default").unwrap(), &TaskId::new(ID).unwrap())
    }

    fn slice(slice: &str, child: &str) -> Result<Wish, Malformed> {
        Ok(Wish::Slice { slice: slice.to_owned(), child: child.to_owned() })
    }

    #[test]
    fn defaults_of_clients_are_no_wish() {
        for text in ["", "/", "/default/web", "/k8s.io/web", "/docker/web"] {
            assert_eq!(read(text), Ok(Wish::Ours), "{text:?}");
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
            assert_eq!(read(text), Ok(Wish::Literal(text.into())), "{text:?}");
        }
    }

    #[test]
    fn mistakes_are_named() {
        for text in
            ["a:b", "a:b:c:d", "foo:p:n", "a--b.slice:p:n", "a/b.slice:p:n", "x.slice:p:", "/a/../b", "a\0b"]
        {
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
