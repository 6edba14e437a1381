//! The limits of a container that exist both in its cgroup and as properties of its unit (pure).

use std::collections::{BTreeMap, BTreeSet};

use serde::{Deserialize, Serialize};

/// A file of a cgroup (kernel, cgroup-v2) that systemd has as a property of a unit. In the order in which they must be
/// written: an idle cgroup accepts no weight.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
pub enum Attribute {
    /// Memory that is never reclaimed, in bytes.
    #[serde(rename = "memory.min")]
    MemoryMin,
    /// Memory that is reclaimed last, in bytes.
    #[serde(rename = "memory.low")]
    MemoryLow,
    /// The use above which processes are slowed down, in bytes or `max`.
    #[serde(rename = "memory.high")]
    MemoryHigh,
    /// The limit of memory, in bytes or `max`.
    #[serde(rename = "memory.max")]
    MemoryMax,
    /// The limit of swap, in bytes or `max`.
    #[serde(rename = "memory.swap.max")]
    MemorySwapMax,
    /// 1 if processes run only when no others want to (kernel 5.15).
    #[serde(rename = "cpu.idle")]
    CpuIdle,
    /// 1 to 10000, 100 by default.
    #[serde(rename = "cpu.weight")]
    CpuWeight,
    /// Quota or `max`, and period, in microseconds.
    #[serde(rename = "cpu.max")]
    CpuMax,
    /// CPUs as a list of ranges, empty for all.
    #[serde(rename = "cpuset.cpus")]
    Cpus,
    /// Memory nodes as a list of ranges, empty for all.
    #[serde(rename = "cpuset.mems")]
    MemoryNodes,
    /// Number of processes and threads, or `max`.
    #[serde(rename = "pids.max")]
    Pids,
    /// `default` and 1 to 10000; a line for each device that differs.
    #[serde(rename = "io.weight")]
    IoWeight,
    /// A line of `rbps`, `wbps`, `riops`, `wiops` for each device that has any.
    #[serde(rename = "io.max")]
    IoMax,
}

impl Attribute {
    /// All attributes.
    pub const ALL: [Self; 13] = [
        Self::MemoryMin,
        Self::MemoryLow,
        Self::MemoryHigh,
        Self::MemoryMax,
        Self::MemorySwapMax,
        Self::CpuIdle,
        Self::CpuWeight,
        Self::CpuMax,
        Self::Cpus,
        Self::MemoryNodes,
        Self::Pids,
        Self::IoWeight,
        Self::IoMax,
    ];

    /// The file's name.
    pub fn file(self) -> &'static str {
        match self {
            Self::MemoryMin => "memory.min",
            Self::MemoryLow => "memory.low",
            Self::MemoryHigh => "memory.high",
            Self::MemoryMax => "memory.max",
            Self::MemorySwapMax => "memory.swap.max",
            Self::CpuIdle => "cpu.idle",
            Self::CpuWeight => "cpu.weight",
            Self::CpuMax => "cpu.max",
            Self::Cpus => "cpuset.cpus",
            Self::MemoryNodes => "cpuset.mems",
            Self::Pids => "pids.max",
            Self::IoWeight => "io.weight",
            Self::IoMax => "io.max",
        }
    }

    /// The value in a new cgroup.
    pub fn default(self) -> &'static str {
        match self {
            Self::MemoryMin | Self::MemoryLow | Self::CpuIdle => "0",
            Self::MemoryHigh | Self::MemoryMax | Self::MemorySwapMax | Self::Pids => "max",
            Self::CpuWeight => "100",
            Self::CpuMax => "max 100000",
            Self::Cpus | Self::MemoryNodes | Self::IoMax => "",
            Self::IoWeight => "default 100",
        }
    }
}

/// The limits of a unit's cgroup.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct UnitLimits {
    /// The limits when they were last compared with the container's own.
    pub seen: Limits,
    /// The limits that the unit had before it got those of the container, from a drop-in or an annotation: no Update changes them.
    pub given: BTreeSet<Attribute>,
}

/// The limits of a cgroup: the content of its files. Limits of missing controllers are absent.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Limits(BTreeMap<Attribute, String>);

