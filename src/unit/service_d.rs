//! Drop-ins for all services of the machine (`service.d/`, systemd.unit(5)).
//!
//! Such a drop-in overrides the properties that a transient unit was asked for. Some settings that suit most services break
//! containers: under `RestrictNamespaces=yes` the OCI runtime can't create any, and `RuntimeMaxSec=` ends them. But systemd
//! reads only one of several drop-ins of the same name: the one in the directory that is most specific to the unit. So a copy
//! without these settings is put into the directory for the containers of a namespace. All other settings of the drop-in, and
//! all other drop-ins, apply as before and in the same order.
//!
//! The daemon's own service is also protected by a flag of its command ([`super::exec_flags`]), even if no copy could be made.

use std::collections::{BTreeMap, BTreeSet};
use std::ffi::OsString;
use std::fs;
use std::io;
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};
use std::sync::{Mutex, PoisonError};

use super::search_path::{self, Directories};
use super::{annotation, drop_ins, name};
use crate::files;

/// Where the copies are.
const OWN: &str = search_path::RUNTIME;

/// How every copy begins. The path of the drop-in follows.
const MARK: &str =
    "# containerd-shim-systemd-v1 made this copy, without the settings that break containers, of ";

/// Settings of services that copies don't have, beside those that nobody may set for a container ([`annotation::denied`]).
/// A `*` stands for any end of the name.
const LEFT_OUT: [&str; 28] = [
    "Assert*",
    "BindTo",
    "BindsTo",
    "CollectMode",
    "Condition*",
    "Conflicts",
    "FailureAction",
    "IgnoreOnIsolate",
    "IgnoreSIGPIPE",
    "JobRunningTimeoutSec",
    "JobTimeout*",
    "KeyringMode",
    "Limit*",
    "OOMPolicy",
    "PartOf",
    "PropagatesStopTo",
    "RemoveIPC",
    "Requires*",
    "Requisite*",
    "RuntimeMaxSec",
    "RuntimeRandomizedExtraSec",
    "StopPropagatedFrom",
    "SuccessAction",
    "TimeoutAbortSec",
    "TimeoutSec",
    "TimeoutStartSec",
    "TimeoutStopFailureMode",
    "WatchdogSec",
];

/// Settings that the copies for the daemon don't have either: systemd can't apply some of their values, they would take from
/// the daemon the precedence that its unit gives it, or they would limit the lines of all containers together.
const LEFT_OUT_FOR_DAEMON: [&str; 16] = [
    "BPFProgram",
    "CPUAffinity",
    "CPUScheduling*",
    "CacheDirectory*",
    "ConfigurationDirectory*",
    "IOScheduling*",
    "IPEgressFilterPath",
    "IPIngressFilterPath",
    "LogRateLimit*",
    "LogsDirectory*",
    "NUMA*",
    "Nice",
    "OOMScoreAdjust",
    "RuntimeDirectory*",
    "StateDirectory*",
    "TimerSlackNSec",
];

/// Makes the copies for a unit that is about to be started, and removes those that nothing needs any more. True if this
/// changed a file: a unit that is loaded gets the change with the next reload of systemd.
///
/// # Errors
/// A copy can't be written or removed.
pub fn shield(unit: &str) -> io::Result<bool> {
    shield_in(&Directories::open_all(), unit)
}

/// As [`shield`], with the directories of units.
///
/// # Errors
/// As [`shield`].
pub(super) fn shield_in(search_path: &Directories, unit: &str) -> io::Result<bool> {
    if !unit.ends_with(SERVICE) {
        return Ok(false);
    }
    Shield { search_path, own: Path::new(OWN) }.renew(unit)
}

/// Makes the copies for all units that are loaded, and for the daemon. Removes those that nothing needs any more.
///
/// # Errors
/// As [`shield`].
pub(super) fn shield_loaded(transient: &Path) -> io::Result<()> {
    let names = |dir: &Path| fs::read_dir(dir).into_iter().flatten().flatten().map(|item| item.file_name());
    let names = names(transient).chain(names(Path::new(OWN))).filter_map(|name| name.into_string().ok());
    let ours = names.filter(|name| name.starts_with(name::PREFIX));
    let scope_of = |name: String| {
        let unit = name.strip_suffix(".d").unwrap_or(&name);
        unit.ends_with(SERVICE).then(|| scope(unit).to_owned())
    };
    let mut scopes: BTreeSet<String> = ours.filter_map(scope_of).collect();
    scopes.insert(scope(name::DAEMON_SERVICE).to_owned());
    scopes.into_iter().try_for_each(|scope| shield(&format!("{scope}{SERVICE}")).map(drop))
}

