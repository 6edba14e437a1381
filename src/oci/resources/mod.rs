//! `linux.resources`: the limits that a client asks for, checked before anything has an effect (pure).
//!
//! The shim refuses a value, with an error that names the field, if no kernel accepts it and every version of runc passes it
//! to the kernel. It leaves all other decisions to runc and the kernel: what works under containerd-shim-runc-v2 works here.
//! Facts: runc 1.1 to 1.3 (`libcontainer/specconv`, `libcontainer/cgroups/fs2`) and the kernel's cgroup-v2.rst.

pub mod cpuset;
mod json;

use std::collections::BTreeMap;

use serde_json::Value;

use json::Field;

use super::canonical::{self, Others, Shape};

/// Why the resources are refused.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The text is not JSON.
    #[error("linux.resources is not valid JSON: {0}")]
    Malformed(#[from] serde_json::Error),
    /// A value has another type, is out of range, or contradicts another one.
    #[error("{field} {rule}, but is {value}")]
    Invalid {
        /// The field, in the spec's notation.
        field: String,
        /// The rule that the value breaks.
        rule: String,
        value: String,
    },
    /// A limit needs a cgroup controller that the kernel does not have, or does not offer in this cgroup.
    #[error("{field} needs the cgroup controller {controller:?}, which is missing in cgroup.controllers")]
    NoController {
        /// The field, in the spec's notation.
        field: String,
        controller: String,
    },
}

/// The fields of `linux.resources` that have an effect on cgroup v2, as the client gave them.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Resources {
    pub memory: Memory,
    pub cpu: Cpu,
    /// `pids.limit`: below 0 means no limit; 0 and absent leave the limit unchanged.
    pub pids_limit: Option<i64>,
    /// `blockIO`
    pub block_io: BlockIo,
    /// `hugepageLimits`: page size and bytes.
    pub hugepage_limits: Vec<(String, u64)>,
    /// Whether `rdma` limits a device.
    pub rdma: bool,
    /// `unified`: names of files in the cgroup, and the text to write to each.
    pub unified: BTreeMap<String, String>,
    /// `devices`, in their order.
    pub devices: Vec<DeviceRule>,
}

/// `memory`, in bytes. -1 means no limit; 0 and absent leave a limit unchanged.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Memory {
    pub limit: Option<i64>,
    pub reservation: Option<i64>,
    /// `swap`: memory and swap together.
    pub swap: Option<i64>,
}

/// `cpu`; times in microseconds.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Cpu {
    pub shares: Option<u64>,
    /// `quota`: below 0 means no limit.
    pub quota: Option<i64>,
    /// `period`; 0 is the kernel's default of 100000.
    pub period: Option<u64>,
    pub burst: Option<u64>,
    pub idle: Option<i64>,
    /// `cpus`; empty leaves them unchanged.
    pub cpus: String,
    /// `mems`; empty leaves them unchanged.
    pub mems: String,
}

/// `blockIO`
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct BlockIo {
    /// `weight`; 0 leaves it unchanged.
    pub weight: Option<u16>,
    /// `throttle…Device`, all four lists.
    pub throttles: Vec<Throttle>,
}

/// A limit of a block device's rate.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Throttle {
    /// The path of the limit in the spec: `blockIO.throttleReadBpsDevice[0]`.
    pub field: String,
    /// The device's major number.
    pub major: i64,
    /// The device's minor number.
    pub minor: i64,
    /// Bytes or operations per second.
    pub rate: u64,
}

/// A rule of `devices`.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct DeviceRule {
    /// Whether the rule allows or denies.
    pub allow: bool,
    /// `a`, `b` or `c`; empty is `a`.
    pub kind: String,
    /// The major number; absent or below 0 means all.
    pub major: Option<i64>,
    /// The minor number; absent or below 0 means all.
    pub minor: Option<i64>,
    /// Letters of `rwm`; runc skips other letters.
    pub access: String,
}

const THROTTLES: [&str; 4] =
    ["throttleReadBpsDevice", "throttleWriteBpsDevice", "throttleReadIOPSDevice", "throttleWriteIOPSDevice"];

/// The shortest and the longest CPU period that the kernel accepts (kernel/sched/core.c, `tg_set_cfs_bandwidth`).
/// The shortest period is the smallest quota, too.
const SHORTEST_PERIOD_USEC: u64 = 1_000;
const LONGEST_PERIOD_USEC: u64 = 1_000_000;

