//! Builds the kernel programs and puts the object where `kernel::programs` embeds it.
//!
//! A nested cargo with flags of its own: the programs are another target, need `-Zbuild-std`, and get two flags that
//! `aya-build` cannot pass on (see below).

use std::env;
use std::error::Error;
use std::path::{Path, PathBuf};
use std::process::Command;

/// Must fit the LLVM of the pinned rustc.
const BPF_LINKER: &str = "bpf-linker-0.10.4";

fn main() -> Result<(), Box<dyn Error>> {
    let manifest_dir = PathBuf::from(env::var("CARGO_MANIFEST_DIR")?);
    let root = manifest_dir.parent().ok_or("proxy-agent has no parent folder")?;
    let ebpf = root.join("proxy-ebpf");
    for path in ["proxy-ebpf/src", "proxy-ebpf/Cargo.toml", "proxy-ebpf/Cargo.lock", "proxy-common/src"] {
        println!("cargo::rerun-if-changed={}", root.join(path).display());
    }
    for variable in ["BPF_LINKER", "XDG_CACHE_HOME", "HOME", "PATH"] {
        println!("cargo::rerun-if-env-changed={variable}");
    }

    let linker = find_linker(root).ok_or(
        "bpf-linker is missing, without which the kernel programs cannot be built. Run: cargo xtask setup",
    )?;
    // The same object directory for all profiles of the agent: the programs are always built optimized.
    let target_dir = root.join("target/bpf");
    let flags = [
        &*format!("--cfg=bpf_target_arch=\"{}\"", env::var("CARGO_CFG_TARGET_ARCH")?),
        "-Cdebuginfo=2",
        // 32-bit ALU and jumps (kernel 5.1): the verifier tracks 32-bit values better.
        "-Ctarget-cpu=v3",
        "-Clink-arg=--btf",
        // Without it every zeroed struct and every comparison becomes a byte loop.
        "-Clink-arg=--disable-expand-memcpy-in-order",
    ]
    .join("\x1f");
    let mut cargo = Command::new(env::var_os("CARGO").ok_or("CARGO is not set")?);
    cargo
        .current_dir(&ebpf)
        .args(["build", "--quiet", "--release", "--bins", "--locked", "-Zbuild-std=core"])
        .args(["--target", "bpfel-unknown-none", "--target-dir"])
        .arg(&target_dir)
        // build-std and asm are unstable; this reaches the nested cargo only.
        .env("RUSTC_BOOTSTRAP", "1")
        .env("CARGO_ENCODED_RUSTFLAGS", flags)
        .env("CARGO_TARGET_BPFEL_UNKNOWN_NONE_LINKER", &linker);
    for variable in ["RUSTC", "RUSTC_WRAPPER", "RUSTC_WORKSPACE_WRAPPER", "CARGO_BUILD_TARGET", "RUSTFLAGS"] {
        cargo.env_remove(variable);
    }
    let status = cargo.status()?;
    if !status.success() {
        return Err(format!(
            "building the kernel programs in {} failed ({status}). If rust-src is missing, run: cargo xtask setup",
            ebpf.display()
        )
        .into());
    }
    let object = target_dir.join("bpfel-unknown-none/release/sheave-bpf");
    let out = PathBuf::from(env::var("OUT_DIR")?).join("sheave-bpf");
    std::fs::copy(&object, &out)
        .map_err(|e| format!("copy {} to {}: {e}", object.display(), out.display()))?;
    Ok(())
}

/// In the order: what the person says, what `cargo xtask setup` brought, what is on the path.
fn find_linker(root: &Path) -> Option<PathBuf> {
    if let Some(linker) = env::var_os("BPF_LINKER") {
        return Some(linker.into());
    }
    // As `cargo xtask setup` chooses it; the two crates share no code, since setup brings what this one needs.
    let set = |name: &str| env::var_os(name).filter(|value| !value.is_empty()).map(PathBuf::from);
    let cache = set("XDG_CACHE_HOME")
        .filter(|path| path.is_absolute())
        .or_else(|| set("HOME").map(|home| home.join(".cache")));
    let brought = cache.map(|cache| cache.join("sheave/tools").join(BPF_LINKER).join("bin/bpf-linker"));
    let path = env::var_os("PATH").unwrap_or_default();
    let in_path = env::split_paths(&path).map(|dir| dir.join("bpf-linker"));
    let local = root.join("target/tools/bin/bpf-linker");
    brought.into_iter().chain([local]).chain(in_path).find(|path| path.is_file())
}
