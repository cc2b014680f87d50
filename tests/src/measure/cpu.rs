//! CPUs: staying on one, keeping them awake, and how long a process had one.

use std::thread;

use anyhow::{Context, Result};
use nix::{
    libc,
    sched::{CpuSet, sched_setaffinity},
    unistd::Pid,
};

/// Keeps the calling thread on a CPU.
/// # Errors
/// If there is no such CPU.
pub fn pin(cpu: Option<usize>) -> Result<()> {
    let Some(cpu) = cpu else { return Ok(()) };
    let mut set = CpuSet::new();
    set.set(cpu).with_context(|| format!("CPU {cpu}"))?;
    sched_setaffinity(Pid::from_raw(0), &set).with_context(|| format!("staying on CPU {cpu}"))
}

/// Keeps CPUs from going idle: on a virtual machine an idle CPU stops, and waking it costs more than what is measured.
/// The spinners yield to everybody (`SCHED_IDLE`).
#[derive(Debug)]
pub struct Spinners {
    stop: std::sync::Arc<std::sync::atomic::AtomicBool>,
    threads: Vec<thread::JoinHandle<()>>,
}

impl Spinners {
    /// One on each CPU.
    pub fn start(cpus: usize) -> Result<Self> {
        use std::sync::atomic::Ordering;
        let mut spinners = Self { stop: std::sync::Arc::default(), threads: Vec::new() };
        for cpu in 0..cpus {
            let stop = std::sync::Arc::clone(&spinners.stop);
            spinners.threads.push(thread::Builder::new().name("spinner".to_owned()).spawn(move || {
                if pin(Some(cpu)).is_err() || !yield_to_everybody() {
                    return;
                }
                while !stop.load(Ordering::Relaxed) {
                    std::hint::spin_loop();
                }
            })?);
        }
        Ok(spinners)
    }
}

impl Drop for Spinners {
    fn drop(&mut self) {
        self.stop.store(true, std::sync::atomic::Ordering::Relaxed);
        for thread in self.threads.drain(..) {
            let _ = thread.join();
        }
    }
}

/// Puts the calling thread behind all others; whether that worked.
fn yield_to_everybody() -> bool {
    let parameters = libc::sched_param { sched_priority: 0 };
    // SAFETY: the structure lives across the call, which changes nothing but how this thread is scheduled.
    unsafe { libc::sched_setscheduler(0, libc::SCHED_IDLE, &raw const parameters) == 0 }
}

/// The time that a process has been on a CPU, all threads together.
pub fn cpu_ns(pid: u32) -> Result<u64> {
    let directory = format!("/proc/{pid}/task");
    let mut sum = 0;
    for thread in std::fs::read_dir(&directory).with_context(|| format!("listing {directory}"))? {
        let path = thread.context("a thread")?.path().join("schedstat");
        let text = std::fs::read_to_string(&path).with_context(|| format!("reading {}", path.display()))?;
        let first = text.split(' ').next().and_then(|field| field.parse::<u64>().ok());
        sum += first.with_context(|| format!("{}: {text}", path.display()))?;
    }
    Ok(sum)
}
