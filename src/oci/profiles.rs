//! The security profiles of the node that a pod names, and the SELinux label of a container's files.

use std::ffi::CString;
use std::fs::{self, File};
use std::io;
use std::path::{Path, PathBuf};

use rustix::fs::{XattrFlags, fsetxattr};
use serde_json::Value;

use crate::files;
use crate::path_error::{PathError, io_error};

/// The largest seccomp profile, in bytes.
const MAX_SECCOMP: u64 = 4 << 20;

/// The AppArmor profiles that are loaded: a line for each, with its name and its mode.
const LOADED: &str = "/sys/kernel/security/apparmor/profiles";

/// Why a pod can't have a profile.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The file with the seccomp profile can't be read.
    #[error("seccomp profile of the pod: {0}")]
    Io(#[from] PathError),
    /// The path of the seccomp profile is relative.
    #[error("seccomp profile of the pod: {path:?} must be an absolute path")]
    Relative {
        /// The path.
        path: PathBuf,
    },
    /// The file is no seccomp profile.
    #[error("seccomp profile of the pod: {path} is no JSON object: {reason}")]
    Malformed {
        /// The file.
        path: PathBuf,
        /// Why it can't be parsed.
        reason: String,
    },
    /// The node has no such AppArmor profile.
    #[error(
        "AppArmor profile {profile:?} of the pod is not loaded on this node; aa-status lists the loaded profiles"
    )]
    NotLoaded {
        /// The name of the profile.
        profile: String,
    },
}

/// The seccomp profile in a file of the node.
///
/// # Errors
/// The file can't be read, or has no JSON object.
pub fn seccomp(path: &Path) -> Result<Value, Error> {
    if !path.is_absolute() {
        return Err(Error::Relative { path: path.to_owned() });
    }
    let text = files::read_regular(path, MAX_SECCOMP).map_err(io_error("read", path))?;
    let malformed = |reason: String| Error::Malformed { path: path.to_owned(), reason };
    match serde_json::from_slice(&text) {
        Ok(profile @ Value::Object(_)) => Ok(profile),
        Ok(_) => Err(malformed("it is another value".to_owned())),
        Err(error) => Err(malformed(error.to_string())),
    }
}

/// Checks that an AppArmor profile is loaded. OCI runtimes report only that the kernel refuses it.
///
/// # Errors
/// [`Error::NotLoaded`]
pub fn check_apparmor(profile: &str) -> Result<(), Error> {
    check_apparmor_in(profile, fs::read_to_string(LOADED))
}

fn check_apparmor_in(profile: &str, loaded: io::Result<String>) -> Result<(), Error> {
    // A stack of profiles, or a profile in a namespace of AppArmor, is for the kernel to find.
    let is_plain = !profile.starts_with(':') && !profile.contains("//&");
    let Ok(loaded) = loaded else { return Ok(()) };
    let mut names = loaded.lines().filter_map(|line| line.rsplit_once(" (")).map(|(name, _)| name);
    if is_plain && profile != "unconfined" && !names.any(|name| name == profile) {
        return Err(Error::NotLoaded { profile: profile.to_owned() });
    }
    Ok(())
}

/// Exists if the kernel uses SELinux.
const SELINUX: &str = "/sys/fs/selinux/enforce";

/// True if the kernel uses SELinux, also if SELinux only reports what it would forbid.
pub fn selinux_is_active() -> bool {
    Path::new(SELINUX).exists()
}

/// Gives a file an SELinux label.
///
/// # Errors
/// The policy does not know the label or does not allow it, or the file system has no labels.
pub fn set_selinux_label(file: &File, label: &str) -> io::Result<()> {
    // With the NUL at the end, as setfilecon(3) does.
    let label = CString::new(label)?;
    Ok(fsetxattr(file, SELINUX_ATTRIBUTE, label.as_bytes_with_nul(), XattrFlags::empty())?)
}

/// The extended attribute with the label.
pub const SELINUX_ATTRIBUTE: &str = "security.selinux";

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_a_loaded_profile_of_apparmor_can_be_used() {
        let loaded = || Ok("docker-default (enforce)\n/usr/bin/man (complain)\na b (c) (kill)\n".to_owned());
        for profile in ["docker-default", "/usr/bin/man", "a b (c)", "unconfined", ":ns:a", "a//&b"] {
            assert!(check_apparmor_in(profile, loaded()).is_ok(), "{profile}");
        }
        for profile in ["", "docker", "docker-default (enforce)", "a b"] {
            let error = check_apparmor_in(profile, loaded()).unwrap_err().to_string();
            assert!(error.contains(&format!("{profile:?}")), "{error}");
        }
        assert!(check_apparmor_in("x", Err(io::ErrorKind::NotFound.into())).is_ok(), "nobody knows");
    }

    #[test]
    fn an_error_about_a_seccomp_profile_names_its_file() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("profile.json");
        let reason = |path: &Path| seccomp(path).unwrap_err().to_string();
        let begins = |reason: String, rest: &str| {
            let begin = format!("seccomp profile of the pod: {rest}");
            assert!(reason.starts_with(&begin), "{reason}");
        };
        begins(reason(&path), &format!("can't read {}: No such file", path.display()));
        begins(reason(dir.path()), &format!("can't read {}: ", dir.path().display()));
        begins(reason(Path::new("a.json")), "\"a.json\" must be an absolute path");
        for text in ["", "{", "[]", "7"] {
            fs::write(&path, text).unwrap();
            begins(reason(&path), &format!("{} is no JSON object: ", path.display()));
        }
        fs::write(&path, r#"{"defaultAction":"SCMP_ACT_ALLOW"}"#).unwrap();
        assert_eq!(seccomp(&path).unwrap()["defaultAction"], "SCMP_ACT_ALLOW");
    }
}
