//! Reads limits from the files of a cgroup, and writes them.

use std::collections::BTreeMap;
use std::fs;
use std::path::Path;

use crate::path_error::io_error;
use crate::task::limits::{Attribute, Limits};

use super::format::flat;
use super::{Error, dir, is_gone};

/// The limits of a cgroup, none if it does not exist.
///
/// # Errors
/// A file can't be read.
pub fn read(cgroup: &Path) -> Result<Limits, Error> {
    let read = |attribute: Attribute| {
        let text = file(cgroup, attribute.file()).transpose()?;
        Some(text.map(|text| (attribute, text.trim_end().to_owned())))
    };
    Attribute::ALL.into_iter().filter_map(read).collect()
}

/// The file with the CPU time that a cgroup may save up, in microseconds.
pub const CPU_BURST: &str = "cpu.max.burst";

/// Whether a cgroup may save up CPU time below its quota, and use the time in a burst (`cpu.max.burst`, kernel 5.14).
///
/// # Errors
/// The file can't be read.
pub fn has_cpu_burst(cgroup: &Path) -> Result<bool, Error> {
    Ok(file(cgroup, CPU_BURST)?.is_some_and(|burst| burst.trim_end() != "0"))
}

/// Sets limits of a cgroup, in the form that [`read`] returns. Does nothing if the cgroup does not exist.
///
/// # Errors
/// The kernel refused a limit; the limits before it are set.
pub fn write(cgroup: &Path, limits: &Limits) -> Result<(), Error> {
    let dir = dir(cgroup);
    let is_idle = limits.get(Attribute::CpuIdle) == Some("1");
    for (attribute, value) in limits.iter() {
        let path = dir.join(attribute.file());
        let written = match attribute {
            Attribute::CpuWeight if is_idle => Ok(()),
            Attribute::IoMax => fs::read_to_string(&path)
                .and_then(|had| io_max(&had, value).iter().try_for_each(|line| fs::write(&path, line))),
            Attribute::IoWeight => value.lines().try_for_each(|line| fs::write(&path, line)),
            // With an empty value and no newline, nothing would be written.
            _ => fs::write(&path, format!("{value}\n")),
        };
        match written {
            Err(e) if is_gone(&e) => {}
            written => written.map_err(io_error("write", &path))?,
        }
    }
    Ok(())
}

/// The lines that change `io.max` from `had` to `wanted`: the kernel takes one device per write, and removes a
/// device's limits only if all of them are set to `max`.
pub fn io_max(had: &str, wanted: &str) -> Vec<String> {
    fn by_device(text: &str) -> BTreeMap<&str, &str> {
        text.lines().filter_map(|line| line.split_once(' ')).collect()
    }
    let (had, wanted) = (by_device(had), by_device(wanted));
    let gone = had.keys().filter(|device| !wanted.contains_key(*device));
    let gone = gone.map(|device| format!("{device} rbps=max wbps=max riops=max wiops=max"));
    let new = wanted.iter().filter(|(device, limits)| had.get(*device) != Some(limits));
    gone.chain(new.map(|(device, limits)| format!("{device} {limits}"))).collect()
}

/// Whether a cgroup is frozen. `None` if it does not exist or is in transition: the kernel thaws a killed process
/// briefly while `cgroup.freeze` is still 1.
///
/// # Errors
/// A file can't be read.
pub fn is_frozen(cgroup: &Path) -> Result<Option<bool>, Error> {
    let Some(events) = file(cgroup, "cgroup.events")? else {
        return Ok(None);
    };
    if number(&events, "frozen") == Some(1) {
        return Ok(Some(true));
    }
    let parent = cgroup.parent().map(|parent| file(parent, "cgroup.freeze")).transpose()?.flatten();
    // Read last: systemd may remove a cgroup at any moment, and removes the one above it later.
    let Some(own) = file(cgroup, "cgroup.freeze")? else {
        return Ok(None);
    };
    let in_transition = [Some(own), parent].into_iter().flatten().any(|asked| asked.trim() == "1");
    Ok((!in_transition).then_some(false))
}

/// The text of a file. `None` if the cgroup does not exist, its controller is off, or the kernel is too old.
fn file(cgroup: &Path, name: &str) -> Result<Option<String>, Error> {
    let path = dir(cgroup).join(name);
    match fs::read_to_string(&path) {
        Ok(text) => Ok(Some(text)),
        Err(e) if is_gone(&e) => Ok(None),
        Err(e) => Err(io_error("read", &path)(e).into()),
    }
}

fn number(text: &str, key: &str) -> Option<u64> {
    flat(text).find(|(found, _)| *found == key).map(|(_, number)| number)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cgroup::fake;

    #[test]
    fn limits_of_a_device_that_is_no_longer_limited_are_removed() {
        let had = "8:0 rbps=1 wbps=max riops=max wiops=max\n8:16 rbps=2 wbps=max riops=max wiops=max";
        let wanted = "8:16 rbps=2 wbps=max riops=max wiops=max\n8:32 rbps=max wbps=3 riops=max wiops=max";
        assert_eq!(
            io_max(had, wanted),
            ["8:0 rbps=max wbps=max riops=max wiops=max", "8:32 rbps=max wbps=3 riops=max wiops=max"]
        );
        assert!(io_max(had, had).is_empty());
    }

    #[test]
    fn a_cgroup_that_disappears_after_its_process_was_killed_is_not_thawed() {
        let cgroup = Path::new("/killed-while-frozen/container");
        fake::make(cgroup);
        assert_eq!(is_frozen(cgroup).unwrap(), Some(false));
        fs::write(dir(cgroup).join("cgroup.freeze"), "1\n").unwrap();
        assert_eq!(is_frozen(cgroup).unwrap(), None);
        // The files of a cgroup disappear one after the other.
        fs::remove_file(dir(cgroup).join("cgroup.freeze")).unwrap();
        assert_eq!(is_frozen(cgroup).unwrap(), None);
    }

    #[test]
    fn a_key_is_not_taken_for_another_that_begins_like_it() {
        let events = "low 0\noom 3\noom_kill 2\noom_group_kill 1\n";
        assert_eq!(number(events, "oom"), Some(3));
        assert_eq!(number(events, "oom_kill"), Some(2));
        assert_eq!(number("populated 1\nfrozen 0\n", "frozen"), Some(0));
        assert_eq!(number("", "frozen"), None);
    }
}