pub(super) const SERVICE: &str = ".service";

/// The part of a unit's name that all containers of its namespace, and their execs, have in common. All of the name for the
/// daemon's own units.
fn scope(unit: &str) -> &str {
    let stem = unit.strip_suffix(SERVICE).unwrap_or(unit);
    let namespace = stem.strip_prefix(name::PREFIX).filter(|_| stem != name::DAEMON);
    let end = namespace.and_then(|rest| rest.find('-')).map(|dash| name::PREFIX.len() + dash + 1);
    end.and_then(|end| stem.get(..end)).unwrap_or(stem)
}

/// Two tasks of this process don't write the same copy at the same time.
static WRITER: Mutex<()> = Mutex::new(());

struct Shield<'p> {
    /// All directories with units.
    search_path: &'p Directories,
    /// The one of them where the copies are.
    own: &'p Path,
}

impl Shield<'_> {
    fn renew(&self, unit: &str) -> io::Result<bool> {
        let scope = scope(unit);
        let dir = self.own.join(format!("{scope}{SERVICE}.d"));
        let copies = self.copies(scope);
        let is_old =
            |path: &PathBuf| is_copy(path) && !path.file_name().is_some_and(|name| copies.contains_key(name));
        let old: Vec<_> = drop_ins::in_dir(&dir).filter(is_old).collect();
        for path in &old {
            remove(path)?;
        }
        if copies.is_empty() {
            // It stays if anything is left in it.
            let _ = old.first().map(|_| fs::remove_dir(&dir));
            return Ok(!old.is_empty());
        }
        let _writer = WRITER.lock().unwrap_or_else(PoisonError::into_inner);
        files::make_dir(&dir, 0o755)?;
        let mut has_changed = !old.is_empty();
        for (name, text) in copies {
            let path = dir.join(&name);
            if files::read_regular(&path, 2 * drop_ins::MAX_BYTES).is_ok_and(|there| there == text) {
                continue;
            }
            // `start` may do the same at this moment.
            let new = dir.join(format!(".{}.{}", name.display(), std::process::id()));
            files::replace(&path, &new, 0o644, &text)?;
            has_changed = true;
        }
        Ok(has_changed)
    }

    /// The copies that the units of the scope need: name and text.
    fn copies(&self, scope: &str) -> BTreeMap<OsString, Vec<u8>> {
        let mut general = BTreeMap::new();
        // systemd's name for the drop-ins for all services.
        for path in self.search_path.drop_ins_for(SERVICE.trim_start_matches('.')) {
            if let Some(name) = path.file_name() {
                general.entry(name.to_owned()).or_insert(path);
            }
        }
        if general.is_empty() {
            return BTreeMap::new();
        }
        // A file of the administrator in a more specific directory already replaces the drop-in.
        for path in self.specific(scope).into_iter().filter(|path| !is_copy(path)) {
            path.file_name().map(|name| general.remove(name));
        }
        let copy = |(name, path): (OsString, PathBuf)| {
            let text = without_harm(&drop_ins::read(&path).ok()?, scope == name::DAEMON)?;
            Some((name, [MARK.as_bytes(), path.as_os_str().as_bytes(), b"\n", &text].concat()))
        };
        general.into_iter().filter_map(copy).collect()
    }

    /// The drop-ins in all directories for the units of a scope, and for the scopes around it.
    fn specific(&self, scope: &str) -> Vec<PathBuf> {
        let prefixes = scope.match_indices('-').filter_map(|(dash, _)| scope.get(..=dash));
        let levels: BTreeSet<&str> = prefixes.chain([scope]).collect();
        levels.iter().flat_map(|level| self.search_path.drop_ins_for(&format!("{level}{SERVICE}"))).collect()
    }
}

pub(super) fn is_copy(path: &Path) -> bool {
    files::read_regular(path, 2 * drop_ins::MAX_BYTES).is_ok_and(|text| text.starts_with(MARK.as_bytes()))
}

