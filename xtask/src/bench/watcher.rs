//! The least that a change of a file takes until a process on the other CPU can know of it: somebody is woken, reads the
//! file and says so in memory.

use std::{
    fs,
    os::fd::AsFd,
    path::Path,
    sync::atomic::{AtomicBool, AtomicU32, Ordering},
    thread,
};

use anyhow::{Context, Result, anyhow, ensure};
use nix::{
    poll::{PollFd, PollFlags, poll},
    sys::inotify::{AddWatchFlags, InitFlags, Inotify},
};
use sheave_tests::{engine::monotonic_ns, measure::pin};

use super::{control::rest, go_on, world::CLIENT_CPU};

/// A change that is not seen for so long is not seen.
const LATE_AFTER_NS: u64 = 10_000_000_000;

/// How soon the watcher knows that it is over.
const STOP_AFTER_MS: u8 = 100;

/// From just before each `rename` of a file with `text` to a look that knows of it.
pub(crate) fn renames(directory: &Path, text: &[u8], count: u32) -> Result<Vec<u64>> {
    let (unfinished, path) = (directory.join(".new"), directory.join("watched"));
    let flags = InitFlags::IN_CLOEXEC | InitFlags::IN_NONBLOCK;
    let inotify = Inotify::init(flags).context("inotify")?;
    inotify.add_watch(directory, AddWatchFlags::IN_MOVED_TO).context("inotify")?;
    let (seen, over) = (AtomicU32::new(0), AtomicBool::new(false));
    let watch = || -> Result<()> {
        while !over.load(Ordering::Relaxed) {
            let mut fds = [PollFd::new(inotify.as_fd(), PollFlags::POLLIN)];
            if poll(&mut fds, STOP_AFTER_MS).context("waiting for inotify")? > 0 {
                inotify.read_events().context("reading inotify's events")?;
                fs::read(&path).with_context(|| format!("reading {}", path.display()))?;
                seen.fetch_add(1, Ordering::Release);
            }
        }
        Ok(())
    };
    let look = |round| -> Result<u64> {
        pin(Some(CLIENT_CPU))?;
        let begin_ns = monotonic_ns();
        while seen.load(Ordering::Acquire) < round {
            ensure!(monotonic_ns() - begin_ns < LATE_AFTER_NS, "nobody saw the change");
        }
        Ok(monotonic_ns())
    };
    let change = |round| -> Result<u64> {
        go_on()?;
        fs::write(&unfinished, text).with_context(|| format!("writing {}", unfinished.display()))?;
        thread::scope(|scope| {
            let looks = scope.spawn(|| look(round));
            rest(round);
            let begin_ns = monotonic_ns();
            fs::rename(&unfinished, &path)?;
            let end_ns = looks.join().map_err(|_| anyhow!("who looked panicked"))??;
            Ok(end_ns - begin_ns)
        })
    };
    thread::scope(|scope| {
        let watcher = scope.spawn(watch);
        let live_ns = (1..=count).map(change).collect();
        over.store(true, Ordering::Relaxed);
        watcher.join().map_err(|_| anyhow!("the watcher panicked"))??;
        live_ns
    })
}
