//! Fuzz targets for device rules and limits of a container. They compare the shim with models of runc, systemd and the
//! kernel, which apply these rules and limits.

use std::collections::{BTreeMap, BTreeSet};

use zbus::Variant;

use crate::cgroup::{format, limits as files};
use crate::oci::devices;
use crate::oci::resources::{DeviceRule, Resources, cpuset};
use crate::task::limits::{Attribute, Limits};
use crate::task::request::DeviceAllow;
use crate::unit::limits as properties;
use crate::unit::properties::Properties;

/// Target: `linux.resources` with device rules.
pub(super) fn devices(data: &[u8]) {
    let Ok(resources) = Resources::parse(data) else { return };
    if resources.check().is_ok() && resources.devices.len() <= 32 {
        check_devices(&resources.devices);
    }
}

/// Checks that the unit allows every device that runc allows.
pub(super) fn check_devices(rules: &[DeviceRule]) {
    let Some(own) = devices::allowed(rules) else { return };
    let all = devices::with_defaults(&own);
    for (at, entry) in all.iter().enumerate() {
        assert!(
            all.iter().skip(at + 1).all(|other| other.device != entry.device),
            "{} is there twice",
            entry.device
        );
        assert!(
            !entry.access.is_empty() && entry.access.chars().all(|letter| "rwm".contains(letter)),
            "{entry:?}"
        );
    }
    let numbers = |of: fn(&DeviceRule) -> Option<i64>| -> BTreeSet<i64> {
        let named = rules.iter().filter_map(of).flat_map(|number| [number, number.saturating_add(1)]);
        named.chain([0, 1, 2, 3, 5, 9, 10, 136, 200]).filter(|number| (0..1 << 20).contains(number)).collect()
    };
    let (majors, minors) = (numbers(|rule| rule.major), numbers(|rule| rule.minor));
    for kind in ["b", "c"] {
        for major in majors.iter().filter(|major| **major < 1 << 12) {
            for minor in &minors {
                for access in ["r", "w", "m", "rw", "rm", "wm", "rwm"] {
                    if runc_allows(rules, kind, *major, *minor, access) {
                        let allowed =
                            all.iter().any(|entry| systemd_allows(entry, kind, *major, *minor, access));
                        assert!(allowed, "{kind} {major}:{minor} {access} of {rules:?} is not in {all:?}");
                    }
                }
            }
        }
    }
}

/// runc's default devices (libcontainer/specconv, `AllowedDevices`): type, major, minor, access; -1 for all.
const ALWAYS: [(&str, i64, i64, &str); 12] = [
    ("c", -1, -1, "m"),
    ("b", -1, -1, "m"),
    ("c", 1, 3, "rwm"),
    ("c", 1, 8, "rwm"),
    ("c", 1, 7, "rwm"),
    ("c", 5, 0, "rwm"),
    ("c", 1, 5, "rwm"),
    ("c", 1, 9, "rwm"),
    ("c", 136, -1, "rwm"),
    ("c", 5, 2, "rwm"),
    ("c", 10, 200, "rwm"),
    ("c", 5, 1, "rwm"),
];

/// A model of the filter that runc makes of rules (libcontainer/cgroups/devices, the emulator of cgroup v1): a default, and
/// exceptions from the default by type and numbers.
fn runc_allows(rules: &[DeviceRule], kind: &str, major: i64, minor: i64, access: &str) -> bool {
    let always = ALWAYS.map(|(kind, major, minor, access)| DeviceRule {
        allow: true,
        kind: kind.to_owned(),
        major: Some(major),
        minor: Some(minor),
        access: access.to_owned(),
    });
    let mut allows_all = false;
    let mut exceptions: BTreeMap<(String, i64, i64), String> = BTreeMap::new();
    for rule in rules.iter().chain(&always) {
        if ["", "a"].contains(&rule.kind.as_str()) {
            (allows_all, exceptions) = (rule.allow, BTreeMap::new());
            continue;
        }
        let number = |number: Option<i64>| number.unwrap_or(-1).max(-1);
        let device = (rule.kind.clone(), number(rule.major), number(rule.minor));
        let letters = exceptions.entry(device).or_default();
        if rule.allow == allows_all {
            letters.retain(|letter| !rule.access.contains(letter));
        } else {
            letters.push_str(&rule.access);
        }
    }
    let found = exceptions.iter().any(|((of, one, other), letters)| {
        let matches = |number: i64, is: i64| number == -1 || number == is;
        let mut wanted = access.chars();
        // An exception that allows must cover the whole access. An exception that denies need only cover a part of it.
        let counts = if allows_all {
            wanted.any(|letter| letters.contains(letter))
        } else {
            wanted.all(|letter| letters.contains(letter))
        };
        of == kind && matches(*one, major) && matches(*other, minor) && counts
    });
    found != allows_all
}

