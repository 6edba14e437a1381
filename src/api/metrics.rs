//! Converts statistics of a cgroup to containerd's message (pure).

use containerd_shim_protos::api::StatsResponse;
use containerd_shim_protos::cgroups_v2::metrics::{
    CPUStat, HugeTlbStat, IOEntry, IOStat, MemoryEvents as ApiMemoryEvents, MemoryStat as ApiMemoryStat,
    Metrics, PSIData, PSIStats, PidsStat, RdmaEntry, RdmaStat,
};
use protobuf::MessageField;

use crate::cgroup::stats::{
    BlockDevice, Cpu, CpuStat, HugeTlb, Io, Memory, MemoryEvents, MemoryStat, Pids, Pressure, Rdma,
    RdmaDevice, Stall, Stats,
};

use super::convert::{self, Error};

/// The type URL that clients expect.
const METRICS: &str = "io.containerd.cgroups.v2.Metrics";

/// A Stats response.
///
/// # Errors
/// The message can't be encoded.
pub fn stats(stats: Stats) -> Result<StatsResponse, Error> {
    let stats = MessageField::some(convert::any(METRICS, &metrics(stats))?);
    Ok(StatsResponse { stats, ..StatsResponse::default() })
}

/// Builds a message from a struct that has all fields of the message.
macro_rules! message {
    ($message:ident from $stats:ident = $value:expr; $($field:ident),+ $(; $more:ident: $other:expr)*) => {{
        let $stats { $($field),+ } = $value;
        $message { $($field,)+ $($more: $other,)* ..$message::default() }
    }};
}

/// All fields except `network`, which containerd-shim-runc-v2 does not fill either.
fn metrics(stats: Stats) -> Metrics {
    let Stats { pids, cpu, memory, memory_events, io, rdma, hugetlb } = stats;
    Metrics {
        pids: MessageField::some(self::pids(pids)),
        cpu: MessageField::some(self::cpu(cpu)),
        memory: MessageField::some(self::memory(memory)),
        memory_events: memory_events.map(self::memory_events).into(),
        io: MessageField::some(self::io(io)),
        rdma: MessageField::some(self::rdma(rdma)),
        hugetlb: hugetlb.into_iter().map(huge_pages).collect(),
        ..Metrics::default()
    }
}

fn pids(Pids { current, max }: Pids) -> PidsStat {
    PidsStat { current, limit: max, ..PidsStat::default() }
}

fn cpu(Cpu { stat, pressure }: Cpu) -> CPUStat {
    message!(CPUStat from CpuStat = stat;
        usage_usec, user_usec, system_usec, nr_periods, nr_throttled, throttled_usec, nr_bursts, burst_usec;
        psi: psi(pressure))
}

fn memory(memory: Memory) -> ApiMemoryStat {
    let Memory { stat, current, max, peak, swap_current, swap_max, swap_peak, pressure } = memory;
    message!(ApiMemoryStat from MemoryStat = stat;
        anon, file, kernel_stack, slab, sock, shmem, file_mapped, file_dirty, file_writeback, anon_thp,
        inactive_anon, active_anon, inactive_file, active_file, unevictable, slab_reclaimable,
        slab_unreclaimable, pgfault, pgmajfault, workingset_refault, workingset_activate,
        workingset_nodereclaim, pgrefill, pgscan, pgsteal, pgactivate, pgdeactivate, pglazyfree,
        pglazyfreed, thp_fault_alloc, thp_collapse_alloc;
        usage: current;
        usage_limit: max;
        max_usage: peak;
        swap_usage: swap_current;
        swap_limit: swap_max;
        swap_max_usage: swap_peak;
        psi: psi(pressure))
}

fn memory_events(events: MemoryEvents) -> ApiMemoryEvents {
    message!(ApiMemoryEvents from MemoryEvents = events; low, high, max, oom, oom_kill, oom_group_kill)
}

fn io(Io { devices, pressure }: Io) -> IOStat {
    let usage = devices.into_iter().map(block_device).collect();
    IOStat { usage, psi: psi(pressure), ..IOStat::default() }
}

fn block_device(device: BlockDevice) -> IOEntry {
    message!(IOEntry from BlockDevice = device; major, minor, rbytes, wbytes, rios, wios)
}

fn rdma(Rdma { current, max }: Rdma) -> RdmaStat {
    let entries = |devices: Vec<RdmaDevice>| devices.into_iter().map(rdma_device).collect();
    RdmaStat { current: entries(current), limit: entries(max), ..RdmaStat::default() }
}

