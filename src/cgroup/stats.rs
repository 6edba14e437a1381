//! Reads the statistics of a cgroup, and its limits as Stats reports them.
//!
//! A missing file gives zeros or `None`: its controller is off, the kernel is too old, or the cgroup does not exist
//! any more. A missing key in a file has the same effect. runc.v2 reports the same values.

use std::fs::{self, File};
use std::io::{self, Read};
use std::os::fd::OwnedFd;
use std::path::Path;
use std::sync::LazyLock;

use nix::errno::Errno;
use nix::fcntl::{self, OFlag};
use nix::sys::stat::Mode;

use super::format::{flat, nested, number};
use crate::path_error::io_error;

use super::{Error, is_gone};

/// A struct with the keys of a flat keyed file as its fields.
macro_rules! flat_keyed {
    ($(#[$doc:meta])* $name:ident: $($key:ident),+ $(,)?) => {
        $(#[$doc])*
        #[derive(Clone, Debug, Default, PartialEq)]
        pub struct $name { $(pub $key: u64),+ }

        impl $name {
            fn parse(text: &str) -> Self {
                let mut found = Self::default();
                for (key, value) in flat(text) {
                    match key {
                        $(stringify!($key) => found.$key = value,)+
                        _ => {}
                    }
                }
                found
            }
        }
    };
}

flat_keyed! {
    /// `cpu.stat`: times in microseconds, and counters.
    CpuStat: usage_usec, user_usec, system_usec, nr_periods, nr_throttled, throttled_usec, nr_bursts,
    burst_usec
}

flat_keyed! {
    /// `memory.stat`: amounts in bytes, and counters of faults, pages and events.
    MemoryStat: anon, file, kernel_stack, slab, sock, shmem, file_mapped, file_dirty, file_writeback,
    anon_thp, inactive_anon, active_anon, inactive_file, active_file, unevictable, slab_reclaimable,
    slab_unreclaimable, pgfault, pgmajfault, workingset_refault, workingset_activate,
    workingset_nodereclaim, pgrefill, pgscan, pgsteal, pgactivate, pgdeactivate, pglazyfree, pglazyfreed,
    thp_fault_alloc, thp_collapse_alloc
}

flat_keyed! {
    /// `memory.events`: counters of the cgroup and of all cgroups below it.
    MemoryEvents: low, high, max, oom, oom_kill, oom_group_kill
}

/// Statistics of a cgroup. A limit that is not set is [`u64::MAX`].
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Stats {
    /// Number of processes and threads.
    pub pids: Pids,
    /// Processor time.
    pub cpu: Cpu,
    /// Memory and swap.
    pub memory: Memory,
    /// `memory.events`; `None` if the file is missing or empty.
    pub memory_events: Option<MemoryEvents>,
    /// Block devices.
    pub io: Io,
    /// RDMA devices.
    pub rdma: Rdma,
    /// One entry for each size of huge pages that the kernel supports.
    pub hugetlb: Vec<HugeTlb>,
}

/// `pids.*`.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Pids {
    /// `pids.current`.
    pub current: u64,
    /// `pids.max`.
    pub max: u64,
}

/// `cpu.*`.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Cpu {
    /// `cpu.stat`.
    pub stat: CpuStat,
    /// `cpu.pressure`.
    pub pressure: Option<Pressure>,
}

/// `memory.*`, in bytes.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Memory {
    /// `memory.stat`.
    pub stat: MemoryStat,
    /// In use.
    pub current: u64,
    /// The limit.
    pub max: u64,
    /// The highest use so far.
    pub peak: u64,
    /// Swap in use.
    pub swap_current: u64,
    /// The limit of swap.
    pub swap_max: u64,
    /// The highest use of swap so far.
    pub swap_peak: u64,
    /// `memory.pressure`.
    pub pressure: Option<Pressure>,
}

/// `io.*`.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Io {
    /// `io.stat`.
    pub devices: Vec<BlockDevice>,
    /// `io.pressure`.
    pub pressure: Option<Pressure>,
}

/// A block device in `io.stat`.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct BlockDevice {
    /// The major number.
    pub major: u64,
    /// The minor number.
    pub minor: u64,
    /// Bytes read.
    pub rbytes: u64,
    /// Bytes written.
    pub wbytes: u64,
    /// Number of reads.
    pub rios: u64,
    /// Number of writes.
    pub wios: u64,
}

/// `rdma.*`.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Rdma {
    /// In use.
    pub current: Vec<RdmaDevice>,
    /// The limits.
    pub max: Vec<RdmaDevice>,
}

/// An RDMA device. A limit that is not set is [`u32::MAX`].
#[derive(Clone, Debug, Default, PartialEq)]
pub struct RdmaDevice {
    /// Its name.
    pub device: String,
    /// Handles.
    pub hca_handle: u32,
    /// Objects.
    pub hca_object: u32,
}