/// The fields that are read here, and those that `Update` looks for.
pub const SHAPE: Shape = Shape::Struct(&[
    (
        "blockIO",
        Shape::Struct(&[
            ("weight", Shape::Value),
            ("weightDevice", Shape::Value),
            (THROTTLES[0], THROTTLE),
            (THROTTLES[1], THROTTLE),
            (THROTTLES[2], THROTTLE),
            (THROTTLES[3], THROTTLE),
        ]),
    ),
    (
        "cpu",
        Shape::Struct(&[
            ("burst", Shape::Value),
            ("cpus", Shape::Text),
            ("idle", Shape::Integer),
            ("mems", Shape::Text),
            ("period", Shape::Value),
            ("quota", Shape::Integer),
            ("shares", Shape::Value),
        ]),
    ),
    (
        "devices",
        Shape::List(&Shape::Struct(&[
            ("access", Shape::Text),
            ("allow", Shape::Value),
            ("major", Shape::Integer),
            ("minor", Shape::Integer),
            ("type", Shape::Text),
        ])),
    ),
    ("hugepageLimits", Shape::List(&Shape::Struct(&[("limit", Shape::Value), ("pageSize", Shape::Text)]))),
    (
        "memory",
        Shape::Struct(&[
            ("limit", Shape::Integer),
            ("reservation", Shape::Integer),
            ("swap", Shape::Integer),
        ]),
    ),
    ("pids", Shape::Struct(&[("limit", Shape::Integer)])),
    ("rdma", Shape::Map(&Shape::Value)),
    ("unified", Shape::Map(&Shape::Text)),
]);

const THROTTLE: Shape = Shape::List(&Shape::Struct(&[
    ("major", Shape::Integer),
    ("minor", Shape::Integer),
    ("rate", Shape::Value),
]));

/// Resources as they are for every OCI runtime; see [`canonical::canonical`].
///
/// # Errors
/// The text is not JSON.
pub fn canonical(text: &[u8]) -> Result<String, Error> {
    Ok(canonical::canonical(text, &SHAPE, Others::Kept)?)
}

/// The files of a cgroup to which one writes a process, which the kernel moves into the cgroup.
const MOVES: [&str; 2] = ["cgroup.procs", "cgroup.threads"];

impl Resources {
    /// Reads resources from JSON as Go's decoder does.
    ///
    /// # Errors
    /// The text is not JSON, or a value has the wrong type; the error names the field.
    pub fn parse(text: &[u8]) -> Result<Self, Error> {
        let value: Value = serde_json::from_str(&canonical::canonical(text, &SHAPE, Others::LeftOut)?)?;
        let all = Field::new("linux.resources", &value);
        let (memory, cpu, block_io) = (all.get("memory")?, all.get("cpu")?, all.get("blockIO")?);
        let unified = all.get("unified")?.entries()?.into_iter();
        Ok(Self {
            memory: Memory {
                limit: memory.get("limit")?.signed()?,
                reservation: memory.get("reservation")?.signed()?,
                swap: memory.get("swap")?.signed()?,
            },
            cpu: Cpu {
                shares: cpu.get("shares")?.unsigned()?,
                quota: cpu.get("quota")?.signed()?,
                period: cpu.get("period")?.unsigned()?,
                burst: cpu.get("burst")?.unsigned()?,
                idle: cpu.get("idle")?.signed()?,
                cpus: cpu.get("cpus")?.text()?,
                mems: cpu.get("mems")?.text()?,
            },
            pids_limit: all.get("pids")?.get("limit")?.signed()?,
            block_io: BlockIo {
                weight: block_io.get("weight")?.unsigned_16()?,
                throttles: throttles(&block_io)?,
            },
            hugepage_limits: list(&all.get("hugepageLimits")?, |limit| {
                Ok((limit.get("pageSize")?.text()?, limit.get("limit")?.unsigned()?.unwrap_or_default()))
            })?,
            rdma: all.get("rdma")?.entries()?.iter().any(|(_, limits)| limits.is_present()),
            unified: unified
                .map(|(key, value)| Ok((key.to_owned(), value.text()?)))
                .collect::<Result<_, Error>>()?,
            devices: list(&all.get("devices")?, |rule| {
                Ok(DeviceRule {
                    allow: rule.get("allow")?.flag()?,
                    kind: rule.get("type")?.text()?,
                    major: rule.get("major")?.signed()?,
                    minor: rule.get("minor")?.signed()?,
                    access: rule.get("access")?.text()?,
                })
            })?,
        })
    }

