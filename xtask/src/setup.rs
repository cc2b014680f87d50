//! Brings what the other verbs need. Each item is looked for first, so a second call only looks.

use std::{
    env, fs,
    path::{Path, PathBuf},
    process::Command,
};

use anyhow::{Context, Result, bail};

use sheave_tests::cache;

use crate::shell::{cargo, is_on_path, output, root, run};

/// The linker of the kernel programs. Its LLVM must be that of the pinned compiler: change both together.
/// `proxy-agent/build.rs` looks for it at the same place.
const BPF_LINKER: (&str, &str) = ("bpf-linker", "0.10.4");

/// Checks licences and sources of dependencies.
const CARGO_DENY: (&str, &str) = ("cargo-deny", "0.20.2");

/// Components of the toolchain, each with a file that shows it is there.
const COMPONENTS: [(&str, &str); 3] = [
    ("rust-src", "lib/rustlib/src/rust/library/core/Cargo.toml"),
    ("clippy", "bin/cargo-clippy"),
    ("rustfmt", "bin/rustfmt"),
];

/// Commands that the lab and the tests run, and the Debian packages that have them.
const COMMANDS: [(&str, &str); 7] = [
    ("ip", "iproute2"),
    ("curl", "curl"),
    ("dig", "bind9-dnsutils"),
    ("nft", "nftables"),
    ("ethtool", "ethtool"),
    ("iperf3", "iperf3"),
    ("xtables-legacy-multi", "iptables"),
];

/// What the benchmark runs besides; the package that draws depends on a font.
const BENCH_COMMANDS: [(&str, &str); 2] = [("wrk", "wrk"), ("rsvg-convert", "librsvg2-bin")];

/// What boots a virtual machine, besides what every Debian has.
const VM_COMMANDS: [(&str, &str); 3] =
    [("qemu-system-x86_64", "qemu-system-x86"), ("cpio", "cpio"), ("strip", "binutils")];

/// What building needs.
pub(crate) fn toolchain() -> Result<()> {
    components()?;
    tool(BPF_LINKER)?;
    Ok(())
}

/// What the lab and the tests run.
pub(crate) fn commands() -> Result<()> {
    bring(&COMMANDS)
}

/// What the benchmark runs.
pub(crate) fn bench_commands() -> Result<()> {
    bring(&[&COMMANDS[..], &BENCH_COMMANDS].concat())
}

/// What a virtual machine needs of this one.
pub(crate) fn vm_commands() -> Result<()> {
    bring(&VM_COMMANDS)
}

fn bring(commands: &[(&str, &str)]) -> Result<()> {
    let missing: Vec<_> = commands.iter().filter(|(command, _)| !is_on_path(command)).collect();
    if missing.is_empty() {
        return Ok(());
    }
    let packages: Vec<_> = missing.iter().map(|(_, package)| *package).collect();
    if !can_install()? {
        let commands: Vec<_> = missing.iter().map(|(command, _)| *command).collect();
        bail!(
            "missing commands: {}. As root on Debian or Ubuntu: apt-get install {}",
            commands.join(", "),
            packages.join(" ")
        );
    }
    install(&packages)
}

/// Whether Debian packages can be installed here.
pub(crate) fn can_install() -> Result<bool> {
    Ok(is_root()? && is_on_path("apt-get"))
}

/// Installs Debian packages.
pub(crate) fn install(packages: &[&str]) -> Result<()> {
    println!("installing {}", packages.join(", "));
    let install = || {
        let mut command = Command::new("apt-get");
        command
            .args(["install", "--yes", "--quiet=2", "--no-install-recommends"])
            .args(packages)
            .env("DEBIAN_FRONTEND", "noninteractive");
        command
    };
    // A fresh machine has no package lists yet.
    if run(&mut install()).is_err() {
        println!("once more with fresh package lists");
        run(Command::new("apt-get").args(["update", "--quiet=2"]))?;
        run(&mut install())?;
    }
    Ok(())
}

/// `cargo-deny`, ready to run.
pub(crate) fn cargo_deny() -> Result<PathBuf> {
    tool(CARGO_DENY)
}

fn components() -> Result<()> {
    let sysroot = output(Command::new("rustc").args(["--print", "sysroot"]).current_dir(root()?))?;
    let sysroot = PathBuf::from(String::from_utf8(sysroot).context("rustc's sysroot")?.trim());
    let missing: Vec<_> = COMPONENTS
        .into_iter()
        .filter(|(_, file)| !sysroot.join(file).is_file())
        .map(|(component, _)| component)
        .collect();
    if missing.is_empty() {
        return Ok(());
    }
    println!("adding to the toolchain: {}", missing.join(", "));
    run(Command::new("rustup").args(["component", "add"]).args(&missing).current_dir(root()?))
        .with_context(|| format!("this compiler lacks {}; rustup brings them", missing.join(", ")))
}

/// A tool built by cargo, in a directory named after its version, in the user's cache: every checkout uses the same.
fn tool((name, version): (&str, &str)) -> Result<PathBuf> {
    let directory = cache::directory()?.join(format!("{name}-{version}"));
    let program = directory.join("bin").join(name);
    if is_program(&program) {
        return Ok(program);
    }
    println!("building {name} {version}, once for this user: one to four minutes");
    fs::create_dir_all(&directory).with_context(|| format!("making {}", directory.display()))?;
    let mut install = cargo()?;
    install
        .args(["install", "--locked", "--quiet", "--root"])
        .arg(&directory)
        .arg(format!("{name}@{version}"))
        // It is run by its path; cargo would warn that it is not on PATH.
        .env("PATH", with_directory(&directory.join("bin"))?);
    run(&mut install)?;
    if !is_program(&program) {
        bail!("`cargo install` did not make {}", program.display());
    }
    Ok(program)
}

fn is_program(path: &Path) -> bool {
    fs::metadata(path).is_ok_and(|file| file.is_file() && file.len() > 0)
}

fn with_directory(directory: &Path) -> Result<std::ffi::OsString> {
    let path = env::var_os("PATH").unwrap_or_default();
    env::join_paths(env::split_paths(&path).chain([directory.to_owned()]))
        .context("a directory's name in PATH")
}

fn is_root() -> Result<bool> {
    Ok(output(Command::new("id").arg("-u"))?.trim_ascii() == b"0")
}