/// A model of how systemd reads one `DeviceAllow=` (bpf-devices.c).
fn systemd_allows(entry: &DeviceAllow, kind: &str, major: i64, minor: i64, access: &str) -> bool {
    let word = if kind == "b" { "block" } else { "char" };
    let device = entry.device.as_str();
    let is_it = device == format!("/dev/{word}/{major}:{minor}")
        || device == format!("{word}-{major}")
        || device == format!("{word}-*");
    is_it && access.chars().all(|letter| entry.access.contains(letter))
}

/// Target: a list of processors.
pub(super) fn processors(data: &[u8]) {
    let Ok(list) = std::str::from_utf8(data) else { return };
    check_processors(list);
}

/// Checks that the shim refuses no list that some kernel can parse, and that a kernel with many processors can parse every
/// list that the shim accepts.
pub(super) fn check_processors(list: &str) {
    let is_accepted = cpuset::wrong(list).is_none();
    let kernel = |last: u64| parselist(list.as_bytes(), last).is_some();
    if (0..64).chain([u64::from(u32::MAX)]).any(kernel) {
        assert!(is_accepted, "a kernel can parse {list:?}");
    }
    if is_accepted && !list.contains('N') {
        assert!(kernel(u64::from(u32::MAX)), "no kernel can parse {list:?}");
    }
}

/// A model of the kernel's `bitmap_parselist` (lib/bitmap-str.c). `last` is the last bit.
fn parselist(text: &[u8], last: u64) -> Option<()> {
    let at = |at: usize| text.get(at).copied().unwrap_or_default();
    let is_end = |c: u8| c == 0 || c == b'\n';
    let is_between = |c: u8| matches!(c, b' ' | b'\t'..=b'\r' | 0xa0 | b',');
    let number = |from: usize| -> Option<(u64, usize)> {
        if at(from) == b'N' {
            return Some((last, from + 1));
        }
        let digits = text.iter().skip(from).take_while(|c| c.is_ascii_digit()).count();
        let text = std::str::from_utf8(text.get(from..from + digits)?).ok()?;
        Some((text.parse().ok().filter(|number| *number <= u64::from(u32::MAX))?, from + digits))
    };
    let mut here = 0;
    loop {
        while is_between(at(here)) {
            here += 1;
        }
        if is_end(at(here)) {
            return Some(());
        }
        let is_all = text.get(here..here + 3).is_some_and(|word| word.eq_ignore_ascii_case(b"all"));
        let (start, mut end) = if is_all { (0, here + 3) } else { number(here)? };
        let mut stop = if is_all { last } else { start };
        let is_over = |here: usize| is_end(at(here)) || is_between(at(here));
        let mut may_have_pattern = is_all;
        if !is_all && !is_over(end) {
            if at(end) != b'-' {
                return None;
            }
            (stop, end) = number(end + 1)?;
            may_have_pattern = true;
        }
        let (mut used, mut of) = (1, 1);
        let has_pattern = may_have_pattern && !is_over(end);
        if has_pattern {
            if at(end) != b':' {
                return None;
            }
            (used, end) = number(end + 1)?;
            if at(end) != b'/' {
                return None;
            }
            (of, end) = number(end + 1)?;
        }
        if start > stop || of == 0 || used > of || stop > last {
            return None;
        }
        if !has_pattern && is_end(at(end)) {
            return Some(());
        }
        here = end;
    }
}

/// Target: limits. Each line has the name of a file, a blank, and the content of the file with `;` for a line break.
pub(super) fn limits(data: &[u8]) {
    let Ok(text) = std::str::from_utf8(data) else { return };
    let line = |line: &str| {
        let (name, value) = line.split_once(' ')?;
        let attribute = Attribute::ALL.into_iter().find(|attribute| attribute.file() == name)?;
        Some((attribute, value.replace(';', "\n")))
    };
    let limits: Limits = text.lines().filter_map(line).collect();
    check_limits(&limits);
    for (_, value) in limits.iter() {
        let _ = (format::number(value), format::flat(value).count());
        format::nested(value).for_each(|(_, pairs)| assert!(pairs.count() <= value.len()));
        check_devices_limits(value, limits.get(Attribute::IoMax).unwrap_or_default());
        check_devices_limits("", value);
    }
}

/// Checks that the files which systemd writes for properties are read as the same properties again.
pub(super) fn check_limits(limits: &Limits) -> Limits {
    let written = systemd_writes(&properties::properties(limits));
    assert_eq!(systemd_writes(&properties::properties(&written)), written, "{limits:?}");
    written
}

