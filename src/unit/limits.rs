//! Limits of a container as properties of its unit (pure).

use zbus::Variant;

use crate::task::limits::{Attribute, Limits};

use super::properties::Properties;

/// Stands for "no limit", and for the default value.
const INFINITY: u64 = u64::MAX;
/// In microseconds.
const SECOND: u64 = 1_000_000;
/// The shortest period that the kernel accepts (`min_cfs_quota_period`), in microseconds.
const SHORTEST_PERIOD: u64 = 1000;
/// The default period of CPU quotas in systemd and in the kernel, in microseconds.
const DEFAULT_PERIOD: u64 = 100_000;

/// The properties with the same meaning as the cgroup's files. A value that can't be parsed is left out: the files are
/// what limits the container.
pub fn properties(limits: &Limits) -> Properties {
    let mut list: Vec<(&'static str, Variant<'static>)> = Vec::new();
    for (attribute, value) in limits.iter() {
        match attribute {
            Attribute::MemoryMin => list.extend(number("MemoryMin", value)),
            Attribute::MemoryLow => list.extend(number("MemoryLow", value)),
            Attribute::MemoryHigh => list.extend(positive("MemoryHigh", value)),
            Attribute::MemoryMax => list.extend(positive("MemoryMax", value)),
            Attribute::MemorySwapMax => list.extend(number("MemorySwapMax", value)),
            Attribute::Pids => list.extend(positive("TasksMax", value)),
            // systemd expresses an idle cgroup as a weight of 0 (252).
            Attribute::CpuIdle => list.extend((value == "1").then(|| ("CPUWeight", 0_u64.into()))),
            Attribute::CpuWeight if limits.get(Attribute::CpuIdle) == Some("1") => {}
            Attribute::CpuWeight => list.extend(number("CPUWeight", value)),
            Attribute::CpuMax => list.extend(quota(value).into_iter().flatten()),
            Attribute::Cpus => list.extend(set("AllowedCPUs", value)),
            Attribute::MemoryNodes => list.extend(set("AllowedMemoryNodes", value)),
            Attribute::IoWeight => {
                let default = value.lines().find_map(|line| line.strip_prefix("default "));
                list.extend(default.and_then(|value| number("IOWeight", value)));
            }
            Attribute::IoMax => list.extend(io_max(value)),
        }
    }
    Properties(list)
}

fn number(property: &'static str, value: &str) -> Option<(&'static str, Variant<'static>)> {
    let value = if value == "max" { INFINITY } else { value.parse().ok()? };
    Some((property, value.into()))
}

/// As [`number`]. systemd refuses 0 for the property, and with it the limits that it would get in the same call.
fn positive(property: &'static str, value: &str) -> Option<(&'static str, Variant<'static>)> {
    number(property, value).filter(|_| value != "0")
}

/// A container's limits as its unit gets them.
pub fn of_unit(limits: &Limits) -> Limits {
    let of_unit = |(attribute, value): (Attribute, &str)| match (attribute, cpu_max(value)) {
        (Attribute::CpuMax, Some((Some(per_second), period))) => {
            let quota = u128::from(per_second) * u128::from(period) / u128::from(SECOND);
            (attribute, format!("{quota} {period}"))
        }
        _ => (attribute, value.to_owned()),
    };
    limits.iter().map(of_unit).collect()
}

/// systemd expects the quota per second, and computes `cpu.max` from it and the period.
fn quota(value: &str) -> Option<[(&'static str, Variant<'static>); 2]> {
    let (per_second, period) = cpu_max(value)?;
    let period = if period == DEFAULT_PERIOD { INFINITY } else { period };
    Some([
        ("CPUQuotaPerSecUSec", per_second.unwrap_or(INFINITY).into()),
        ("CPUQuotaPeriodUSec", period.into()),
    ])
}

/// The quota per second that a unit gets for the `cpu.max` of its container, and the period, in microseconds. `None` for no quota.
///
/// systemd writes whole percents to the file of the unit, cuts off the rest, and reads the file again at each reload
/// (`bus_cgroup_set_cpu_quota`, 252 to 262): the unit would get less than its container. So the unit gets the next percent. What
/// the container has in its own cgroup is exact.
fn cpu_max(value: &str) -> Option<(Option<u64>, u64)> {
    let (quota, period) = value.split_once(' ')?;
    let period: u64 = period.parse().ok().filter(|period| *period >= SHORTEST_PERIOD)?;
    if quota == "max" {
        return Some((None, period));
    }
    let quota: u128 = quota.parse().ok()?;
    let percents = (quota * 100).div_ceil(period.into());
    Some((Some(u64::try_from(percents).ok()?.checked_mul(SECOND / 100)?), period))
}

/// Converts a list such as `0-2,5` to a bit set, lowest byte first.
fn set(property: &'static str, value: &str) -> Option<(&'static str, Variant<'static>)> {
    /// The highest CPU number that a kernel can have (CONFIG_NR_CPUS).
    const LAST: usize = 8191;
    let mut bits: Vec<u8> = Vec::new();
    for range in value.split(',').filter(|range| !range.is_empty()) {
        let (first, last) = range.split_once('-').unwrap_or((range, range));
        let (first, last): (usize, usize) = (first.parse().ok()?, last.parse().ok()?);
        if last > LAST {
            return None;
        }
        for bit in first..=last {
            bits.resize(bits.len().max(bit / 8 + 1), 0);
            if let Some(byte) = bits.get_mut(bit / 8) {
                *byte |= 1 << (bit % 8);
            }
        }
    }
    Some((property, bits.into()))
}

