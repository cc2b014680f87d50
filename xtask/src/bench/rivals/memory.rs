//! What a process has, and what the kernel has for what was programmed.

use std::{
    fs,
    path::{Path, PathBuf},
    process, thread,
    time::Duration,
};

use anyhow::{Context, Result};
use sheave_tests::cgroup;

use super::tell;
use crate::bench::{control::field_of, peers::Hub, report::Report, row::Row, stats::median, still};

/// Who has just worked gives back what it needed for that, as far as it does.
const AT_REST_AFTER: Duration = Duration::from_secs(3);

/// What the kernel allocates for itself. Pages of page tables and of files are none of it.
const FIELDS: [&str; 3] = ["Slab:", "VmallocUsed:", "Percpu:"];

/// Between two readings: what was freed goes after a grace period, and with the work of another thread.
const READING: Duration = Duration::from_millis(500);

/// Readings that differ by no more are equal; so many equal ones are the end, and so many readings at the most.
const EQUAL_KB: u64 = 64;
const EQUALS: usize = 3;
const READINGS_MAX: usize = 30;

/// Memory of a process; the commands that it runs have ended. Without PSS: several arms are of one program, whose pages would
/// be shared out among them, the less to each the later it started.
#[derive(Clone, Copy)]
pub(super) struct Process {
    rss_kb: u64,
    anonymous_kb: u64,
    rss_max_kb: u64,
}

impl Process {
    /// After a moment without work.
    pub(super) fn at_rest(pid: u32) -> Result<Self> {
        thread::sleep(AT_REST_AFTER);
        let rollup = fs::read_to_string(format!("/proc/{pid}/smaps_rollup"))?;
        let status = fs::read_to_string(format!("/proc/{pid}/status"))?;
        Ok(Self {
            rss_kb: field_of(&rollup, "Rss:")?,
            anonymous_kb: field_of(&rollup, "Anonymous:")?,
            rss_max_kb: field_of(&status, "VmHWM:")?,
        })
    }
}

/// A4.
pub(super) fn tell_processes(
    when: &str,
    services: u32,
    arms: Vec<(&'static str, Vec<Process>)>,
    report: &mut Report,
) {
    let row = |name| Row::new("a4", format!("process {when}: {name}"), "MB", services, None);
    let mut rows = ["RSS", "RSS without files", "RSS at its highest"].map(row);
    for (arm, found) in arms {
        let kbs = |value: fn(&Process) -> u64| found.iter().map(value).collect::<Vec<_>>();
        let values = [
            kbs(|process| process.rss_kb),
            kbs(|process| process.anonymous_kb),
            kbs(|process| process.rss_max_kb),
        ];
        for (row, kbs) in rows.iter_mut().zip(values) {
            row.add(arm, kbs.iter().map(|kb| *kb as f64 * 1024.0 / 1e6).collect(), None);
        }
    }
    rows.into_iter().for_each(|row| tell(row, report));
}

/// A5 in another way: what the kernel has allocated for a process and the commands that it runs, whatever the rest of the
/// machine does meanwhile. Not all is put on the account; and only cgroups of the older kind keep one here.
pub(super) struct Account {
    own: PathBuf,
    path: PathBuf,
}

/// Where it is kept, and the file that says so much.
const ACCOUNTS: &str = "/sys/fs/cgroup/memory";
const KERNEL_BYTES: &str = "memory.kmem.usage_in_bytes";

/// How often an account's end is tried: commands of who was killed end a moment later.
const ENDINGS: u32 = 100;

impl Account {
    /// An empty one, if the machine has any.
    pub(super) fn open() -> Result<Option<Self>> {
        let text = fs::read_to_string("/proc/self/cgroup").context("reading /proc/self/cgroup")?;
        let own = text.lines().find_map(|line| line.split_once(":memory:/"));
        let Some(own) = own.map(|(_, own)| Path::new(ACCOUNTS).join(own)) else { return Ok(None) };
        if !own.join(KERNEL_BYTES).exists() {
            return Ok(None);
        }
        let path = own.join(format!("sheave-bench-{}", process::id()));
        cgroup::create(&path)?;
        Ok(Some(Self { own, path }))
    }

    /// Whoever is started meanwhile is on it.
    pub(super) fn charge(&self, start: impl FnOnce() -> Result<()>) -> Result<()> {
        // Of the calling thread, which is 0 here; a child is where the thread is that makes it.
        let enter = |directory: &Path| {
            let tasks = directory.join("tasks");
            fs::write(&tasks, "0").with_context(|| format!("writing {}", tasks.display()))
        };
        enter(&self.path)?;
        let started = start();
        enter(&self.own)?;
        started
    }

    /// What is on it.
    pub(super) fn kb(&self) -> Result<f64> {
        let path = self.path.join(KERNEL_BYTES);
        let text = fs::read_to_string(&path).with_context(|| format!("reading {}", path.display()))?;
        Ok(text.trim().parse::<u64>().with_context(|| format!("{}: {text}", path.display()))? as f64 / 1024.0)
    }
}

impl Drop for Account {
    fn drop(&mut self) {
        for _ in 0..ENDINGS {
            if fs::remove_dir(&self.path).is_ok() {
                return;
            }
            thread::sleep(Duration::from_millis(20));
        }
        eprintln!("{} stays: somebody is in it", self.path.display());
    }
}

/// A5: what the kernel has allocated, when that has come to rest. The control plane stands still meanwhile.
pub(super) fn kernel_kb(hub: &Hub) -> Result<f64> {
    still(|frozen| hub.freeze(frozen), settled)?
}

fn settled() -> Result<f64> {
    let mut readings = Vec::new();
    while readings.len() < READINGS_MAX {
        give_back()?;
        thread::sleep(READING);
        let text = fs::read_to_string("/proc/meminfo").context("reading /proc/meminfo")?;
        let kb: u64 = FIELDS.iter().map(|field| field_of(&text, field)).sum::<Result<u64>>()?;
        readings.push(kb);
        let last = readings.iter().rev().take(EQUALS);
        if readings.len() >= EQUALS
            && last.clone().max().zip(last.min()).is_some_and(|(high, low)| high - low <= EQUAL_KB)
        {
            break;
        }
    }
    let mut last: Vec<_> = readings.iter().rev().take(EQUALS).map(|kb| *kb as f64).collect();
    Ok(median(&mut last))
}

/// Has the kernel give back what it only keeps for later: names and files that nobody uses, and slabs without objects. What
/// is cached of files stays, or the next program would have to be read from the disk.
fn give_back() -> Result<()> {
    fs::write("/proc/sys/vm/drop_caches", "2").context("writing /proc/sys/vm/drop_caches")?;
    // Not every kernel has it; readings are noisier then.
    for cache in fs::read_dir("/sys/kernel/slab").into_iter().flatten().flatten() {
        // A cache may go meanwhile.
        let _ = fs::write(cache.path().join("shrink"), "1");
    }
    Ok(())
}
