//! Why systemd has not run the command of a unit (pure, but for the drop-ins that it reads).
//!
//! An administrator can keep units from starting, usually without meaning containers: by a condition or an assertion in a
//! drop-in, by a command that runs before, or by a setting that systemd can't apply. The OCI runtime never ran then, and has
//! nothing to say.

use std::path::{Path, PathBuf};

use super::main_process::Command;
use super::{drop_ins, policy};

/// A condition or an assertion of a unit: the setting's name, whether one of several is enough (`|`), whether it is negated
/// (`!`), its parameter, and its result (negative: not met).
pub(super) type Condition = (String, bool, bool, String, i32);

/// What systemd says of a unit that did not run its command.
#[derive(Debug, Default)]
pub(super) struct Facts {
    /// The unit.
    pub(super) unit: String,
    /// `loaded`, `not-found`, `bad-setting`, `masked`, …
    pub(super) load_state: String,
    /// `active`, `failed`, …
    pub(super) active_state: String,
    /// `Condition…=`
    pub(super) conditions: Vec<Condition>,
    /// `Assert…=`
    pub(super) assertions: Vec<Condition>,
    /// The result of a service: `exit-code`, `timeout`, …
    pub(super) result: String,
    /// The commands of a service, with the names of their settings, in the order in which they run.
    pub(super) commands: Vec<(&'static str, Vec<Command>)>,
    /// The files of the unit.
    pub(super) files: Vec<PathBuf>,
    /// The units without which it does not start.
    pub(super) needs: Vec<String>,
}

impl Facts {
    /// Why a unit of whom these are the facts did not run its command. `None` if they don't say.
    pub(super) fn obstacle(&self) -> Option<String> {
        self.unmet(&self.conditions)
            .or_else(|| self.unmet(&self.assertions))
            .or_else(|| self.failed_command())
            .or_else(|| {
                let reason = match self.result.as_str() {
                    "timeout" => "it did not start in time (TimeoutStartSec=)",
                    "resources" => {
                        "systemd could not prepare it (result \"resources\"), for example because a file that a setting names is missing"
                    }
                    "start-limit-hit" => "it was started too often (StartLimitBurst=)",
                    _ => return None,
                };
                let (unit, settings) = (&self.unit, self.settings());
                Some(format!("systemd has not started {unit}: {reason}{settings}; see journalctl -u {unit}"))
            })
    }

    /// As [`Self::obstacle`], for a unit that another unit needs.
    pub(super) fn obstacle_for_others(&self) -> Option<String> {
        let unit = &self.unit;
        match self.load_state.as_str() {
            "" | "loaded" => {}
            state => return Some(format!("systemd can't start {unit}, which is {state}")),
        }
        let failed = || {
            (self.active_state == "failed").then(|| format!("{unit} has failed; see systemctl status {unit}"))
        };
        // A condition of another unit that is not met does not matter.
        self.unmet(&self.assertions).or_else(failed)
    }

    fn unmet(&self, all: &[Condition]) -> Option<String> {
        let is_unmet = |(.., result): &&Condition| *result < 0;
        let mut needed = all.iter().filter(|(_, is_trigger, ..)| !is_trigger);
        let triggers = || all.iter().filter(|(_, is_trigger, ..)| *is_trigger);
        let has_trigger = triggers().any(|(.., result)| *result > 0);
        let found = needed.find(is_unmet).or_else(|| triggers().find(is_unmet).filter(|_| !has_trigger));
        let (name, is_trigger, is_negated, parameter, _) = found?;
        let (trigger, not) = (if *is_trigger { "|" } else { "" }, if *is_negated { "!" } else { "" });
        let unit = &self.unit;
        let place = self.file_with(name, parameter).map(|file| format!(" in {}", file.display()));
        let place = place.unwrap_or_default();
        Some(format!("systemd has not started {unit}: {name}={trigger}{not}{parameter}{place} is not met"))
    }

    /// The file with a setting: the last one, which is the one that counts.
    fn file_with(&self, name: &str, parameter: &str) -> Option<&Path> {
        let has = |file: &&PathBuf| {
            let text = drop_ins::read(file).unwrap_or_default();
            let mut settings = drop_ins::settings(&text).into_iter();
            settings.any(|(found, value)| found == name && value.ends_with(parameter))
        };
        self.files.iter().rev().find(has).map(PathBuf::as_path)
    }

