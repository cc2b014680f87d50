//! The Debian packages of the guest's root file system, and how packages get here: by this machine's own package sources,
//! into the cache, without installing anything.

use std::{
    fs,
    path::{Path, PathBuf},
    process::{Command, Stdio},
};

use anyhow::{Context, Result, ensure};
use sheave_tests::cache;

use crate::shell::{output, run};

/// What the lab and the tests run, a shell, and what loads modules.
const PACKAGES: [&str; 12] = [
    "bind9-dnsutils",
    "busybox-static",
    "curl",
    "dash",
    "ethtool",
    "iperf3",
    "iproute2",
    "iptables",
    "kmod",
    "nftables",
    "wireguard-tools",
    "wrk",
];

/// What packages bring along and nobody here reads: the machine lives in memory.
const LEFT_OUT: [&str; 6] = [
    "./usr/share/doc",
    "./usr/share/man",
    "./usr/share/locale",
    "./usr/share/perl",
    "./usr/lib/*/perl*",
    "./usr/lib/*/gconv",
];

/// Directories that packages of one Debian release have at the root and those of another below `/usr`.
const MERGED: [&str; 4] = ["bin", "sbin", "lib", "lib64"];

/// The directory of everything that is kept for virtual machines.
pub(super) fn cache() -> Result<PathBuf> {
    Ok(cache::directory()?.join("vm"))
}

/// The archive of the root file system without kernel and our own files.
pub(super) fn bring() -> Result<PathBuf> {
    let cache = cache()?;
    let (archive, recipe) = (cache.join("packages.cpio"), cache.join("packages.recipe"));
    let wanted = [&PACKAGES[..], &LEFT_OUT, &MERGED].concat().join("\n");
    // The archive of an older source tree lacks what has been added since.
    if archive.is_file() && fs::read_to_string(&recipe).is_ok_and(|made_by| made_by == wanted) {
        return Ok(archive);
    }
    let downloads = cache.join("packages");
    // As if nothing were installed: so they come with all that they depend on.
    download(&downloads, &PACKAGES, true)?;
    let root = fresh(&cache.join("packages.root"))?;
    for name in MERGED {
        fs::create_dir_all(root.join("usr").join(name))
            .context("making a directory of the root file system")?;
        std::os::unix::fs::symlink(format!("usr/{name}"), root.join(name)).context("linking to /usr")?;
    }
    for package in debs(&downloads)? {
        unpack(&package, &root)?;
    }
    let shell = root.join("usr/bin/sh");
    if !shell.is_symlink() {
        // Debian makes it when it installs the package.
        std::os::unix::fs::symlink("dash", &shell).context("making a shell")?;
    }
    pack(&root, &archive)?;
    fs::remove_dir_all(&root).context("removing what was packed")?;
    fs::remove_dir_all(&downloads).context("removing what was unpacked")?;
    fs::write(&recipe, wanted).with_context(|| format!("writing {}", recipe.display()))?;
    Ok(archive)
}

/// Downloads packages, and with `closure` what they depend on.
pub(super) fn download(to: &Path, packages: &[&str], closure: bool) -> Result<()> {
    println!("downloading {}", packages.join(", "));
    fs::create_dir_all(to.join("partial")).with_context(|| format!("making {}", to.display()))?;
    let mut command = if closure {
        let nothing = to.join("status");
        fs::write(&nothing, "").with_context(|| format!("writing {}", nothing.display()))?;
        let mut command = Command::new("apt-get");
        command.arg(option("Dir::State::status", &nothing)).arg(option("Dir::Cache::archives", to)).args([
            "-o",
            "Debug::NoLocking=1",
            "--download-only",
            "--yes",
            "--no-install-recommends",
            "install",
        ]);
        command
    } else {
        let mut command = Command::new("apt-get");
        command.arg("download").current_dir(to);
        command
    };
    // As root it would say that it cannot be somebody else in a directory of root's.
    command.args(["-o", "APT::Sandbox::User=root", "--quiet=2"]);
    run(command.args(packages).stdout(Stdio::null())).context(
        "no package came; `apt-get update` as root may be what is missing, or package sources without this one",
    )
}

fn option(name: &str, value: &Path) -> String {
    format!("-o{name}={}", value.display())
}

/// The packages in a directory.
pub(super) fn debs(directory: &Path) -> Result<Vec<PathBuf>> {
    let entries = fs::read_dir(directory).with_context(|| format!("reading {}", directory.display()))?;
    let mut debs = Vec::new();
    for entry in entries {
        let path = entry.context("reading a directory")?.path();
        if path.extension().is_some_and(|extension| extension == "deb") {
            debs.push(path);
        }
    }
    debs.sort();
    Ok(debs)
}

/// Unpacks a package.
pub(super) fn unpack(package: &Path, root: &Path) -> Result<()> {
    let mut reading = Command::new("dpkg-deb");
    let mut reading = reading
        .arg("--fsys-tarfile")
        .arg(package)
        .stdout(Stdio::piped())
        .spawn()
        .context("starting dpkg-deb")?;
    let tar = reading.stdout.take().context("dpkg-deb's output")?;
    let mut unpacking = Command::new("tar");
    unpacking.args(["--extract", "--keep-directory-symlink", "--no-same-owner", "--directory"]).arg(root);
    for left_out in LEFT_OUT {
        unpacking.arg(format!("--exclude={left_out}"));
    }
    run(unpacking.stdin(tar)).with_context(|| format!("unpacking {}", package.display()))?;
    let status = reading.wait().context("waiting for dpkg-deb")?;
    ensure!(status.success(), "{} cannot be read", package.display());
    Ok(())
}

/// An empty directory.
pub(super) fn fresh(path: &Path) -> Result<PathBuf> {
    if path.exists() {
        fs::remove_dir_all(path).with_context(|| format!("removing {}", path.display()))?;
    }
    fs::create_dir_all(path).with_context(|| format!("making {}", path.display()))?;
    Ok(path.to_owned())
}

/// Packs a directory as the kernel wants it; several such archives, one after the other, are one root file system. Whole
/// before it has its name.
pub(super) fn pack(root: &Path, archive: &Path) -> Result<()> {
    let unfinished = archive.with_extension("unfinished");
    let file = fs::File::create(&unfinished).with_context(|| format!("making {}", unfinished.display()))?;
    let names = output(Command::new("find").arg(".").current_dir(root))?;
    let mut command = Command::new("cpio");
    let mut packing = command
        .args(["--create", "--format=newc", "--quiet", "--owner=+0:+0"])
        .current_dir(root)
        .stdin(Stdio::piped())
        .stdout(file)
        .spawn()
        .context("starting cpio")?;
    let mut input = packing.stdin.take().context("cpio's input")?;
    std::io::Write::write_all(&mut input, &names).context("telling cpio what to pack")?;
    drop(input);
    let status = packing.wait().context("waiting for cpio")?;
    ensure!(status.success(), "cpio failed ({status})");
    fs::rename(&unfinished, archive).with_context(|| format!("naming {}", archive.display()))
}