    /// Checks that the values can be applied.
    ///
    /// # Errors
    /// [`Error::Invalid`]: a value is out of range, or contradicts another value.
    pub fn check(&self) -> Result<(), Error> {
        self.memory.check()?;
        self.cpu.check()?;
        self.block_io.check()?;
        for (at, (size, _)) in self.hugepage_limits.iter().enumerate() {
            if !is_page_size(size) {
                let field = format!("hugepageLimits[{at}].pageSize");
                return Err(invalid(&field, "must be a page size like \"2MB\" or \"1GB\"", &quoted(size)));
            }
        }
        for key in self.unified.keys() {
            if key.contains(['/', '\0']) || key.split('.').any(str::is_empty) || !key.contains('.') {
                return Err(invalid(
                    "unified",
                    "must have names of cgroup files as keys, like \"memory.high\"",
                    &quoted(key),
                ));
            }
            // The pids are those of the host. PID 1 in a container's cgroup is killed or frozen with it, and systemd loses its
            // own unit.
            if MOVES.contains(&key.as_str()) {
                return Err(invalid(
                    "unified",
                    "must not have keys that move processes of the host into the container",
                    &quoted(key),
                ));
            }
        }
        self.devices.iter().enumerate().try_for_each(|(at, rule)| rule.check(at))
    }

    /// The cgroup controllers without which the OCI runtime fails, each with the field that needs it.
    ///
    /// A controller is left out if some version of runc accepts the value without the controller's file.
    pub fn needs(&self) -> impl Iterator<Item = (String, &str)> {
        let set = |value: Option<i64>| value.is_some_and(|value| value != 0);
        let cpu = &self.cpu;
        let throttle = self.block_io.throttles.first();
        let page_size = self.hugepage_limits.first();
        let fields = [
            ("memory.limit", "memory", set(self.memory.limit)),
            ("memory.reservation", "memory", set(self.memory.reservation)),
            ("cpu.shares", "cpu", cpu.shares.is_some_and(|shares| shares != 0)),
            ("cpu.quota", "cpu", set(cpu.quota)),
            ("cpu.period", "cpu", cpu.period.is_some_and(|period| period != 0)),
            ("cpu.cpus", "cpuset", !cpu.cpus.is_empty()),
            ("cpu.mems", "cpuset", !cpu.mems.is_empty()),
            ("pids.limit", "pids", self.pids_limit.is_some_and(|limit| limit > 0)),
            ("blockIO.weight", "io", self.block_io.weight.is_some_and(|weight| weight != 0)),
            (throttle.map_or("", |throttle| throttle.field.as_str()), "io", throttle.is_some()),
            ("hugepageLimits", "hugetlb", page_size.is_some()),
            ("rdma", "rdma", self.rdma),
        ];
        let fields = fields.into_iter().filter(|(.., is_set)| *is_set);
        let fields = fields.map(|(field, controller, _)| (in_spec(field), controller));
        let unified = self.unified.keys().filter_map(|key| {
            let (controller, file) = key.split_once('.')?;
            // These files exist in every cgroup.
            let always = controller == "cgroup" || file == "pressure";
            (!always).then(|| (in_spec(&format!("unified[{}]", quoted(key))), controller))
        });
        fields.chain(unified)
    }

    /// Checks that `available`, the text of `cgroup.controllers`, has all controllers that the limits need.
    ///
    /// # Errors
    /// [`Error::NoController`]
    pub fn check_controllers(&self, available: &str) -> Result<(), Error> {
        let missing = |controller: &str| !available.split_whitespace().any(|name| name == controller);
        match self.needs().find(|(_, controller)| missing(controller)) {
            Some((field, controller)) => {
                Err(Error::NoController { field, controller: controller.to_owned() })
            }
            None => Ok(()),
        }
    }
}

impl Memory {
    fn check(&self) -> Result<(), Error> {
        const AT_LEAST: &str = "must be -1 (no limit), 0 (unset) or a number of bytes";
        for (field, value) in [
            ("memory.limit", self.limit),
            ("memory.reservation", self.reservation),
            ("memory.swap", self.swap),
        ] {
            if let Some(value) = value.filter(|value| *value < -1) {
                return Err(invalid(field, AT_LEAST, &value));
            }
        }
        // The value limits memory and swap together. Without a limit of memory, the limit of swap is unknown.
        match (self.limit.unwrap_or_default(), self.swap.unwrap_or_default()) {
            (_, -1 | 0) | (-1, _) => Ok(()),
            (0, swap) => {
                Err(invalid("memory.swap", "can't be limited without linux.resources.memory.limit", &swap))
            }
            (limit, swap) if swap < limit => {
                let rule = format!(
                    "is memory and swap together and must not be less than linux.resources.memory.limit ({limit})"
                );
                Err(invalid("memory.swap", &rule, &swap))
            }
            _ => Ok(()),
        }
    }
}