/// `hugetlb.SIZE.*`, in bytes.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct HugeTlb {
    /// The size, as the file names have it, e.g. `2MB`.
    pub page_size: String,
    /// In use.
    pub current: u64,
    /// The limit.
    pub max: u64,
    /// Number of allocations that failed at the limit.
    pub failures: u64,
}

/// Time that processes lose by waiting (pressure stall information, psi.rst).
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Pressure {
    /// Time in which at least one process waited.
    pub some: Option<Stall>,
    /// Time in which all processes waited; kernels before 5.13 do not report it for the CPU.
    pub full: Option<Stall>,
}

/// How long processes have waited for a resource. The fields have the kernel's names.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Stall {
    /// Percent of the last 10 s.
    pub avg10: f64,
    /// Percent of the last 60 s.
    pub avg60: f64,
    /// Percent of the last 300 s.
    pub avg300: f64,
    /// Microseconds since the cgroup was created.
    pub total: u64,
}

impl Stats {
    /// Reads the statistics of a cgroup, given by its path below [`super::ROOT`]. The kernel may have to sum up
    /// counters of all CPUs, which takes milliseconds on a machine with many cgroups.
    ///
    /// # Errors
    /// A file exists and can't be read. A cgroup that does not exist any more is no error.
    pub fn read(cgroup: &Path) -> Result<Self, Error> {
        Self::of_dir(&super::dir(cgroup), &PAGE_SIZES)
    }

    fn of_dir(dir: &Path, sizes: &[PageSize]) -> Result<Self, Error> {
        let mut files = Files::open(dir)?;
        Ok(Self {
            pids: Pids { current: files.number("pids.current")?, max: files.number("pids.max")? },
            cpu: Cpu {
                stat: files.read("cpu.stat", CpuStat::parse)?.unwrap_or_default(),
                pressure: files.read("cpu.pressure", pressure)?,
            },
            memory: Memory {
                stat: files.read("memory.stat", MemoryStat::parse)?.unwrap_or_default(),
                current: files.number("memory.current")?,
                max: files.number("memory.max")?,
                peak: files.number("memory.peak")?,
                swap_current: files.number("memory.swap.current")?,
                swap_max: files.number("memory.swap.max")?,
                swap_peak: files.number("memory.swap.peak")?,
                pressure: files.read("memory.pressure", pressure)?,
            },
            memory_events: files.read("memory.events", memory_events)?.flatten(),
            io: Io {
                devices: files.read("io.stat", block_devices)?.unwrap_or_default(),
                pressure: files.read("io.pressure", pressure)?,
            },
            rdma: Rdma {
                current: files.read("rdma.current", rdma_devices)?.unwrap_or_default(),
                max: files.read("rdma.max", rdma_devices)?.unwrap_or_default(),
            },
            hugetlb: sizes.iter().map(|size| size.read(&mut files)).collect::<Result<_, _>>()?,
        })
    }
}

impl MemoryEvents {
    /// Reads the memory events of a cgroup; `None` if the cgroup does not exist any more, or if its memory is not accounted.
    ///
    /// # Errors
    /// The file exists and can't be read.
    pub fn read(cgroup: &Path) -> Result<Option<Self>, Error> {
        let dir = super::dir(cgroup);
        Ok(Files::open(&dir)?.read("memory.events", memory_events)?.flatten())
    }
}

/// The files of one cgroup.
struct Files<'p> {
    path: &'p Path,
    /// `None` if the cgroup does not exist any more.
    dir: Option<OwnedFd>,
    /// The text of the file that was read last.
    text: String,
}

/// Larger than the largest file of a usual cgroup, `memory.stat`.
const TEXT_BYTES: usize = 8192;

impl<'p> Files<'p> {
    fn open(path: &'p Path) -> Result<Self, Error> {
        let dir = fcntl::open(path, OFlag::O_PATH | OFlag::O_DIRECTORY | OFlag::O_CLOEXEC, Mode::empty());
        let dir = present(dir.map_err(io::Error::from)).map_err(io_error("open", path))?;
        Ok(Self { path, dir, text: String::with_capacity(TEXT_BYTES) })
    }

    /// Parses a file, if it exists.
    fn read<T>(&mut self, name: &str, parse: impl FnOnce(&str) -> T) -> Result<Option<T>, Error> {
        let Some(dir) = &self.dir else { return Ok(None) };
        self.text.clear();
        let read = present(append(dir, name, &mut self.text));
        let read = read.map_err(io_error("read", &self.path.join(name)))?;
        Ok(read.map(|()| parse(&self.text)))
    }

    fn number(&mut self, name: &str) -> Result<u64, Error> {
        Ok(self.read(name, number)?.flatten().unwrap_or_default())
    }
}

