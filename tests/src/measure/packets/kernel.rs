//! What bpf(2) is asked for here: maps of counters, programs, links, runs.

use std::os::fd::{AsRawFd, OwnedFd};

use anyhow::{Context, Result};
use nix::libc;

use crate::bpf::{bpf, owned};

/// Commands of bpf(2).
const MAP_CREATE: libc::c_int = 0;
const MAP_LOOKUP: libc::c_int = 1;
const MAP_UPDATE: libc::c_int = 2;
const PROG_LOAD: libc::c_int = 5;
const PROG_TEST_RUN: libc::c_int = 10;
const LINK_CREATE: libc::c_int = 28;

/// Types of programs, and where they are attached.
pub(super) const SCHED_CLS: u32 = 3;
pub(super) const XDP: u32 = 6;
pub(super) const SOCK_ADDR: u32 = 18;
/// `BPF_CGROUP_INET4_CONNECT`, `BPF_CGROUP_INET6_CONNECT`.
pub(super) const AT_CONNECT: [u32; 2] = [10, 11];
pub(super) const AT_XDP: u32 = 37;
pub(super) const AT_TCX_INGRESS: u32 = 46;
pub(super) const AT_TCX_EGRESS: u32 = 47;

/// An array of one value, two counters.
pub(super) fn counters() -> Result<OwnedFd> {
    table(16)
}

/// An array of one value of so many bytes.
pub(super) fn table(bytes: u32) -> Result<OwnedFd> {
    const ARRAY: u32 = 2;
    map(ARRAY, 4, bytes, 1)
}

/// A hash table with this key and nothing else.
pub(super) fn hash_of(key: &[u8], entries: u32) -> Result<OwnedFd> {
    const HASH: u32 = 1;
    let map = map(HASH, u32::try_from(key.len())?, 8, entries)?;
    let value = 0_u64;
    let mut attr = Element {
        map: map.as_raw_fd(),
        padding: 0,
        key: key.as_ptr() as u64,
        value: &raw const value as u64,
        flags: 0,
    };
    // SAFETY: key and value have the sizes that the map was made with, and live longer than the call.
    unsafe { bpf(MAP_UPDATE, &mut attr) }.context("writing to a map")?;
    Ok(map)
}

fn map(kind: u32, key_size: u32, value_size: u32, entries: u32) -> Result<OwnedFd> {
    let mut attr = [kind, key_size, value_size, entries];
    // SAFETY: four words without pointers.
    owned(unsafe { bpf(MAP_CREATE, &mut attr) }).context("making a map")
}

#[repr(C)]
struct Element {
    map: i32,
    padding: u32,
    key: u64,
    value: u64,
    flags: u64,
}

pub(super) fn read_counters(map: &OwnedFd) -> Result<[u64; 2]> {
    let (key, mut value) = (0_u32, [0_u64; 2]);
    let mut attr = Element {
        map: map.as_raw_fd(),
        padding: 0,
        key: &raw const key as u64,
        value: value.as_mut_ptr() as u64,
        flags: 0,
    };
    // SAFETY: key and value have the sizes that the map was made with, and live longer than the call.
    unsafe { bpf(MAP_LOOKUP, &mut attr) }.context("reading a map")?;
    Ok(value)
}

/// Loads a program that may be attached wherever one of its type may.
pub(super) fn load(kind: u32, code: &[u64]) -> Result<OwnedFd> {
    load_for(kind, 0, code)
}

/// Loads a program for one place.
pub(super) fn load_for(kind: u32, at: u32, code: &[u64]) -> Result<OwnedFd> {
    #[repr(C)]
    struct Load {
        kind: u32,
        count: u32,
        code: u64,
        licence: u64,
        log_level: u32,
        log_size: u32,
        log: u64,
        kernel_version: u32,
        flags: u32,
        name: [u8; 16],
        device: u32,
        at: u32,
    }
    let mut log = vec![0_u8; 1 << 16];
    let mut attr = Load {
        kind,
        count: u32::try_from(code.len())?,
        code: code.as_ptr() as u64,
        licence: c"GPL".as_ptr() as u64,
        log_level: 1,
        log_size: u32::try_from(log.len())?,
        log: log.as_mut_ptr() as u64,
        kernel_version: 0,
        flags: 0,
        name: [0; 16],
        device: 0,
        at,
    };
    // SAFETY: code, licence and log have the lengths that are said, and live longer than the call.
    let result = owned(unsafe { bpf(PROG_LOAD, &mut attr) });
    result.with_context(|| {
        let text = String::from_utf8_lossy(&log);
        format!("loading a program: {}", text.trim_end_matches('\0'))
    })
}

/// Attaches a program until the link is dropped: to a device of the calling thread's namespace by its index, or to a cgroup
/// by its descriptor.
pub(super) fn attach(program: &OwnedFd, to: u32, at: u32) -> Result<OwnedFd> {
    let mut attr = [program.as_raw_fd().cast_unsigned(), to, at, 0];
    // SAFETY: four words without pointers.
    owned(unsafe { bpf(LINK_CREATE, &mut attr) }).context("attaching a program")
}

/// A run of a program.
#[derive(Clone, Copy)]
pub(super) struct Run<'a> {
    /// What it is given.
    pub(super) frame: &'a [u8],
    /// What it is told of the frame: the start of its context.
    pub(super) context: &'a [u8],
    /// How often.
    pub(super) repeat: u32,
    /// So many frames are made at a time, which their device then takes as received; 0: none is.
    pub(super) live_batch: u32,
}

/// What came of a run.
pub(super) struct Ran {
    /// What the program said last.
    pub(super) verdict: u32,
    /// Each time took so many nanoseconds, by the kernel's reckoning.
    pub(super) ns: u32,
    /// The frame after the last time; empty of frames that a device took.
    pub(super) frame: Vec<u8>,
}

/// Runs a program.
pub(super) fn test_run(program: &OwnedFd, run: Run<'_>) -> Result<Ran> {
    #[repr(C)]
    struct TestRun {
        program: i32,
        result: u32,
        data_size_in: u32,
        data_size_out: u32,
        data_in: u64,
        data_out: u64,
        repeat: u32,
        duration: u32,
        context_size_in: u32,
        context_size_out: u32,
        context_in: u64,
        context_out: u64,
        flags: u32,
        cpu: u32,
        batch_size: u32,
        padding: u32,
    }
    const LIVE_FRAMES: u32 = 2;
    let is_live = run.live_batch > 0;
    let mut frame = vec![0; if is_live { 0 } else { run.frame.len() * 2 }];
    let mut attr = TestRun {
        program: program.as_raw_fd(),
        result: 0,
        data_size_in: u32::try_from(run.frame.len())?,
        data_size_out: u32::try_from(frame.len())?,
        data_in: run.frame.as_ptr() as u64,
        data_out: if is_live { 0 } else { frame.as_mut_ptr() as u64 },
        repeat: run.repeat,
        duration: 0,
        context_size_in: u32::try_from(run.context.len())?,
        context_size_out: 0,
        context_in: run.context.as_ptr() as u64,
        context_out: 0,
        flags: if is_live { LIVE_FRAMES } else { 0 },
        cpu: 0,
        batch_size: run.live_batch,
        padding: 0,
    };
    // SAFETY: frames and context have the sizes that are said, and live longer than the call.
    unsafe { bpf(PROG_TEST_RUN, &mut attr) }.context("running a program")?;
    frame.truncate(usize::try_from(attr.data_size_out)?);
    Ok(Ran { verdict: attr.result, ns: attr.duration, frame })
}
