//! The virtual machine.

use std::{
    fs::{self, File},
    io::{BufReader, BufWriter},
    os::unix::process::CommandExt,
    path::{Path, PathBuf},
    process::{Command, ExitStatus, Stdio},
    sync::{Arc, OnceLock},
    thread,
    time::Instant,
};

use anyhow::{Context, Result, bail};
use nix::{
    sys::{
        prctl,
        signal::{SigSet, Signal, kill},
    },
    unistd::Pid,
};

use super::{kernel::Image, packages::cache};
use crate::shell::seconds;

/// What the guest has. The root file system lies in it too.
const MEMORY_MB: u32 = 3072;
const PROCESSORS: u32 = 2;

/// Boots the kernel with the archives as its root file system. Returns the status of the guest's command.
pub(super) fn boot(kernel: &Image, archives: &[&Path]) -> Result<u8> {
    let files = Files::new()?;
    join(archives, &files.root)?;
    let started = Instant::now();
    let kvm = has_kvm()?;
    println!(
        "── Linux {} in QEMU{}",
        kernel.release,
        if kvm { "" } else { ", without KVM: nothing that it measures says how fast anything is" }
    );
    let mut command = Command::new("qemu-system-x86_64");
    command.args(if kvm {
        ["-accel", "kvm", "-cpu", "host"]
    } else {
        // No more than what the code is compiled for: each instruction is translated.
        ["-accel", "tcg,thread=multi", "-cpu", "qemu64,+ssse3,+sse4.1,+sse4.2,+popcnt"]
    });
    command
        .args(["-m", &MEMORY_MB.to_string(), "-smp", &PROCESSORS.to_string()])
        .args(["-nodefaults", "-no-reboot", "-display", "none", "-serial", "stdio"])
        .arg("-serial")
        .arg(format!("file:{}", files.status.display()))
        .arg("-kernel")
        .arg(&kernel.path)
        .arg("-initrd")
        .arg(&files.root)
        // Whatever goes wrong before the command ends the machine.
        .args(["-append", "console=ttyS0 quiet loglevel=3 panic=-1 rdinit=/init"])
        .stdin(Stdio::null());
    let status = run_to_its_end(&mut command)?;
    if !status.success() {
        bail!("QEMU ended early ({status})");
    }
    println!("── the machine is off after {}", seconds(started.elapsed()));
    let told = fs::read_to_string(&files.status).context("reading the command's status")?;
    told.trim()
        .parse()
        .with_context(|| format!("the machine went off before its command ended (it told {told:?})"))
}

/// Runs QEMU until its machine is off or somebody ends it, which must not end us: there are files to remove.
fn run_to_its_end(qemu: &mut Command) -> Result<ExitStatus> {
    let interrupts = SigSet::from_iter([Signal::SIGINT, Signal::SIGTERM, Signal::SIGHUP]);
    interrupts.thread_block().context("holding back Ctrl-C")?;
    // SAFETY: between fork and exec the closure makes system calls only.
    unsafe {
        qemu.pre_exec(|| {
            // A command holds back what the thread does that starts it.
            SigSet::empty().thread_set_mask()?;
            Ok(prctl::set_pdeathsig(Signal::SIGKILL)?)
        });
    }
    let mut child = qemu.spawn().context("starting qemu-system-x86_64")?;
    let id = Pid::from_raw(i32::try_from(child.id()).context("QEMU's process id")?);
    let interrupted = Arc::new(OnceLock::new());
    let seen = Arc::clone(&interrupted);
    thread::spawn(move || {
        if let Ok(signal) = interrupts.wait() {
            let _ = seen.set(signal);
            // It may have gone: Ctrl-C is for everybody in the foreground.
            let _ = kill(id, Signal::SIGTERM);
        }
    });
    let status = child.wait().context("waiting for QEMU")?;
    match interrupted.get() {
        Some(signal) => bail!("{signal} ended the machine"),
        None => Ok(status),
    }
}

/// Whether the processor runs the guest itself. A machine that is virtual itself may have the device and nothing behind it.
fn has_kvm() -> Result<bool> {
    let processors = fs::read_to_string("/proc/cpuinfo").context("reading /proc/cpuinfo")?;
    let virtualizes = processors.split_whitespace().any(|flag| flag == "vmx" || flag == "svm");
    Ok(virtualizes && File::options().read(true).write(true).open("/dev/kvm").is_ok())
}

/// What one machine needs while it runs.
struct Files {
    root: PathBuf,
    status: PathBuf,
}

impl Files {
    fn new() -> Result<Self> {
        let home = cache()?;
        let name = |what| home.join(format!("run-{}.{what}", std::process::id()));
        Ok(Self { root: name("cpio"), status: name("status") })
    }
}

impl Drop for Files {
    fn drop(&mut self) {
        for file in [&self.root, &self.status] {
            // Nothing to be done about it; the next machine's have other names.
            let _ = fs::remove_file(file);
        }
    }
}

/// The kernel takes one file.
fn join(archives: &[&Path], to: &Path) -> Result<()> {
    let mut out = BufWriter::new(File::create(to).with_context(|| format!("making {}", to.display()))?);
    for archive in archives {
        let file = File::open(archive).with_context(|| format!("opening {}", archive.display()))?;
        std::io::copy(&mut BufReader::new(file), &mut out).context("joining archives")?;
    }
    Ok(())
}
