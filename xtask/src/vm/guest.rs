//! What of this source tree is in the machine: the binaries that the command needs, and what runs first.

use std::{
    fs,
    os::unix::fs::PermissionsExt,
    path::{Path, PathBuf},
    process::Command,
};

use anyhow::{Context, Result};
use sheave_tests::kubernetes::programs::PROGRAMS;

use super::packages::{cache, fresh, pack};
use crate::{
    build::{Profile, build, suite},
    shell::{root, run},
};

/// The first process: mounts, modules, the command, its status to the second serial line, off.
const INIT: &str = r"#!/bin/busybox sh
/bin/busybox mkdir -p /busybox /proc /sys /dev /tmp /run /root /var
/bin/busybox --install -s /busybox
# The real ones come first; only within this shell its own do.
export PATH=/sheave:/usr/sbin:/usr/bin:/busybox
mount -t proc proc /proc
mount -t sysfs sys /sys
mount -t devtmpfs dev /dev
mkdir -p /dev/pts /dev/shm
ln -s /proc/self/fd /dev/fd
ln -s fd/0 /dev/stdin
ln -s fd/1 /dev/stdout
ln -s fd/2 /dev/stderr
mount -t devpts pts /dev/pts
mount -t tmpfs tmp /tmp
mount -t tmpfs run /run
mount -t cgroup2 cgroup /sys/fs/cgroup
mount -t bpf bpf /sys/fs/bpf
stty -F /dev/ttyS0 raw -echo
/usr/sbin/depmod
# The one that nothing asks for by itself.
/usr/sbin/modprobe br_netfilter
ip link set lo up
dash /sheave/command
echo $? >/dev/ttyS1
sync
poweroff -f
";

/// The guest's own part of the root file system.
pub(super) struct Guest {
    /// Its archive.
    pub(super) archive: PathBuf,
}

/// Builds what the command needs, and packs it.
pub(super) fn prepare(command: &[String]) -> Result<Guest> {
    let cache = cache()?;
    let home = fresh(&cache.join(format!("guest-{}", std::process::id())))?;
    let guest = Guest { archive: home.with_extension("cpio") };
    let packed = fill(&home, command).and_then(|()| pack(&home, &guest.archive));
    let removed = fs::remove_dir_all(&home).context("removing what was packed");
    packed.and(removed).map(|()| guest)
}

impl Drop for Guest {
    fn drop(&mut self) {
        // Nothing to be done about it; the next one has another name.
        let _ = fs::remove_file(&self.archive);
    }
}

fn fill(home: &Path, command: &[String]) -> Result<()> {
    let own = home.join("sheave");
    fs::create_dir_all(&own).context("making a directory of the guest")?;
    for (name, binary) in binaries(command)? {
        // Most of a program built for development is line tables, and the machine lives in memory.
        run(Command::new("strip").arg("--strip-debug").arg("-o").arg(own.join(name)).arg(binary))?;
    }
    write(&home.join("init"), INIT)?;
    write(&own.join("command"), &script(command))
}

/// The programs, and their names in the machine: a suite's file is named after its contents too.
fn binaries(command: &[String]) -> Result<Vec<(&str, PathBuf)>> {
    let first = command.first().map(String::as_str).unwrap_or_default();
    // What is measured is what users have.
    let binaries = build(if first == BENCH { Profile::Release } else { Profile::Dev })?;
    let mut files = vec![("sheave", binaries.sheave), ("lab-client", binaries.lab_client)];
    if wants_kubernetes(command) {
        for program in PROGRAMS {
            files.push((program.name, program.path()?));
        }
    }
    if is_verb(first) {
        files.push(("xtask", std::env::current_exe().context("asking for this program's own path")?));
    } else if is_suite(first)? {
        files.push((first, suite(first)?));
    }
    Ok(files)
}

/// Whether the command runs kube-proxy.
pub(super) fn wants_kubernetes(command: &[String]) -> bool {
    command.first().is_some_and(|first| first == BENCH) && !command.iter().any(|word| word == "--alone")
}

/// The verb that measures.
const BENCH: &str = "bench";

/// Verbs of this program that need nothing but binaries.
fn is_verb(first: &str) -> bool {
    ["demo", BENCH].contains(&first)
}

fn is_suite(first: &str) -> Result<bool> {
    let suites = root()?.join("tests/suites");
    Ok(suites.join(first).join("main.rs").is_file() || suites.join(first).with_extension("rs").is_file())
}

/// What the first process reads in.
fn script(command: &[String]) -> String {
    let mut words: Vec<_> = command.iter().map(|word| quoted(word)).collect();
    if command.first().is_some_and(|first| is_verb(first)) {
        words.insert(0, "xtask".to_owned());
    }
    format!(
        "export HOME=/root TMPDIR=/tmp RUST_BACKTRACE=1\n\
         export SHEAVE_BIN=/sheave/sheave SHEAVE_LAB_CLIENT=/sheave/lab-client SHEAVE_PREPARED=1\n\
         export CARGO_MANIFEST_DIR=/root/sheave/xtask\n\
         mkdir -p $CARGO_MANIFEST_DIR\n\
         cd /root\n{} </dev/null >/dev/ttyS0 2>&1\n",
        words.join(" ")
    )
}

/// A word of a command for the shell.
fn quoted(word: &str) -> String {
    format!("'{}'", word.replace('\'', r"'\''"))
}

fn write(path: &Path, text: &str) -> Result<()> {
    fs::write(path, text).with_context(|| format!("writing {}", path.display()))?;
    fs::set_permissions(path, fs::Permissions::from_mode(0o755)).context("making a script executable")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn words_reach_the_shell_as_they_are() {
        assert_eq!(quoted("it's $HOME"), r"'it'\''s $HOME'");
        let script = script(&["demo".to_owned()]);
        assert!(script.contains("\nxtask 'demo' <"), "{script}");
    }
}