fn rdma_device(RdmaDevice { device, hca_handle, hca_object }: RdmaDevice) -> RdmaEntry {
    RdmaEntry { device, hca_handles: hca_handle, hca_objects: hca_object, ..RdmaEntry::default() }
}

fn huge_pages(HugeTlb { page_size, current, max, failures }: HugeTlb) -> HugeTlbStat {
    HugeTlbStat { pagesize: page_size, current, max, failcnt: failures, ..HugeTlbStat::default() }
}

fn psi(pressure: Option<Pressure>) -> MessageField<PSIStats> {
    let data = |stall: Stall| message!(PSIData from Stall = stall; avg10, avg60, avg300, total);
    let stats = |Pressure { some, full }| PSIStats {
        some: some.map(data).into(),
        full: full.map(data).into(),
        ..PSIStats::default()
    };
    pressure.map(stats).into()
}

#[cfg(test)]
mod tests {
    use protobuf::reflect::{MessageRef, ReflectFieldRef, ReflectValueRef};
    use protobuf::{Message, MessageFull};

    use crate::cgroup::stats::tests::everything;

    use super::*;

    /// All numbers and texts of a message with the paths of their fields, including empty ones.
    fn flatten(message: MessageRef, path: &str, found: &mut Vec<(String, String)>) {
        for field in message.descriptor_dyn().fields() {
            let path = format!("{path}{}", field.name());
            let mut add = |value: ReflectValueRef, path: &str| match value {
                ReflectValueRef::Message(inner) => flatten(inner, &format!("{path}."), found),
                value => found.push((path.to_owned(), value.to_string())),
            };
            match field.get_reflect(&*message) {
                ReflectFieldRef::Repeated(items) if items.is_empty() => add(ReflectValueRef::U64(0), &path),
                ReflectFieldRef::Repeated(items) => items.into_iter().for_each(|item| add(item, &path)),
                _ => match field.get_singular(&*message) {
                    Some(value) => add(value, &path),
                    None => add(ReflectValueRef::U64(0), &path),
                },
            }
        }
    }

    fn fields(metrics: &Metrics) -> Vec<(String, String)> {
        let mut found = Vec::new();
        flatten(MessageRef::new(metrics), "", &mut found);
        found
    }

    #[test]
    fn every_field_but_network_has_a_number_of_its_own() {
        let fields = fields(&metrics(everything()));
        let empty: Vec<_> = fields.iter().filter(|(_, value)| value == "0").map(|(path, _)| path).collect();
        assert_eq!(empty, ["network"]);
        for (index, (path, value)) in fields.iter().enumerate() {
            let same = fields[..index].iter().find(|(_, other)| other == value);
            assert_eq!(same, None, "{path} is the same");
        }
    }

    #[test]
    fn each_number_is_where_clients_look_for_it() {
        let metrics = metrics(everything());
        assert_eq!((metrics.pids.current, metrics.pids.limit), (101, 102));
        assert_eq!(
            (metrics.memory.usage, metrics.memory.usage_limit, metrics.memory.max_usage),
            (401, 402, 403)
        );
        let memory = &metrics.memory;
        assert_eq!((memory.swap_usage, memory.swap_limit, memory.swap_max_usage), (404, 405, 406));
        assert_eq!((memory.psi.full.avg10, memory.psi.full.total), (4.5, 904));
        assert_eq!((metrics.rdma.current[0].hca_handles, metrics.rdma.limit[0].hca_objects), (701, 704));
        let huge = &metrics.hugetlb[1];
        assert_eq!((huge.pagesize.as_str(), huge.current, huge.max, huge.failcnt), ("1GB", 804, 805, 806));
    }

    #[test]
    fn the_statistics_of_a_removed_cgroup_are_zero_and_only_optional_parts_are_absent() {
        let metrics = metrics(Stats::default());
        assert!(metrics.pids.is_some() && metrics.cpu.is_some() && metrics.memory.is_some());
        assert!(metrics.io.is_some() && metrics.rdma.is_some());
        assert!(metrics.memory_events.is_none() && metrics.cpu.psi.is_none() && metrics.io.psi.is_none());
        assert!(fields(&metrics).iter().all(|(_, value)| value == "0"));
    }

    #[test]
    fn the_response_names_the_message_as_clients_do() {
        let any = stats(everything()).unwrap().stats.unwrap();
        assert_eq!(any.type_url, Metrics::descriptor().full_name());
        assert_eq!(Metrics::parse_from_bytes(&any.value).unwrap(), metrics(everything()));
    }
}