/// Appends the text of a file in a directory.
fn append(dir: &OwnedFd, name: &str, text: &mut String) -> io::Result<()> {
    let file = File::from(fcntl::openat(dir, name, OFlag::O_RDONLY | OFlag::O_CLOEXEC, Mode::empty())?);
    // `take` is no limit here. Without it, std first asks for the size of the file, and these files have none.
    file.take(u64::MAX).read_to_string(text).map(drop)
}

/// `None` if the file does not exist, or if the kernel does not count (boot option `psi=0`).
fn present<T>(result: io::Result<T>) -> io::Result<Option<T>> {
    match result {
        Err(e) if is_gone(&e) || e.raw_os_error() == Some(Errno::EOPNOTSUPP as i32) => Ok(None),
        result => result.map(Some),
    }
}

fn memory_events(text: &str) -> Option<MemoryEvents> {
    (!text.is_empty()).then(|| MemoryEvents::parse(text))
}

fn pressure(text: &str) -> Pressure {
    let mut found = Pressure::default();
    for (key, pairs) in nested(text) {
        let stall = match key {
            "some" => found.some.insert(Stall::default()),
            "full" => found.full.insert(Stall::default()),
            _ => continue,
        };
        for (name, value) in pairs {
            match name {
                "avg10" => stall.avg10 = value.parse().unwrap_or_default(),
                "avg60" => stall.avg60 = value.parse().unwrap_or_default(),
                "avg300" => stall.avg300 = value.parse().unwrap_or_default(),
                "total" => stall.total = number(value).unwrap_or_default(),
                _ => {}
            }
        }
    }
    found
}

fn block_devices(text: &str) -> Vec<BlockDevice> {
    let device = |(key, pairs): (&str, _)| {
        let (major, minor) = key.split_once(':')?;
        let mut device =
            BlockDevice { major: major.parse().ok()?, minor: minor.parse().ok()?, ..BlockDevice::default() };
        for (name, value) in pairs {
            let field = match name {
                "rbytes" => &mut device.rbytes,
                "wbytes" => &mut device.wbytes,
                "rios" => &mut device.rios,
                "wios" => &mut device.wios,
                _ => continue,
            };
            *field = number(value).unwrap_or_default();
        }
        Some(device)
    };
    nested(text).filter_map(device).collect()
}

fn rdma_devices(text: &str) -> Vec<RdmaDevice> {
    let device = |(key, pairs): (&str, _)| {
        let mut device = RdmaDevice { device: key.to_owned(), ..RdmaDevice::default() };
        for (name, value) in pairs {
            let field = match name {
                "hca_handle" => &mut device.hca_handle,
                "hca_object" => &mut device.hca_object,
                _ => continue,
            };
            *field = u32::try_from(number(value).unwrap_or_default()).unwrap_or(u32::MAX);
        }
        device
    };
    nested(text).map(device).collect()
}

/// The sizes of huge pages of this machine, smallest first. They don't change while the machine runs.
static PAGE_SIZES: LazyLock<Vec<PageSize>> =
    LazyLock::new(|| PageSize::all(Path::new("/sys/kernel/mm/hugepages")));

/// A size of huge pages, and the names of its files.
struct PageSize {
    kib: u64,
    name: String,
    current: String,
    max: String,
    events: String,
}

impl PageSize {
    /// All sizes, from the directory that has an entry for each. Empty without that directory.
    fn all(dir: &Path) -> Vec<Self> {
        let entries = fs::read_dir(dir).into_iter().flatten().flatten();
        let mut sizes: Vec<Self> =
            entries.filter_map(|entry| Self::of(entry.file_name().to_str()?)).collect();
        sizes.sort_by_key(|size| size.kib);
        sizes
    }

    /// From an entry like `hugepages-2048kB`. The files of a cgroup call this size `2MB`.
    fn of(entry: &str) -> Option<Self> {
        let kib = entry.strip_prefix("hugepages-")?.strip_suffix("kB")?.parse::<u64>().ok()?;
        let name = match kib {
            ..0x400 => format!("{kib}KB"),
            0x400..0x10_0000 => format!("{}MB", kib >> 10),
            0x10_0000.. => format!("{}GB", kib >> 20),
        };
        let file = |what: &str| format!("hugetlb.{name}.{what}");
        let (current, max, events) = (file("current"), file("max"), file("events"));
        Some(Self { kib, name, current, max, events })
    }

    fn read(&self, files: &mut Files) -> Result<HugeTlb, Error> {
        let failures = |text: &str| flat(text).find(|(key, _)| *key == "max").map(|(_, count)| count);
        Ok(HugeTlb {
            page_size: self.name.clone(),
            current: files.number(&self.current)?,
            max: files.number(&self.max)?,
            failures: files.read(&self.events, failures)?.flatten().unwrap_or_default(),
        })
    }
}

#[cfg(test)]
pub mod tests;