fn remove(path: &Path) -> io::Result<()> {
    match fs::remove_file(path) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => Err(error),
        _ => Ok(()),
    }
}

/// The text of a drop-in without the settings that break containers, or the daemon. `None` if it has none of them.
fn without_harm(text: &[u8], is_for_daemon: bool) -> Option<Vec<u8>> {
    let mut kept = Vec::with_capacity(text.len());
    let mut drops = false;
    for (kind, line) in drop_ins::lines(text) {
        if kind == drop_ins::Kind::First {
            drops = is_harmful(line, is_for_daemon);
        }
        if kind == drop_ins::Kind::Comment || !drops {
            kept.extend_from_slice(line);
        }
    }
    (kept.len() < text.len()).then_some(kept)
}

fn is_harmful(line: &[u8], is_for_daemon: bool) -> bool {
    let Some((name, _)) = drop_ins::setting(line) else { return false };
    breaks_containers(&name)
        || (is_for_daemon && LEFT_OUT_FOR_DAEMON.iter().any(|pattern| annotation::matches(pattern, &name)))
}

/// Whether copies don't have a setting of this name.
pub(super) fn breaks_containers(name: &str) -> bool {
    annotation::denied(name).is_some() || LEFT_OUT.iter().any(|pattern| annotation::matches(pattern, name))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn harmless(text: &str) -> Option<String> {
        without_harm(text.as_bytes(), false).map(|text| String::from_utf8(text).unwrap())
    }

    #[test]
    fn settings_that_break_containers_are_left_out() {
        let settings = "ExitType=cgroup PrivatePIDs=yes Type=simple PAMName=login UnsetEnvironment=NOTIFY_SOCKET RuntimeMaxSec=1 \
            StopWhenUnneeded=yes RefuseManualStart=yes RefuseManualStop=yes CollectMode=inactive-or-failed User=nobody \
            NoNewPrivileges=yes PrivateDevices=yes LimitNOFILE=100 ReadOnlyPaths=/ RestrictNamespaces=yes ExecStartPre=false \
            WatchdogSec=1 FailureAction=reboot ConditionPathExists=/no RootDirectory=/x TimeoutStartSec=1 Restart=always \
            Requires=x.service RequiresMountsFor=/x Requisite=x.service BindsTo=x.service PartOf=x.service Conflicts=x.service \
            StopPropagatedFrom=x.service DynamicUser=yes TemporaryFileSystem=/run TimeoutStopFailureMode=abort TimeoutAbortSec=9";
        for setting in settings.split_whitespace() {
            let spaced = format!("  {} \n", setting.replace('=', " = "));
            assert_eq!(harmless(setting).as_deref(), Some(""), "{setting}");
            assert_eq!(harmless(&format!("[Service]\n{spaced}Nice=1")).as_deref(), Some("[Service]\nNice=1"));
        }
    }

    #[test]
    fn settings_that_keep_the_daemon_from_starting_or_slow_it_down_are_left_out_for_it_alone() {
        let text = "NUMAPolicy=bind\nNUMAMask=7\nNice=19\nCPUSchedulingPolicy=idle\nOOMScoreAdjust=500\nRuntimeDirectory=foo\n\
            BPFProgram=egress:/no\nIPIngressFilterPath=/no\nLogRateLimitBurst=5\nUMask=0";
        assert_eq!(harmless(text), None);
        assert_eq!(without_harm(text.as_bytes(), true).as_deref(), Some(&b"UMask=0"[..]));
    }

    #[test]
    fn other_settings_need_no_copy() {
        for text in [
            "",
            "[Service]\n#PrivateDevices=yes\n; User=nobody\n",
            "[Unit]\nOnFailure=alert@%n.service\n[Service]\nMemoryMax=1G\nUMask=0077\nTimeoutStopSec=9\n",
            "[Unit]\nDescription=a \\\nType=simple\n",
        ] {
            assert_eq!(harmless(text), None, "{text}");
        }
    }

    #[test]
    fn a_setting_is_left_out_with_the_lines_that_continue_it() {
        let text =
            "SystemCallFilter=a \\\n# comment\n ; other\n  b=c \\\nd\nNice=5\nType=oneshot\\\\\nUMask=0";
        assert_eq!(harmless(text).as_deref(), Some("# comment\n ; other\nNice=5\nUMask=0"));
    }

    #[test]
    fn units_of_a_namespace_have_a_scope_in_common() {
        let scopes = [
            ("containerd-default-web-1.service", "containerd-default-"),
            ("containerd-a\\x2db-web:exec-1.service", "containerd-a\\x2db-"),
            ("containerd-shim-web.service", "containerd-shim-"),
            (name::DAEMON_SERVICE, name::DAEMON),
            ("containerd_shim-wake.service", "containerd_shim-wake"),
            ("containerd-web.service", "containerd-web"),
        ];
        for (unit, expected) in scopes {
            assert_eq!(scope(unit), expected);
        }
    }

    /// Directories of units, in which `own` is the middle one.
    struct Units(tempfile::TempDir);

    impl Units {
        fn path(&self, path: &str) -> PathBuf {
            self.0.path().join(path)
        }

        fn write(&self, path: &str, text: &str) {
            fs::create_dir_all(self.path(path).parent().unwrap()).unwrap();
            fs::write(self.path(path), text).unwrap();
        }

        fn renew(&self) -> bool {
            let dirs = ["etc", "run", "usr"].map(|dir| self.path(dir));
            Shield { search_path: &Directories::open(dirs), own: &self.path("run") }
                .renew("containerd-default-web.service")
                .unwrap()
        }

        /// The copy of a drop-in, without its first line.
        fn copy(&self, name: &str) -> Option<String> {
            let text =
                fs::read_to_string(self.path(&format!("run/containerd-default-.service.d/{name}"))).ok()?;
            let (mark, text) = text.split_once('\n').unwrap();
            assert!(mark.starts_with(MARK) && mark.ends_with(&format!("service.d/{name}")), "{mark}");
            Some(text.to_owned())
        }
    }

    fn units() -> Units {
        Units(tempfile::tempdir().unwrap())
    }

    #[test]
    fn only_harmful_drop_ins_are_copied_and_only_when_they_change() {
        let units = units();
        assert!(!units.renew() && !units.path("run").exists());
        units.write("usr/service.d/good.conf", "[Service]\nNice=1\n");
        units.write("usr/service.d/bad.conf", "[Service]\nType=simple\nNice=2\n");
        units.write("etc/service.d/bad.conf.bak", "Type=simple");
        assert!(units.renew());
        assert_eq!(units.copy("bad.conf").as_deref(), Some("[Service]\nNice=2\n"));
        assert_eq!(fs::read_dir(units.path("run/containerd-default-.service.d")).unwrap().count(), 1);
        assert!(!units.renew());
        // A directory that wins has another drop-in of this name.
        units.write("etc/service.d/bad.conf", "[Service]\nUser=x\nNice=3\n");
        assert!(units.renew());
        assert_eq!(units.copy("bad.conf").as_deref(), Some("[Service]\nNice=3\n"));
    }

    #[test]
    fn a_copy_goes_with_its_drop_in() {
        let units = units();
        units.write("etc/service.d/bad.conf", "Type=simple");
        units.write("usr/service.d/bad.conf", "Type=oneshot\nNice=1");
        units.renew();
        assert_eq!(units.copy("bad.conf").as_deref(), Some(""));
        fs::remove_file(units.path("etc/service.d/bad.conf")).unwrap();
        std::os::unix::fs::symlink("/dev/null", units.path("etc/service.d/bad.conf")).unwrap();
        assert!(units.renew());
        assert!(!units.path("run/containerd-default-.service.d").exists());
        assert!(!units.renew());
    }

    #[test]
    fn what_the_administrator_has_set_for_these_units_stays() {
        for level in ["containerd-default-.service.d", "containerd-.service.d"] {
            for dir in ["etc", "run", "usr"] {
                let units = units();
                units.write("etc/service.d/bad.conf", "Type=simple");
                let own = format!("{dir}/{level}/bad.conf");
                units.write(&own, "[Service]\nRuntimeMaxSec=5\n");
                assert!(!units.renew());
                assert_eq!(fs::read_to_string(units.path(&own)).unwrap(), "[Service]\nRuntimeMaxSec=5\n");
            }
        }
    }
}