/// Each of the four limits is one property, a list of devices (`MAJOR:MINOR`). An empty list comes first: systemd appends to
/// lists.
fn io_max(value: &str) -> Vec<(&'static str, Variant<'static>)> {
    const PROPERTIES: [(&str, &str); 4] = [
        ("rbps=", "IOReadBandwidthMax"),
        ("wbps=", "IOWriteBandwidthMax"),
        ("riops=", "IOReadIOPSMax"),
        ("wiops=", "IOWriteIOPSMax"),
    ];
    let limits_of = |key: &str| -> Vec<(String, u64)> {
        let limit = |line: &str| {
            let (device, limits) = line.split_once(' ')?;
            let (major, minor) = device.split_once(':')?;
            let (major, minor): (u32, u32) = (major.parse().ok()?, minor.parse().ok()?);
            let value = limits.split(' ').find_map(|limit| limit.strip_prefix(key))?;
            Some((format!("/dev/block/{major}:{minor}"), value.parse().ok()?))
        };
        value.lines().filter_map(limit).collect()
    };
    let mut list: Vec<(&'static str, Variant<'static>)> = Vec::new();
    for (key, property) in PROPERTIES {
        list.push((property, Vec::<(String, u64)>::new().into()));
        let limits = limits_of(key);
        if !limits.is_empty() {
            list.push((property, limits.into()));
        }
    }
    list
}

#[cfg(test)]
mod tests {
    use super::*;

    fn shown(values: &[(Attribute, &str)]) -> Vec<String> {
        let limits: Limits = values.iter().map(|(a, value)| (*a, (*value).to_owned())).collect();
        properties(&limits).0.iter().map(|(name, value)| format!("{name}={value}")).collect()
    }

    #[test]
    fn numbers_stay_and_max_is_no_limit() {
        let shown = shown(&[(Attribute::MemoryMax, "67108864"), (Attribute::Pids, "max")]);
        assert_eq!(shown, ["MemoryMax=uint64 67108864", "TasksMax=uint64 18446744073709551615"]);
    }

    #[test]
    fn a_zero_that_systemd_refuses_is_left_out() {
        let zeros = [Attribute::MemoryHigh, Attribute::MemoryMax, Attribute::MemorySwapMax, Attribute::Pids];
        assert_eq!(shown(&zeros.map(|attribute| (attribute, "0"))), ["MemorySwapMax=uint64 0"]);
    }

    #[test]
    fn a_quota_is_shown_in_whole_percents_that_leave_the_container_its_own() {
        for (file, per_second, of_unit) in [
            ("50000 100000", 500_000, "50000 100000"),
            ("10000 30000", 340_000, "10200 30000"),
            ("33333 100000", 340_000, "34000 100000"),
            ("1500 100000", 20_000, "2000 100000"),
            ("5000 1000000", 10_000, "10000 1000000"),
            ("max 100000", INFINITY, "max 100000"),
        ] {
            assert_eq!(
                shown(&[(Attribute::CpuMax, file)])[0],
                format!("CPUQuotaPerSecUSec=uint64 {per_second}")
            );
            let limits: Limits = [(Attribute::CpuMax, file.to_owned())].into_iter().collect();
            assert_eq!(super::of_unit(&limits).get(Attribute::CpuMax), Some(of_unit));
            assert_eq!(super::of_unit(&super::of_unit(&limits)), super::of_unit(&limits));
        }
        assert!(shown(&[(Attribute::CpuMax, "1000 0")]).is_empty());
        assert!(shown(&[(Attribute::CpuMax, "10 999")]).is_empty());
    }

    #[test]
    fn an_idle_container_has_no_weight() {
        assert_eq!(shown(&[(Attribute::CpuIdle, "1"), (Attribute::CpuWeight, "0")]), ["CPUWeight=uint64 0"]);
        assert_eq!(
            shown(&[(Attribute::CpuIdle, "0"), (Attribute::CpuWeight, "39")]),
            ["CPUWeight=uint64 39"]
        );
    }

    #[test]
    fn sets_are_bits() {
        assert_eq!(set("A", "0-2,9").unwrap().1, Variant::from(vec![0b0000_0111_u8, 0b10]));
        assert_eq!(set("A", "").unwrap().1, Variant::from(Vec::<u8>::new()));
        assert!(set("A", "0-99999").is_none() && set("A", "x").is_none());
    }

    #[test]
    fn devices_are_named_by_their_numbers() {
        let shown = shown(&[(Attribute::IoMax, "8:0 rbps=1048576 wbps=max riops=max wiops=50")]);
        assert!(
            shown[1].starts_with("IOReadBandwidthMax=") && shown[1].contains("/dev/block/8:0"),
            "{shown:?}"
        );
        assert_eq!(shown.len(), 6, "four that are emptied, two that are set: {shown:?}");
    }

    #[test]
    fn what_is_no_device_has_no_limits() {
        for line in ["x rbps=1", "8 rbps=1", "8:x rbps=1", "/dev/block/8:0 rbps=1", "8:0:0 rbps=1"] {
            assert_eq!(shown(&[(Attribute::IoMax, line)]).len(), 4, "only the four that are emptied: {line}");
        }
    }
}