impl Cpu {
    /// `shares` may have any value: runc adapts it to the kernel's range (from 1.3.2 on). Real-time values are ignored on
    /// cgroup v2.
    fn check(&self) -> Result<(), Error> {
        let quota = self.quota.and_then(|quota| u64::try_from(quota).ok()).filter(|quota| *quota > 0);
        if let Some(quota) = quota.filter(|quota| *quota < SHORTEST_PERIOD_USEC) {
            return Err(invalid("cpu.quota", "must be at least 1000 microseconds, or not above 0", &quota));
        }
        let periods = SHORTEST_PERIOD_USEC..=LONGEST_PERIOD_USEC;
        if let Some(period) = self.period.filter(|period| *period != 0 && !periods.contains(period)) {
            return Err(invalid("cpu.period", "must be from 1000 to 1000000 microseconds", &period));
        }
        // runc 1.1 ignores this field and the next one. Later versions fail if the kernel refuses the value.
        if let (Some(burst), Some(quota)) = (self.burst, quota)
            && burst > quota
        {
            let rule = format!("must not be greater than linux.resources.cpu.quota ({quota})");
            return Err(invalid("cpu.burst", &rule, &burst));
        }
        if let Some(idle) = self.idle.filter(|idle| !(0..=1).contains(idle)) {
            return Err(invalid("cpu.idle", "must be 0 or 1", &idle));
        }
        for (field, list) in [("cpu.cpus", &self.cpus), ("cpu.mems", &self.mems)] {
            if let Some(rule) = cpuset::wrong(list) {
                return Err(invalid(field, rule, &quoted(list)));
            }
        }
        Ok(())
    }
}

impl BlockIo {
    /// Only the BFQ scheduler accepts a weight below 10. `weightDevice` has an effect only with BFQ.
    fn check(&self) -> Result<(), Error> {
        if let Some(weight) = self.weight.filter(|weight| *weight > 1000) {
            return Err(invalid("blockIO.weight", "must be from 10 to 1000, or 0 (unset)", &weight));
        }
        for Throttle { field, major, minor, rate } in &self.throttles {
            for (part, number) in [("major", *major), ("minor", *minor)] {
                if u32::try_from(number).is_err() {
                    return Err(invalid(&format!("{field}.{part}"), "must be a device's number", &number));
                }
            }
            if *rate == 0 {
                return Err(invalid(&format!("{field}.rate"), "must be greater than 0", rate));
            }
        }
        Ok(())
    }
}

impl DeviceRule {
    fn check(&self, at: usize) -> Result<(), Error> {
        let field = |part| format!("devices[{at}].{part}");
        if !["", "a", "b", "c"].contains(&self.kind.as_str()) {
            return Err(invalid(&field("type"), "must be \"a\", \"b\" or \"c\"", &quoted(&self.kind)));
        }
        if self.access.is_empty() {
            return Err(invalid(&field("access"), "must have some of the letters \"rwm\"", &"empty"));
        }
        for (part, number) in [("major", self.major), ("minor", self.minor)] {
            // A rule for all devices ignores its numbers.
            let counts = ["b", "c"].contains(&self.kind.as_str());
            if let Some(number) = number.filter(|number| counts && *number > i64::from(u32::MAX)) {
                return Err(invalid(&field(part), "must be a device's number, or -1 for all", &number));
            }
        }
        Ok(())
    }
}

fn throttles(block_io: &Field<'_>) -> Result<Vec<Throttle>, Error> {
    let mut all = Vec::new();
    for name in THROTTLES {
        for (at, item) in block_io.get(name)?.items()?.iter().enumerate() {
            all.push(Throttle {
                field: format!("blockIO.{name}[{at}]"),
                major: item.get("major")?.signed()?.unwrap_or_default(),
                minor: item.get("minor")?.signed()?.unwrap_or_default(),
                rate: item.get("rate")?.unsigned()?.unwrap_or_default(),
            });
        }
    }
    Ok(all)
}

fn list<T>(field: &Field<'_>, read: impl Fn(&Field<'_>) -> Result<T, Error>) -> Result<Vec<T>, Error> {
    field.items()?.iter().map(read).collect()
}

/// True for a page size in the form that the kernel uses in the names of hugetlb's files (mm/hugetlb_cgroup.c): `64KB`,
/// `2MB`, `1GB`.
fn is_page_size(text: &str) -> bool {
    let number = ["KB", "MB", "GB"].iter().find_map(|unit| text.strip_suffix(unit));
    number.is_some_and(|number| {
        !number.is_empty() && !number.starts_with('0') && number.bytes().all(|byte| byte.is_ascii_digit())
    })
}

fn invalid(field: &str, rule: &str, value: &dyn std::fmt::Display) -> Error {
    Error::Invalid { field: in_spec(field), rule: rule.to_owned(), value: value.to_string() }
}

fn in_spec(field: &str) -> String {
    format!("linux.resources.{field}")
}

/// A client's text, as it can stand in a message.
fn quoted(text: &str) -> String {
    format!("{:?}", text.chars().take(80).collect::<String>())
}

#[cfg(test)]
mod tests;