    fn failed_command(&self) -> Option<String> {
        let mut ended =
            self.commands.iter().flat_map(|(setting, all)| all.iter().map(move |command| (setting, command)));
        let (setting, (path, .., code, status)) =
            ended.find(|(_, (_, _, is_ignored, .., code, status))| {
                let has_failed = *code != 0 && (*code, *status) != (1, 0);
                // systemd ignores the exit code of a command, and the step that it could not carry out before.
                has_failed && (!is_ignored || name_of_step(*status).is_some())
            })?;
        let unit = &self.unit;
        let how = match (code, name_of_step(*status)) {
            (1, Some(step)) => {
                let settings = self.settings();
                return Some(format!(
                    "systemd could not prepare the command of {setting}= in {unit}: step {step} failed (exit code {status}){settings}; see \
                     journalctl -u {unit}"
                ));
            }
            (1, None) => format!("ended with code {status}"),
            _ => format!("was ended by signal {status}"),
        };
        let place =
            self.file_with(setting, "").map(|file| format!(" in {}", file.display())).unwrap_or_default();
        // The command is this program's, and settings may restrict it.
        let hint = if *setting == "ExecStart" { self.settings() } else { String::new() };
        Some(format!("systemd has not started {unit}: the command {path} of {setting}={place} {how}{hint}"))
    }

    /// The settings of the drop-ins, as a hint.
    fn settings(&self) -> String {
        let drop_ins = self.files.iter().filter(|file| file.extension().is_some_and(|end| end == "conf"));
        policy::settings_of_all(drop_ins)
            .map(|all| format!("; it may be because of {all}"))
            .unwrap_or_default()
    }
}

/// The step that systemd could not carry out before it executed a command, by the exit code that stands for it
/// (systemd.exec(5), "Process Exit Codes").
fn name_of_step(code: i32) -> Option<&'static str> {
    const FIRST: i32 = 200;
    const STEPS: [&str; 46] = [
        "CHDIR",
        "NICE",
        "FDS",
        "EXEC",
        "MEMORY",
        "LIMITS",
        "OOM_ADJUST",
        "SIGNAL_MASK",
        "STDIN",
        "STDOUT",
        "CHROOT",
        "IOPRIO",
        "TIMERSLACK",
        "SECUREBITS",
        "SETSCHEDULER",
        "CPUAFFINITY",
        "GROUP",
        "USER",
        "CAPABILITIES",
        "CGROUP",
        "SETSID",
        "CONFIRM",
        "STDERR",
        "",
        "PAM",
        "NETWORK",
        "NAMESPACE",
        "NO_NEW_PRIVILEGES",
        "SECCOMP",
        "SELINUX_CONTEXT",
        "PERSONALITY",
        "APPARMOR_PROFILE",
        "ADDRESS_FAMILIES",
        "RUNTIME_DIRECTORY",
        "",
        "CHOWN",
        "SMACK_PROCESS_LABEL",
        "KEYRING",
        "STATE_DIRECTORY",
        "CACHE_DIRECTORY",
        "LOGS_DIRECTORY",
        "CONFIGURATION_DIRECTORY",
        "NUMA_POLICY",
        "CREDENTIALS",
        "",
        "BPF",
    ];
    let place = usize::try_from(code.checked_sub(FIRST)?).ok()?;
    STEPS.get(place).copied().filter(|step| !step.is_empty())
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::fs;

    fn condition(name: &str, is_trigger: bool, parameter: &str, result: i32) -> Condition {
        (name.to_owned(), is_trigger, false, parameter.to_owned(), result)
    }

    fn command(path: &str, code: i32, status: i32) -> Command {
        (path.to_owned(), Vec::new(), false, 0, 0, 0, 0, 7, code, status)
    }

    fn facts() -> Facts {
        Facts { unit: "a.service".to_owned(), load_state: "loaded".to_owned(), ..Facts::default() }
    }