/// A model of what systemd writes to the files of a cgroup for properties (cgroup.c).
fn systemd_writes(properties: &Properties) -> Limits {
    let get = |name: &str| {
        properties.all().iter().rfind(|(known, _)| *known == name).map(|(_, value)| value.clone())
    };
    let number = |name: &str| {
        get(name).map(|value| u64::try_from(value).unwrap_or_else(|_| panic!("{name} is no u64")))
    };
    let or_max = |number: u64| if number == u64::MAX { "max".to_owned() } else { number.to_string() };
    let plain = [
        ("MemoryMin", Attribute::MemoryMin),
        ("MemoryLow", Attribute::MemoryLow),
        ("MemoryHigh", Attribute::MemoryHigh),
        ("MemoryMax", Attribute::MemoryMax),
        ("MemorySwapMax", Attribute::MemorySwapMax),
        ("TasksMax", Attribute::Pids),
    ];
    let mut files: Vec<(Attribute, String)> = Vec::new();
    for (name, attribute) in plain {
        files.extend(number(name).map(|number| (attribute, or_max(number))));
    }
    files.extend(number("CPUWeight").map(|weight| match weight {
        0 => (Attribute::CpuIdle, "1".to_owned()),
        weight => (Attribute::CpuWeight, weight.to_string()),
    }));
    files.extend(number("IOWeight").map(|weight| (Attribute::IoWeight, format!("default {weight}"))));
    if let Some((quota, period)) = number("CPUQuotaPerSecUSec").zip(number("CPUQuotaPeriodUSec")) {
        let period = if period == u64::MAX { 100_000 } else { period };
        let quota = match quota {
            u64::MAX => "max".to_owned(),
            quota => {
                // At a reload, systemd reads what it has written: whole percents.
                assert_eq!(quota % 10_000, 0, "{quota}");
                (u128::from(quota) * u128::from(period) / 1_000_000).to_string()
            }
        };
        files.push((Attribute::CpuMax, format!("{quota} {period}")));
    }
    for (name, attribute) in
        [("AllowedCPUs", Attribute::Cpus), ("AllowedMemoryNodes", Attribute::MemoryNodes)]
    {
        let bytes =
            get(name).map(|value| Vec::<u8>::try_from(value).unwrap_or_else(|_| panic!("{name} is no ay")));
        files.extend(bytes.map(|bytes| (attribute, ranges(&bytes))));
    }
    files.extend(devices_limits(&get).map(|text| (Attribute::IoMax, text)));
    files.into_iter().collect()
}

/// A model of what systemd writes to `io.max`, with a line for each device.
fn devices_limits(get: &impl Fn(&str) -> Option<Variant<'static>>) -> Option<String> {
    let names = ["IOReadBandwidthMax", "IOWriteBandwidthMax", "IOReadIOPSMax", "IOWriteIOPSMax"];
    let mut devices: BTreeMap<String, [Option<u64>; 4]> = BTreeMap::new();
    for (at, name) in names.into_iter().enumerate() {
        let list = Vec::<(String, u64)>::try_from(get(name)?);
        for (device, limit) in list.unwrap_or_else(|_| panic!("{name} is no a(st)")) {
            if let Some(slot) = devices.entry(device).or_default().get_mut(at) {
                *slot = Some(limit);
            }
        }
    }
    let line = |(device, limits): (String, [Option<u64>; 4])| {
        let device = device.strip_prefix("/dev/block/").unwrap_or(&device).to_owned();
        let [rbps, wbps, riops, wiops] =
            limits.map(|limit| limit.map_or_else(|| "max".to_owned(), |limit| limit.to_string()));
        format!("{device} rbps={rbps} wbps={wbps} riops={riops} wiops={wiops}")
    };
    Some(devices.into_iter().map(line).collect::<Vec<_>>().join("\n"))
}

/// A set of bits in the format in which the kernel shows it.
pub(super) fn ranges(bytes: &[u8]) -> String {
    let is_set = |bit: usize| bytes.get(bit / 8).is_some_and(|byte| byte & (1 << (bit % 8)) != 0);
    let mut ranges = Vec::new();
    let mut bit = 0;
    while bit < bytes.len() * 8 {
        let length = (bit..bytes.len() * 8).take_while(|bit| is_set(*bit)).count();
        match length {
            0 => {}
            1 => ranges.push(bit.to_string()),
            _ => ranges.push(format!("{bit}-{}", bit + length - 1)),
        }
        bit += length + 1;
    }
    ranges.join(",")
}

/// Checks that the lines, written one after the other, change `io.max` from the first content to the second.
pub(super) fn check_devices_limits(had: &str, wanted: &str) {
    type File<'t> = BTreeMap<&'t str, &'t str>;
    const NONE: &str = "rbps=max wbps=max riops=max wiops=max";
    fn file(text: &str) -> File<'_> {
        text.lines().filter_map(|line| line.split_once(' ')).collect()
    }
    let lines = files::io_max(had, wanted);
    let mut now = file(had);
    for line in &lines {
        if let Some((device, limits)) = line.split_once(' ') {
            now.insert(device, limits);
        }
    }
    now.retain(|_, limits| *limits != NONE);
    let mut then = file(wanted);
    then.retain(|_, limits| *limits != NONE);
    assert_eq!(now, then, "from {had:?} by {lines:?}");
}
