//! Reads the statistics of a cgroup, and its limits as Stats reports them.
//!
//! A missing file gives zeros or `None`: its controller is off, the kernel is too old, or the cgroup does not exist
//! any more. A missing key in a file has the same effect. runc.v2 reports the same values.

use std::fs;
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::Path;
use std::sync::LazyLock;

use nix::errno::Errno;
use nix::fcntl::{self, OFlag};
use nix::sys::stat::Mode;
use nix::unistd;

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
    /// Reads the statistics of a cgroup, given by its path below [`super::ROOT`]. The memory events are those of the second
    /// cgroup, which may be the same. The kernel may have to sum up counters of all CPUs, which takes milliseconds on a
    /// machine with many cgroups.
    ///
    /// # Errors
    /// A file exists and can't be read. A cgroup that does not exist any more is no error.
    pub fn read(cgroup: &Path, memory_events: &Path) -> Result<Self, Error> {
        Self::of_dirs(&super::dir(cgroup), &super::dir(memory_events), &PAGE_SIZES)
    }

    fn of_dirs(dir: &Path, memory_events: &Path, sizes: &[PageSize]) -> Result<Self, Error> {
        let mut files = Files::open(dir)?;
        let events = if dir == memory_events {
            files.read(MemoryEvents::FILE, self::memory_events)?
        } else {
            files.read_at(&memory_events.join(MemoryEvents::FILE), self::memory_events)?
        };
        Ok(Self {
            pids: files.pids()?,
            cpu: Cpu {
                stat: files.read("cpu.stat", CpuStat::parse)?.unwrap_or_default(),
                pressure: files.read("cpu.pressure", pressure)?,
            },
            memory: files.memory()?,
            memory_events: events.flatten(),
            io: Io {
                devices: files.read("io.stat", block_devices)?.unwrap_or_default(),
                pressure: files.read("io.pressure", pressure)?,
            },
            rdma: files.rdma()?,
            hugetlb: files.huge_pages(sizes)?,
        })
    }
}

impl MemoryEvents {
    const FILE: &str = "memory.events";

    /// Reads the memory events of a cgroup; `None` if the cgroup does not exist any more, or if its memory is not accounted.
    ///
    /// # Errors
    /// The file exists and can't be read.
    pub fn read(cgroup: &Path) -> Result<Option<Self>, Error> {
        let path = super::dir(cgroup).join(Self::FILE);
        Ok(Files::nowhere(&path).read_at(&path, memory_events)?.flatten())
    }
}

/// The files of one cgroup.
///
/// The kernel makes all files of a controller at once. So if the first file of a controller is missing, the others are not
/// looked for: a usual cgroup lacks two controllers, rdma and hugetlb, with up to eight files.
struct Files<'p> {
    path: &'p Path,
    /// `None` if the cgroup does not exist any more.
    dir: Option<OwnedFd>,
    /// The text of the file that was read last.
    text: Vec<u8>,
}

/// Larger than the largest file of a usual cgroup, `memory.stat`.
const TEXT_BYTES: usize = 8192;

impl<'p> Files<'p> {
    fn open(path: &'p Path) -> Result<Self, Error> {
        let dir = fcntl::open(path, OFlag::O_PATH | OFlag::O_DIRECTORY | OFlag::O_CLOEXEC, Mode::empty());
        let dir = present(dir.map_err(io::Error::from)).map_err(io_error("open", path))?;
        Ok(Self { dir, ..Self::nowhere(path) })
    }

    /// No files.
    fn nowhere(path: &'p Path) -> Self {
        Self { path, dir: None, text: Vec::new() }
    }

    /// Parses a file of the cgroup, if it exists.
    fn read<T>(&mut self, name: &str, parse: impl FnOnce(&str) -> T) -> Result<Option<T>, Error> {
        let Some(dir) = &self.dir else { return Ok(None) };
        let text = text_of(dir.as_fd(), Path::new(name), &mut self.text);
        let text = present(text).map_err(io_error("read", &self.path.join(name)))?;
        Ok(text.map(parse))
    }