impl FromIterator<(Attribute, String)> for Limits {
    fn from_iter<I: IntoIterator<Item = (Attribute, String)>>(values: I) -> Self {
        Self(values.into_iter().collect())
    }
}

impl Limits {
    /// One limit, with the value that it has in a new cgroup.
    pub fn default_of(attribute: Attribute) -> Self {
        Self(BTreeMap::from([(attribute, attribute.default().to_owned())]))
    }

    /// The value of one limit.
    pub fn get(&self, attribute: Attribute) -> Option<&str> {
        self.0.get(&attribute).map(String::as_str)
    }

    /// All limits.
    pub fn iter(&self) -> impl Iterator<Item = (Attribute, &str)> {
        self.0.iter().map(|(attribute, value)| (*attribute, value.as_str()))
    }

    /// True if there are no limits.
    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    /// The limits that differ in `other`, or are absent there.
    pub fn differing_from(&self, other: &Self) -> Self {
        let differs = self.iter().filter(|(attribute, value)| other.get(*attribute) != Some(*value));
        differs.map(|(attribute, value)| (attribute, value.to_owned())).collect()
    }

    /// The limits that differ from the default.
    pub fn set(&self) -> Self {
        let set = self.iter().filter(|(attribute, value)| *value != attribute.default());
        set.map(|(attribute, value)| (attribute, value.to_owned())).collect()
    }

    /// These limits, and the limits of `other` that are absent here.
    pub fn over(&self, other: &Self) -> Self {
        let mut all = other.0.clone();
        all.extend(self.0.clone());
        Self(all)
    }

    /// The limits of these attributes.
    pub fn only(&self, named: &[Attribute]) -> Self {
        let only = self.iter().filter(|(attribute, _)| named.contains(attribute));
        only.map(|(attribute, value)| (attribute, value.to_owned())).collect()
    }

    /// The limits of other attributes than these.
    pub fn except(&self, excluded: &BTreeSet<Attribute>) -> Self {
        let rest = self.iter().filter(|(attribute, _)| !excluded.contains(attribute));
        rest.map(|(attribute, value)| (attribute, value.to_owned())).collect()
    }

    /// The attributes.
    pub fn attributes(&self) -> BTreeSet<Attribute> {
        self.0.keys().copied().collect()
    }

    /// The limits that are absent in `other`.
    pub fn without(&self, other: &Self) -> Self {
        let rest = self.iter().filter(|(attribute, _)| other.get(*attribute).is_none());
        rest.map(|(attribute, value)| (attribute, value.to_owned())).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn limits(values: &[(Attribute, &str)]) -> Limits {
        values.iter().map(|(attribute, value)| (*attribute, (*value).to_owned())).collect()
    }

    #[test]
    fn files_are_named_the_same_in_the_record() {
        for attribute in Attribute::ALL {
            let text = serde_json::to_string(&attribute).unwrap();
            assert_eq!(text, format!("{:?}", attribute.file()));
        }
    }

    #[test]
    fn attributes_without_a_limit_are_not_set() {
        let untouched: Limits = Attribute::ALL.iter().map(|a| (*a, a.default().to_owned())).collect();
        assert!(untouched.set().is_empty());
        let set = limits(&[(Attribute::Pids, "7"), (Attribute::MemoryMax, "max")]).set();
        assert_eq!(set, limits(&[(Attribute::Pids, "7")]));
    }

    #[test]
    fn limits_differ_by_their_values() {
        let one = limits(&[(Attribute::Pids, "7"), (Attribute::MemoryMax, "4096"), (Attribute::Cpus, "")]);
        let other = limits(&[(Attribute::Pids, "7"), (Attribute::MemoryMax, "max")]);
        assert_eq!(
            one.differing_from(&other),
            limits(&[(Attribute::MemoryMax, "4096"), (Attribute::Cpus, "")])
        );
        assert_eq!(one.without(&other), limits(&[(Attribute::Cpus, "")]));
        assert_eq!(other.over(&one).get(Attribute::MemoryMax), Some("max"));
        assert_eq!(other.over(&one).get(Attribute::Cpus), Some(""));
    }
}
