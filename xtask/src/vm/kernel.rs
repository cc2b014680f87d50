//! Kernels of Debian, those made for virtual machines.

use std::{
    fs,
    path::{Path, PathBuf},
    process::Command,
};

use anyhow::{Context, Result};

use super::{
    Kernel,
    packages::{cache, debs, download, fresh, pack, unpack},
};
use crate::shell::output;

/// What is of use without hardware: protocols, filters, virtual devices.
const MODULES: [&str; 5] =
    ["kernel/net", "kernel/drivers/net", "kernel/lib", "kernel/crypto", "kernel/arch/x86/crypto"];

/// A kernel that is here.
pub(super) struct Image {
    /// What it says of itself with `uname -r`.
    pub(super) release: String,
    /// The kernel.
    pub(super) path: PathBuf,
    /// Archive of its modules.
    pub(super) modules: PathBuf,
}

/// Brings a kernel, from the cache if the package sources have no newer one.
pub(super) fn bring(wanted: Kernel) -> Result<Image> {
    let offered = offered()?;
    let (_, package) = offered.iter().rfind(|(version, _)| is(wanted, version)).with_context(|| {
        let versions: Vec<_> = offered.iter().map(|(_, package)| package.as_str()).collect();
        format!("the package sources have no such kernel; they have {}", versions.join(", "))
    })?;
    let home = cache()?.join(package);
    let image = Image {
        release: package.trim_start_matches("linux-image-").to_owned(),
        path: home.join("vmlinuz"),
        modules: home.join("modules.cpio"),
    };
    if image.path.is_file() {
        return Ok(image);
    }
    fresh(&home)?;
    download(&home, &[package], false)?;
    let (root, kept) = (fresh(&home.join("root"))?, fresh(&home.join("modules"))?);
    for package in debs(&home)? {
        unpack(&package, &root)?;
        fs::remove_file(&package).context("removing what was unpacked")?;
    }
    keep_modules(&root, &kept)?;
    pack(&kept, &image.modules)?;
    let kernel = root.join("boot").join(format!("vmlinuz-{}", image.release));
    // The last but for cleaning: a kernel that is there is complete.
    fs::rename(&kernel, &image.path)
        .with_context(|| format!("no kernel in {package}: {}", kernel.display()))?;
    for used in [root, kept] {
        fs::remove_dir_all(&used).context("removing what was packed")?;
    }
    Ok(image)
}

/// Moves the modules of use to a root file system of their own.
fn keep_modules(from: &Path, to: &Path) -> Result<()> {
    for top in ["lib/modules", "usr/lib/modules"].map(|top| from.join(top)).iter().filter(|top| top.is_dir())
    {
        for release in fs::read_dir(top).context("reading the modules")? {
            let release = release.context("reading the modules")?;
            // The archive of packages has /lib as a link, which this directory must not take the place of.
            let kept = to.join("usr/lib/modules").join(release.file_name());
            for part in MODULES {
                let (part, kept) = (release.path().join(part), kept.join(part));
                if let Some(parent) = kept.parent().filter(|_| part.is_dir()) {
                    fs::create_dir_all(parent).context("making a directory for modules")?;
                    fs::rename(&part, &kept).context("moving modules")?;
                }
            }
            for list in ["modules.order", "modules.builtin", "modules.builtin.modinfo"] {
                fs::rename(release.path().join(list), kept.join(list)).context("moving a list of modules")?;
            }
        }
    }
    Ok(())
}

/// The kernels that the package sources have, oldest first.
fn offered() -> Result<Vec<(Vec<u32>, String)>> {
    let architecture = output(Command::new("dpkg").arg("--print-architecture"))?;
    let architecture = String::from_utf8(architecture).context("dpkg's architecture")?;
    let names = format!("^linux-image-[0-9].*-cloud-{}$", architecture.trim());
    let found = output(Command::new("apt-cache").args(["search", "--names-only", &names]))?;
    let found = String::from_utf8(found).context("apt-cache's output")?;
    let mut kernels: Vec<_> = found
        .lines()
        .filter_map(|line| line.split_whitespace().next())
        .map(|package| (version(package), package.to_owned()))
        // Shorter ones are names of no kernel but of "the newest of them".
        .filter(|(version, _)| version.len() > 2)
        .collect();
    kernels.sort();
    Ok(kernels)
}

/// The numbers of a package's name up to the architecture's.
fn version(package: &str) -> Vec<u32> {
    let numbers = package.split("-cloud-").next().unwrap_or_default();
    numbers.split(|c: char| !c.is_ascii_digit()).filter_map(|number| number.parse().ok()).collect()
}

fn is(wanted: Kernel, version: &[u32]) -> bool {
    match wanted {
        Kernel::Linux6_1 => version.starts_with(&[6, 1]),
        Kernel::Linux6_12 => version.starts_with(&[6, 12]),
        Kernel::Newest => true,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn versions_of_packages() {
        let old = version("linux-image-6.1.0-47-cloud-amd64");
        let new = version("linux-image-6.12.117+deb12-cloud-amd64");
        assert_eq!((&old[..], &new[..]), (&[6, 1, 0, 47][..], &[6, 12, 117, 12][..]));
        assert!(old < new && is(Kernel::Linux6_1, &old) && !is(Kernel::Linux6_1, &new));
        assert!(is(Kernel::Linux6_12, &new) && is(Kernel::Newest, &new));
        assert_eq!(version("linux-image-6.12-cloud-amd64").len(), 2);
    }
}
