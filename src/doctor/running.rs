//! The containerds that run on this machine: its own, that of Docker, that of k3s or RKE2.

use std::path::{Path, PathBuf};

use crate::probe::{self, Known, Properties, Unknown, property};

/// The `PATH` of systemd's services, which is used if that of containerd can't be read.
const USUAL_PATH: &str = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin";

/// Directories with a containerd and a runc that k3s and RKE2 add to the `PATH` of their containerd.
const RANCHER: [&str; 2] = ["/var/lib/rancher/k3s/data/current/bin", "/var/lib/rancher/rke2/bin"];

/// A containerd that runs.
#[derive(Clone, Debug)]
pub(super) struct Running {
    pub pid: u32,
    /// Its `PATH`.
    pub path: Known<String>,
    /// The configuration file that its arguments name.
    pub config: Option<PathBuf>,
}

pub(super) fn collect() -> Vec<Running> {
    let names = probe::names("/proc").unwrap_or_default();
    let pids = names.iter().filter_map(|name| name.parse().ok());
    let mut running: Vec<Running> = pids.filter(|pid| is_containerd(*pid)).map(look).collect();
    running.sort_by_key(|containerd| containerd.pid);
    running
}

/// False for a containerd in a container: its files are not those of this machine.
fn is_containerd(pid: u32) -> bool {
    let read = |name: &str| probe::file(format!("/proc/{pid}/{name}")).unwrap_or_default();
    read("comm").trim() == "containerd" && is_here(&read("status"))
}

/// True if a process has a pid in no other pid namespace, by its `/proc/PID/status`.
fn is_here(status: &str) -> bool {
    let pids = status.lines().find_map(|line| line.strip_prefix("NSpid:"));
    pids.is_some_and(|pids| pids.split_whitespace().count() == 1)
}

fn look(pid: u32) -> Running {
    let environment = probe::file(format!("/proc/{pid}/environ"));
    let arguments = probe::file(format!("/proc/{pid}/cmdline")).unwrap_or_default();
    Running { pid, path: environment.map(|text| path_in(&text)), config: config_in(&arguments) }
}

fn path_in(environment: &str) -> String {
    let path = environment.split('\0').find_map(|word| word.strip_prefix("PATH="));
    path.unwrap_or(USUAL_PATH).to_owned()
}

/// `-c FILE`, `--config FILE`, `--config=FILE`.
fn config_in(arguments: &str) -> Option<PathBuf> {
    let mut words = arguments.split('\0');
    while let Some(word) = words.next() {
        let (name, value) = word.split_once('=').map_or((word, None), |(name, value)| (name, Some(value)));
        if ["-c", "--c", "-config", "--config"].contains(&name) {
            return value.or_else(|| words.next()).map(PathBuf::from).filter(|path| path.is_absolute());
        }
    }
    None
}

/// The directories in which containerd looks for programs.
#[derive(Clone, Debug)]
pub(super) struct Search {
    /// The directories of all containerds, separated by colons.
    pub path: String,
    /// Why the directories are a guess, if they are.
    pub guessed: Option<Unknown>,
}

/// The `PATH` of the containerds that run, or what is known of it: the service may set it.
pub(super) fn search(running: &[Running], service: Option<&Properties>) -> Search {
    let set = service.and_then(|unit| property(unit, "Environment"));
    let set = set.and_then(|text| text.split_whitespace().find_map(|word| word.strip_prefix("PATH=")));
    let guess = set.unwrap_or(USUAL_PATH);
    let mut paths: Vec<&str> = running.iter().filter_map(|each| each.path.as_deref().ok()).collect();
    let guesses = paths.len() < running.len() || paths.is_empty();
    if guesses {
        paths.push(guess);
    }
    let rancher = RANCHER.into_iter().filter(|dir| guesses && Path::new(dir).is_dir());
    let mut dirs: Vec<&str> = Vec::new();
    for dir in paths.iter().flat_map(|path| path.split(':')).chain(rancher) {
        if !dirs.contains(&dir) {
            dirs.push(dir);
        }
    }
    Search { path: dirs.join(":"), guessed: running.iter().find_map(|each| each.path.clone().err()) }
}

/// The first two numbers of a version: `1.7.24~ds1` is (1, 7).
pub(super) fn numbers(version: &str) -> Option<(u32, u32)> {
    let mut parts = version.split(|c: char| !c.is_ascii_digit());
    Some((parts.next()?.parse().ok()?, parts.next()?.parse().ok()?))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::probe::properties;

    #[test]
    fn the_arguments_name_the_configuration() {
        let k3s =
            "containerd\0-c\0/var/lib/rancher/k3s/agent/etc/containerd/config.toml\0-a\0/run/k3s/c.sock\0";
        let docker = "containerd\0--config=/var/run/docker/containerd/containerd.toml\0";
        assert_eq!(
            config_in(k3s).unwrap(),
            Path::new("/var/lib/rancher/k3s/agent/etc/containerd/config.toml")
        );
        assert_eq!(config_in(docker).unwrap(), Path::new("/var/run/docker/containerd/containerd.toml"));
        assert_eq!(config_in("/usr/bin/containerd\0"), None);
        assert_eq!(config_in("/usr/bin/containerd\0-c"), None);
    }

    #[test]
    fn a_process_in_a_container_is_told_from_one_of_the_machine() {
        assert!(is_here("Name:\tcontainerd\nNSpid:\t700\n"));
        assert!(!is_here("Name:\tcontainerd\nNSpid:\t700\t12\n") && !is_here(""));
    }

    #[test]
    fn programs_are_searched_where_each_containerd_looks() {
        let running = |path| Running { pid: 1, path, config: None };
        let own = running(Ok("/usr/bin:/bin".to_owned()));
        let k3s = running(Ok("/data/bin:/usr/bin".to_owned()));
        let found = search(&[own.clone(), k3s], None);
        assert!(found.path.starts_with("/usr/bin:/bin:/data/bin"), "{found:?}");
        assert_eq!(found.guessed, None);
        let service = properties(&[("Environment", "A=b PATH=/own/bin")]);
        assert!(search(&[], Some(&service)).path.starts_with("/own/bin"));
        let hidden = running(Err(Unknown::Forbidden("/proc/1/environ".to_owned())));
        let found = search(&[own, hidden], None);
        assert!(found.path.contains("/usr/local/bin") && found.guessed.is_some(), "{found:?}");
        assert_eq!(path_in("A=b\0PATH=/x\0"), "/x");
    }
}
