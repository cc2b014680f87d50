//! Control groups (version 2): cgroup programs act on these, so every node of a lab is one directory and its pods are
//! directories below.

use std::{
    fs, io,
    path::{Path, PathBuf},
    thread,
    time::{Duration, Instant},
};

use anyhow::{Context, Result, bail};
use nix::{
    sys::signal::{Signal, kill},
    unistd::Pid,
};

/// A process that was killed leaves its cgroup a moment later.
const REMOVAL_DEADLINE: Duration = Duration::from_secs(5);

/// Where the cgroup version 2 hierarchy is mounted (`/sys/fs/cgroup`, or `unified` below it on a hybrid machine).
pub fn mount_point() -> Result<PathBuf> {
    let mounts = fs::read_to_string("/proc/self/mounts").context("reading /proc/self/mounts")?;
    let found = mounts.lines().find_map(|line| {
        let mut fields = line.split(' ').skip(1);
        let path = fields.next()?;
        (fields.next()? == "cgroup2").then(|| PathBuf::from(path.replace("\\040", " ")))
    });
    let Some(path) = found else {
        bail!("no cgroup version 2 hierarchy is mounted: `mount -t cgroup2 none /sys/fs/cgroup` as root");
    };
    Ok(path)
}

/// Makes a cgroup directory.
pub fn create(path: &Path) -> Result<()> {
    fs::create_dir(path).with_context(|| {
        format!("making the cgroup {}: the lab needs root and a writable cgroup hierarchy", path.display())
    })
}

/// Stops every process in a cgroup and in those below it, or lets them go on; returns when they have stopped.
pub fn freeze(path: &Path, frozen: bool) -> Result<()> {
    let file = path.join("cgroup.freeze");
    let context = || format!("writing {}", file.display());
    fs::write(&file, if frozen { "1" } else { "0" }).with_context(context)?;
    let deadline = Instant::now() + REMOVAL_DEADLINE;
    let wanted = format!("frozen {}\n", u8::from(frozen));
    let events = path.join("cgroup.events");
    while !fs::read_to_string(&events)
        .with_context(|| format!("reading {}", events.display()))?
        .contains(&wanted)
    {
        if Instant::now() > deadline {
            bail!("{} is not {}", path.display(), wanted.trim_end());
        }
        thread::sleep(Duration::from_millis(1));
    }
    Ok(())
}

/// Ends every process in a cgroup and in those below it.
pub fn kill_all(path: &Path) {
    for directory in directories(path) {
        let Ok(members) = fs::read_to_string(directory.join("cgroup.procs")) else { continue };
        // A process of another pid namespace shows as 0.
        for pid in members.lines().filter_map(|line| line.parse::<i32>().ok()).filter(|pid| *pid > 0) {
            // Gone already is as good.
            let _ = kill(Pid::from_raw(pid), Signal::SIGKILL);
        }
    }
}

/// Ends every process in a cgroup and removes it with all below it.
pub fn remove(path: &Path) -> Result<()> {
    let deadline = Instant::now() + REMOVAL_DEADLINE;
    loop {
        kill_all(path);
        let failure =
            directories(path).into_iter().rev().find_map(|directory| match fs::remove_dir(&directory) {
                Err(error) if error.kind() != io::ErrorKind::NotFound => Some((directory, error)),
                Ok(()) | Err(_) => None,
            });
        match failure {
            None => return Ok(()),
            Some((directory, error)) if Instant::now() > deadline => {
                return Err(error).with_context(|| format!("removing the cgroup {}", directory.display()));
            }
            Some(_) => thread::sleep(Duration::from_millis(5)),
        }
    }
}

/// The directory and all below it, parents first.
fn directories(path: &Path) -> Vec<PathBuf> {
    let mut found = vec![path.to_owned()];
    let mut next = 0;
    while let Some(directory) = found.get(next).cloned() {
        next += 1;
        let Ok(entries) = fs::read_dir(&directory) else { continue };
        found.extend(entries.flatten().map(|entry| entry.path()).filter(|path| path.is_dir()));
    }
    found
}
