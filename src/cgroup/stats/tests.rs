//! Tests with the files of a cgroup in a temporary directory.

use tempfile::TempDir;

use super::*;

/// All files of a cgroup. Every number occurs only once.
const EVERYTHING: [(&str, &str); 23] = [
    ("pids.current", "101\n"),
    ("pids.max", "102\n"),
    (
        "cpu.stat",
        "usage_usec 201\nuser_usec 202\nsystem_usec 203\nnice_usec 999\nnr_periods 204\nnr_throttled 205\n\
         throttled_usec 206\nnr_bursts 207\nburst_usec 208\n",
    ),
    ("cpu.pressure", PRESSURES[0]),
    (
        "memory.stat",
        "anon 301\nfile 302\nkernel 999\nkernel_stack 303\nslab 304\nsock 305\nshmem 306\nfile_mapped 307\n\
         file_dirty 308\nfile_writeback 309\nanon_thp 310\ninactive_anon 311\nactive_anon 312\n\
         inactive_file 313\nactive_file 314\nunevictable 315\nslab_reclaimable 316\nslab_unreclaimable 317\n\
         pgfault 318\npgmajfault 319\nworkingset_refault 320\nworkingset_activate 321\n\
         workingset_nodereclaim 322\npgrefill 323\npgscan 324\npgsteal 325\npgactivate 326\n\
         pgdeactivate 327\npglazyfree 328\npglazyfreed 329\nthp_fault_alloc 330\nthp_collapse_alloc 331\n",
    ),
    ("memory.current", "401\n"),
    ("memory.max", "402\n"),
    ("memory.peak", "403\n"),
    ("memory.swap.current", "404\n"),
    ("memory.swap.max", "405\n"),
    ("memory.swap.peak", "406\n"),
    ("memory.pressure", PRESSURES[1]),
    ("memory.events", "low 501\nhigh 502\nmax 503\noom 504\noom_kill 505\noom_group_kill 506\n"),
    ("io.stat", "601:602 rbytes=603 wbytes=604 rios=605 wios=606 dbytes=999 dios=999\n"),
    ("io.pressure", PRESSURES[2]),
    ("rdma.current", "first hca_handle=701 hca_object=702\n"),
    ("rdma.max", "second hca_handle=703 hca_object=704\n"),
    ("hugetlb.2MB.current", "801\n"),
    ("hugetlb.2MB.max", "802\n"),
    ("hugetlb.2MB.events", "max 803\n"),
    ("hugetlb.1GB.current", "804\n"),
    ("hugetlb.1GB.max", "805\n"),
    ("hugetlb.1GB.events", "max 806\n"),
];

const PRESSURES: [&str; 3] = [
    "some avg10=1.25 avg60=2.25 avg300=3.25 total=901\nfull avg10=4.25 avg60=5.25 avg300=6.25 total=902\n",
    "some avg10=1.50 avg60=2.50 avg300=3.50 total=903\nfull avg10=4.50 avg60=5.50 avg300=6.50 total=904\n",
    "some avg10=1.75 avg60=2.75 avg300=3.75 total=905\nfull avg10=4.75 avg60=5.75 avg300=6.75 total=906\n",
];

/// The directory of a cgroup.
struct Dir(TempDir);

impl Dir {
    fn new() -> Self {
        Self(tempfile::tempdir().unwrap())
    }

    fn with(files: &[(&str, &str)]) -> Self {
        let dir = Self::new();
        for (file, text) in files {
            fs::write(dir.0.path().join(file), text).unwrap();
        }
        dir
    }

    fn stats(&self) -> Stats {
        Stats::of_dirs(self.0.path(), self.0.path(), &sizes()).unwrap()
    }
}

fn sizes() -> Vec<PageSize> {
    ["hugepages-2048kB", "hugepages-1048576kB"].iter().filter_map(|entry| PageSize::of(entry)).collect()
}

/// The statistics of a cgroup with all files.
pub fn everything() -> Stats {
    Dir::with(&EVERYTHING).stats()
}

fn stall(averages: [f64; 3], total: u64) -> Option<Stall> {
    let [avg10, avg60, avg300] = averages;
    Some(Stall { avg10, avg60, avg300, total })
}

