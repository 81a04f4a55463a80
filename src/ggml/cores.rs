//! How many threads compute unless somebody says otherwise.

use std::collections::BTreeSet;
use std::fs::read_to_string;
use std::num::NonZero;
use std::sync::OnceLock;
use std::thread::available_parallelism;

/// Threads that sessions and trainers compute with unless their options say otherwise: one for each physical core that this
/// process may use, at least 1. Affinity and, on Linux, the limits of control groups count; a second thread on a core would
/// have to share its arithmetic units with the first. Asked once per process.
pub fn default_threads() -> usize {
    static THREADS: OnceLock<usize> = OnceLock::new();
    *THREADS.get_or_init(|| {
        let available = available_parallelism().map_or(1, NonZero::get);
        let cores = allowed_cores().unwrap_or_else(num_cpus::get_physical);
        cores.clamp(1, available)
    })
}

/// Physical cores among the processors that this process may run on; `None` where Linux does not say, or there is none.
fn allowed_cores() -> Option<usize> {
    let status = read_to_string("/proc/self/status").ok()?;
    count_cores(&status, |cpu| {
        let topology = format!("/sys/devices/system/cpu/cpu{cpu}/topology");
        read_to_string(format!("{topology}/thread_siblings_list")).ok()
    })
}

/// Cores behind the processors that `status` allows. `siblings` names the processors on the core of one of them, itself
/// included, always in the same words; `None` for processors that are not there.
fn count_cores(status: &str, siblings: impl Fn(usize) -> Option<String>) -> Option<usize> {
    let list = status
        .lines()
        .find_map(|line| line.strip_prefix("Cpus_allowed_list:"))?;
    let mut cores = BTreeSet::new();
    for range in list.trim().split(',') {
        let (first, last) = range.split_once('-').unwrap_or((range, range));
        for cpu in first.parse().ok()?..=last.parse().ok()? {
            cores.extend(siblings(cpu));
        }
    }
    Some(cores.len()).filter(|&n| n > 0)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Four cores with two processors each, numbered as most machines do: 0 and 4 share a core.
    fn siblings(cpu: usize) -> Option<String> {
        (cpu < 8).then(|| format!("{},{}\n", cpu % 4, cpu % 4 + 4))
    }

    #[test]
    fn a_core_counts_once() {
        for (list, cores) in [
            ("0-7", 4),
            ("0-3", 4),
            ("0,4", 1),
            ("1,3-5", 3),
            ("2", 1),
            // Places for processors that are not there.
            ("6-127", 2),
        ] {
            let status =
                format!("Name:\tx\nCpus_allowed:\tff\nCpus_allowed_list:\t{list}\nThreads:\t1\n");
            assert_eq!(count_cores(&status, siblings), Some(cores), "{list}");
        }
        for status in ["", "Cpus_allowed_list:\t\n", "Cpus_allowed_list:\t8-9\n"] {
            assert_eq!(count_cores(status, siblings), None, "{status:?}");
        }
    }

    #[test]
    fn there_is_a_thread_for_each_core_and_no_more() {
        let threads = default_threads();
        assert!((1..=available_parallelism().unwrap().get()).contains(&threads));
        if cfg!(target_os = "linux") {
            assert!(threads <= allowed_cores().unwrap_or(threads));
        }
    }
}
