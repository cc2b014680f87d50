//! What a change must pass besides the tests.

use std::{env, process::Command};

use anyhow::{Result, ensure};

use crate::{
    setup,
    shell::{cargo, part, root, run},
};

/// A part: its name, and what it does.
type Part = (&'static str, fn() -> Result<()>);

const PARTS: [Part; 4] = [
    ("format", format),
    ("clippy", clippy),
    ("clippy of the kernel programs", kernel_programs),
    ("licences and sources of dependencies", dependencies),
];

/// Checks everything, also after a part that failed.
pub(crate) fn check() -> Result<()> {
    let mut failed = Vec::new();
    for (name, work) in PARTS {
        if let Err(error) = part(name, work) {
            eprintln!("{error:#}");
            failed.push(name);
        }
    }
    ensure!(failed.is_empty(), "failed: {}", failed.join(", "));
    Ok(())
}

fn format() -> Result<()> {
    let workspace = run(cargo()?.args(["fmt", "--all", "--check"]));
    run(cargo()?.args(["fmt", "--check", "--manifest-path", "proxy-ebpf/Cargo.toml"])).and(workspace)
}

fn clippy() -> Result<()> {
    // One suite is none of those that `cargo test` runs, and so none of "all" targets.
    let targets = ["clippy", "--workspace", "--all-targets", "--test", "modules"];
    run(cargo()?.args(targets).args(["--quiet", "--", "-D", "warnings"]))
}

fn dependencies() -> Result<()> {
    let deny = setup::cargo_deny()?;
    for manifest in ["Cargo.toml", "proxy-ebpf/Cargo.toml"] {
        run(Command::new(&deny)
            .current_dir(root()?)
            .args(["--manifest-path", manifest, "--log-level", "error", "--locked"])
            .args(["--config", ".cargo/deny.toml", "check", "bans", "licenses", "sources"]))?;
    }
    Ok(())
}

/// The kernel programs are a workspace of another target; `proxy-agent/build.rs` builds them with the same flags.
fn kernel_programs() -> Result<()> {
    let flags =
        [&*format!("--cfg=bpf_target_arch=\"{}\"", env::consts::ARCH), "-Ctarget-cpu=v3"].join("\x1f");
    run(cargo()?
        .current_dir(root()?.join("proxy-ebpf"))
        .args(["clippy", "--quiet", "--release", "--bins", "--locked", "-Zbuild-std=core"])
        .args(["--target", "bpfel-unknown-none", "--target-dir"])
        .arg(root()?.join("target/bpf-lint"))
        .args(["--", "-D", "warnings"])
        // `-Z` on the pinned stable compiler, for this command only.
        .env("RUSTC_BOOTSTRAP", "1")
        .env("CARGO_ENCODED_RUSTFLAGS", flags))
}