#[test]
fn every_file_is_read() {
    let stats = everything();
    assert_eq!(stats.pids, Pids { current: 101, max: 102 });
    assert_eq!(stats.cpu.stat.usage_usec, 201);
    assert_eq!(stats.cpu.stat.burst_usec, 208);
    let pressure = Pressure { some: stall([1.25, 2.25, 3.25], 901), full: stall([4.25, 5.25, 6.25], 902) };
    assert_eq!(stats.cpu.pressure, Some(pressure));
    assert_eq!(stats.memory.stat.anon, 301);
    assert_eq!(stats.memory.stat.thp_collapse_alloc, 331);
    let memory = &stats.memory;
    assert_eq!([memory.current, memory.max, memory.peak], [401, 402, 403]);
    assert_eq!([memory.swap_current, memory.swap_max, memory.swap_peak], [404, 405, 406]);
    assert_eq!(stats.memory_events.unwrap().oom_group_kill, 506);
    let disk = BlockDevice { major: 601, minor: 602, rbytes: 603, wbytes: 604, rios: 605, wios: 606 };
    assert_eq!(stats.io.devices, [disk]);
    let device =
        |name: &str, hca_handle, hca_object| RdmaDevice { device: name.to_owned(), hca_handle, hca_object };
    assert_eq!(stats.rdma.current, [device("first", 701, 702)]);
    assert_eq!(stats.rdma.max, [device("second", 703, 704)]);
    let pages =
        |size: &str, current, max, failures| HugeTlb { page_size: size.to_owned(), current, max, failures };
    assert_eq!(stats.hugetlb, [pages("2MB", 801, 802, 803), pages("1GB", 804, 805, 806)]);
}

#[test]
fn a_cgroup_that_is_gone_has_zeros_and_its_page_sizes() {
    let gone = Path::new("/no/such/cgroup");
    let stats = Stats::of_dirs(gone, gone, &sizes()).unwrap();
    assert_eq!(stats, Dir::new().stats());
    assert_eq!(
        stats.hugetlb.iter().map(|pages| pages.page_size.as_str()).collect::<Vec<_>>(),
        ["2MB", "1GB"]
    );
    assert_eq!(Stats { hugetlb: Vec::new(), ..stats }, Stats::default());
}

#[test]
fn limits_that_are_not_set_are_the_largest_numbers() {
    let limits = ["pids.max", "memory.max", "memory.swap.max", "hugetlb.2MB.max"].map(|file| (file, "max\n"));
    let used = ["pids.current", "memory.current", "memory.swap.current", "hugetlb.2MB.current"];
    let stats = Dir::with(&[limits, used.map(|file| (file, "1\n"))].concat()).stats();
    assert_eq!(
        [stats.pids.max, stats.memory.max, stats.memory.swap_max, stats.hugetlb[0].max],
        [u64::MAX; 4]
    );
    let stats =
        Dir::with(&[("rdma.current", ""), ("rdma.max", "mlx4_0 hca_handle=max hca_object=2000\n")]).stats();
    assert_eq!((stats.rdma.max[0].hca_handle, stats.rdma.max[0].hca_object), (u32::MAX, 2000));
}

#[test]
fn a_line_that_is_not_understood_is_zero_and_hides_no_other_value() {
    let stats = Dir::with(&[
        ("pids.current", "many\n"),
        ("pids.max", ""),
        ("cpu.stat", "usage_usec 1 2\nuser_usec -3\nsystem_usec 4\n"),
        ("cpu.pressure", "some avg10=x avg60=0.50 total=y\nmost avg10=1.00\n"),
        ("io.stat", "8:0 rbytes=x wbytes=7\nnonsense rbytes=1\n8:x rbytes=1\n"),
        ("hugetlb.2MB.current", "6\n"),
        ("hugetlb.2MB.events", "none 3\n"),
        ("memory.current", "5\n"),
    ])
    .stats();
    assert_eq!(stats.pids, Pids::default());
    assert_eq!(stats.cpu.stat, CpuStat { system_usec: 4, ..CpuStat::default() });
    assert_eq!(stats.cpu.pressure, Some(Pressure { some: stall([0.0, 0.5, 0.0], 0), full: None }));
    assert_eq!(stats.io.devices, [BlockDevice { major: 8, wbytes: 7, ..BlockDevice::default() }]);
    assert_eq!(stats.hugetlb[0].failures, 0);
    assert_eq!(stats.memory.current, 5);
}