    /// Parses a file of another cgroup, if it exists.
    fn read_at<T>(&mut self, path: &Path, parse: impl FnOnce(&str) -> T) -> Result<Option<T>, Error> {
        let text = present(text_of(fcntl::AT_FDCWD, path, &mut self.text)).map_err(io_error("read", path))?;
        Ok(text.map(parse))
    }

    /// The number in a file; `None` if the file does not exist.
    fn first_number(&mut self, name: &str) -> Result<Option<u64>, Error> {
        self.read(name, |text| number(text).unwrap_or_default())
    }

    fn number(&mut self, name: &str) -> Result<u64, Error> {
        Ok(self.first_number(name)?.unwrap_or_default())
    }

    fn pids(&mut self) -> Result<Pids, Error> {
        let Some(current) = self.first_number("pids.current")? else { return Ok(Pids::default()) };
        Ok(Pids { current, max: self.number("pids.max")? })
    }

    fn memory(&mut self) -> Result<Memory, Error> {
        // Every cgroup has it, also without the controller.
        let pressure = self.read("memory.pressure", pressure)?;
        let mut memory = Memory { pressure, ..Memory::default() };
        let Some(current) = self.first_number("memory.current")? else { return Ok(memory) };
        memory.current = current;
        memory.stat = self.read("memory.stat", MemoryStat::parse)?.unwrap_or_default();
        memory.max = self.number("memory.max")?;
        memory.peak = self.number("memory.peak")?;
        // Missing in a kernel without swap.
        if let Some(current) = self.first_number("memory.swap.current")? {
            memory.swap_current = current;
            memory.swap_max = self.number("memory.swap.max")?;
            memory.swap_peak = self.number("memory.swap.peak")?;
        }
        Ok(memory)
    }

    fn rdma(&mut self) -> Result<Rdma, Error> {
        let Some(current) = self.read("rdma.current", rdma_devices)? else { return Ok(Rdma::default()) };
        Ok(Rdma { current, max: self.read("rdma.max", rdma_devices)?.unwrap_or_default() })
    }

    fn huge_pages(&mut self, sizes: &[PageSize]) -> Result<Vec<HugeTlb>, Error> {
        let mut is_there = true;
        let mut pages = Vec::with_capacity(sizes.len());
        for size in sizes {
            let current = if is_there { self.first_number(&size.current)? } else { None };
            is_there = current.is_some();
            pages.push(match current {
                Some(current) => size.read(self, current)?,
                None => HugeTlb { page_size: size.name.clone(), ..HugeTlb::default() },
            });
        }
        Ok(pages)
    }
}

/// The text of a file, in a buffer that is used again.
fn text_of<'t>(dir: BorrowedFd<'_>, path: &Path, text: &'t mut Vec<u8>) -> io::Result<&'t str> {
    let file = fcntl::openat(dir, path, OFlag::O_RDONLY | OFlag::O_CLOEXEC, Mode::empty())?;
    let mut length = 0;
    loop {
        if length == text.len() {
            text.resize((2 * length).max(TEXT_BYTES), 0);
        }
        let room = text.len() - length;
        match unistd::read(&file, &mut text[length..]) {
            Ok(read) => {
                length += read;
                // The kernel shows the whole text if there is room for it, so this was the last piece.
                if read < room {
                    break;
                }
            }
            Err(Errno::EINTR) => {}
            Err(errno) => return Err(errno.into()),
        }
    }
    str::from_utf8(&text[..length]).map_err(|error| io::Error::new(io::ErrorKind::InvalidData, error))
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

    fn read(&self, files: &mut Files, current: u64) -> Result<HugeTlb, Error> {
        let failures = |text: &str| flat(text).find(|(key, _)| *key == "max").map(|(_, count)| count);
        Ok(HugeTlb {
            page_size: self.name.clone(),
            current,
            max: files.number(&self.max)?,
            failures: files.read(&self.events, failures)?.flatten().unwrap_or_default(),
        })
    }
}

#[cfg(test)]
pub mod tests;