    #[test]
    fn an_unmet_condition_is_named_with_its_file() {
        let dir = tempfile::tempdir().unwrap();
        let files = ["first.conf", "second.conf", "third.conf"].map(|name| dir.path().join(name));
        fs::write(&files[0], "[Unit]\nConditionPathExists=/no\n").unwrap();
        fs::write(&files[1], "[Unit]\n ConditionPathExists = \\\n!/no\n").unwrap();
        fs::write(&files[2], "[Unit]\nAssertPathExists=/no\nConditionPathExists=/other\n#\\\nDescription=\\\nConditionPathExists=/no\n").unwrap();
        let mut unmet = condition("ConditionPathExists", false, "/no", -1);
        unmet.2 = true;
        let conditions = vec![condition("ConditionPathExists", false, "/other", 1), unmet];
        let facts = Facts { conditions, files: files.to_vec(), ..facts() };
        let expected = format!(
            "systemd has not started a.service: ConditionPathExists=!/no in {} is not met",
            files[1].display()
        );
        assert_eq!(facts.obstacle(), Some(expected));
    }

    #[test]
    fn one_of_several_triggers_is_enough() {
        let triggers = |second| {
            let all = [condition("AssertUser", true, "a", -1), condition("AssertUser", true, "b", second)];
            Facts { assertions: all.to_vec(), ..facts() }.obstacle()
        };
        assert_eq!(triggers(1), None);
        assert_eq!(triggers(-1).unwrap(), "systemd has not started a.service: AssertUser=|a is not met");
    }

    #[test]
    fn a_condition_of_a_unit_that_is_needed_does_not_matter_and_an_assertion_does() {
        let unmet = |name| vec![condition(name, false, "x", -1)];
        let conditions = Facts { conditions: unmet("ConditionHost"), ..facts() };
        assert_eq!(conditions.obstacle_for_others(), None);
        let assertions = Facts { assertions: unmet("AssertHost"), ..facts() };
        assert!(assertions.obstacle_for_others().unwrap().contains("AssertHost=x"));
        let masked = Facts { load_state: "masked".to_owned(), ..facts() };
        assert_eq!(masked.obstacle_for_others().unwrap(), "systemd can't start a.service, which is masked");
    }

    #[test]
    fn the_first_command_that_failed_is_named() {
        let commands = vec![
            ("ExecStartPre", vec![command("/bin/true", 1, 0), command("/bin/false", 1, 1)]),
            ("ExecStart", vec![command("/bin/shim", 0, 0)]),
        ];
        let facts = Facts { commands, ..facts() };
        assert_eq!(
            facts.obstacle().unwrap(),
            "systemd has not started a.service: the command /bin/false of ExecStartPre= ended with code 1"
        );
    }

    #[test]
    fn a_step_of_a_command_whose_failure_is_ignored_is_named_and_the_failure_is_not() {
        let of = |status| {
            let mut ignored = command("/bin/shim", 1, status);
            ignored.2 = true;
            Facts { commands: vec![("ExecStart", vec![ignored])], ..facts() }.obstacle()
        };
        assert!(of(217).unwrap().contains("step USER failed"));
        assert_eq!(of(3), None);
    }

    #[test]
    fn a_step_that_systemd_could_not_carry_out_has_a_name() {
        let commands = vec![("ExecStart", vec![command("/bin/shim", 1, 226)])];
        let dir = tempfile::tempdir().unwrap();
        let drop_in = dir.path().join("y.conf");
        fs::write(&drop_in, "[Service]\nBindPaths=/no/such\n").unwrap();
        let files = vec!["/run/x.service".into(), drop_in.clone()];
        let text = Facts { commands, files, ..facts() }.obstacle().unwrap();
        assert!(text.contains("step NAMESPACE failed (exit code 226)"), "{text}");
        let setting =
            format!("; it may be because of BindPaths=/no/such in {}; see journalctl", drop_in.display());
        assert!(text.contains(&setting), "{text}");
        assert_eq!(name_of_step(217), Some("USER"));
        assert_eq!(name_of_step(245), Some("BPF"));
        assert_eq!([199, 223, 246, i32::MIN].map(name_of_step), [None; 4]);
    }

    #[test]
    fn facts_that_say_nothing_are_no_obstacle() {
        assert_eq!(facts().obstacle(), None);
        assert_eq!(facts().obstacle_for_others(), None);
    }
}