#[test]
fn events_of_memory_are_absent_where_their_file_is_empty() {
    assert_eq!(Dir::with(&[("memory.events", "")]).stats().memory_events, None);
    let some = Dir::with(&[("memory.events", "low 0\n")]).stats();
    assert_eq!(some.memory_events, Some(MemoryEvents::default()));
}

#[test]
fn events_of_memory_may_be_those_of_another_cgroup() {
    let [dir, unit] = ["oom_kill 1\n", "oom_kill 2\n"].map(|text| Dir::with(&[("memory.events", text)]));
    let stats = Stats::of_dirs(dir.0.path(), unit.0.path(), &[]).unwrap();
    assert_eq!(stats.memory_events.unwrap().oom_kill, 2);
    let stats = Stats::of_dirs(dir.0.path(), Path::new("/no/such/cgroup"), &[]).unwrap();
    assert_eq!(stats.memory_events, None);
}

#[test]
fn without_the_first_file_of_a_controller_its_others_are_not_looked_for() {
    let controllers = [
        ("pids.current", "pids."),
        ("memory.current", "memory."),
        ("rdma.current", "rdma."),
        ("hugetlb.2MB.current", "hugetlb."),
    ];
    for (first, controller) in controllers {
        let dir = Dir::with(&EVERYTHING);
        fs::remove_file(dir.0.path().join(first)).unwrap();
        // A directory can't be read: this would be an error.
        let is_kept = |file: &str| ["memory.pressure", "memory.events", first].contains(&file);
        for (file, _) in EVERYTHING.iter().filter(|(file, _)| file.starts_with(controller)) {
            if !is_kept(file) {
                fs::remove_file(dir.0.path().join(file)).unwrap();
                fs::create_dir(dir.0.path().join(file)).unwrap();
            }
        }
        let (stats, all) = (dir.stats(), everything());
        let is_missing = [
            stats.pids == Pids::default(),
            stats.memory == Memory { pressure: all.memory.pressure, ..Memory::default() },
            stats.rdma == Rdma::default(),
            stats.hugetlb.iter().all(|pages| (pages.current, pages.max, pages.failures) == (0, 0, 0)),
        ];
        assert_eq!(is_missing, controllers.map(|(_, other)| other == controller), "without {first}");
        assert_eq!((stats.cpu, stats.io, stats.memory_events), (all.cpu, all.io, all.memory_events));
        assert_eq!(stats.hugetlb.len(), sizes().len());
    }
}

#[test]
fn a_file_that_is_there_and_cannot_be_read_is_an_error_that_names_it() {
    let dir = Dir::new();
    fs::create_dir(dir.0.path().join("memory.current")).unwrap();
    let error = Stats::of_dirs(dir.0.path(), dir.0.path(), &[]).unwrap_err();
    assert!(error.to_string().contains("memory.current"), "{error}");
}

#[test]
fn a_file_may_be_larger_than_usual() {
    let lines: String =
        (0..1000).map(|minor| format!("8:{minor} rbytes=1 wbytes=2 rios=3 wios=4\n")).collect();
    let stats = Dir::with(&[("io.stat", &lines)]).stats();
    assert_eq!(stats.io.devices.len(), 1000);
    assert_eq!(stats.io.devices[999].minor, 999);
}

#[test]
fn a_file_may_be_as_large_as_the_buffer() {
    for length in [TEXT_BYTES - 1, TEXT_BYTES, TEXT_BYTES + 1, 2 * TEXT_BYTES] {
        let first = "8:0 rbytes=1";
        let last = "8:1 rbytes=2\n";
        let text = format!("{first:<width$}\n{last}", width = length - last.len() - 1);
        assert_eq!(text.len(), length);
        let devices = Dir::with(&[("io.stat", &text)]).stats().io.devices;
        assert_eq!(devices.iter().map(|device| device.rbytes).collect::<Vec<_>>(), [1, 2], "{length}");
    }
}

#[test]
fn page_sizes_are_named_as_in_the_files_of_cgroups() {
    let dir = Dir::new();
    for entry in ["hugepages-1048576kB", "hugepages-64kB", "hugepages-2048kB", "hugepages-x", "other"] {
        fs::create_dir(dir.0.path().join(entry)).unwrap();
    }
    let names: Vec<String> = PageSize::all(dir.0.path()).into_iter().map(|size| size.name).collect();
    assert_eq!(names, ["64KB", "2MB", "1GB"]);
    assert!(PageSize::all(Path::new("/no/such/directory")).is_empty());
}
