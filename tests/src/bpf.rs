//! What is in the kernel, asked of the kernel itself: programs of a cgroup, and whether maps and programs still exist.

use std::{
    ffi::CString,
    fs::File,
    io,
    os::{
        fd::{AsRawFd, FromRawFd, OwnedFd, RawFd},
        unix::ffi::OsStrExt,
    },
    path::Path,
};

use anyhow::{Context, Result};
use nix::libc;

/// Commands of bpf(2).
const OBJ_GET: libc::c_int = 7;
const PROG_GET_FD_BY_ID: libc::c_int = 13;
const MAP_GET_FD_BY_ID: libc::c_int = 14;
const OBJ_GET_INFO_BY_FD: libc::c_int = 15;
const PROG_QUERY: libc::c_int = 16;

/// Attach types: connect, sendmsg, recvmsg and getpeername, each for IPv4 and IPv6, and release.
const HOOKS: [u32; 9] = [10, 11, 14, 15, 19, 20, 29, 30, 34];

/// More programs than anybody attaches to one hook.
const PROGRAMS_MAX: u32 = 64;

#[repr(C)]
struct Query {
    target_fd: RawFd,
    attach_type: u32,
    query_flags: u32,
    attach_flags: u32,
    prog_ids: u64,
    prog_cnt: u32,
    zero: u32,
}

#[repr(C)]
struct Pathname {
    pathname: u64,
    fd: u32,
    flags: u32,
}

#[repr(C)]
struct Info {
    fd: RawFd,
    len: u32,
    info: u64,
}

/// `attr` must be laid out as the command wants it; pointers in it must be valid for what the command does with them.
pub(crate) unsafe fn bpf<T>(command: libc::c_int, attr: &mut T) -> io::Result<i32> {
    // SAFETY: the caller's.
    let result = unsafe { libc::syscall(libc::SYS_bpf, command, std::ptr::from_mut(attr), size_of::<T>()) };
    if result < 0 { Err(io::Error::last_os_error()) } else { i32::try_from(result).map_err(io::Error::other) }
}

/// The ids of the programs that are attached to a cgroup itself, at any hook of ours.
pub fn programs_of(cgroup: &Path) -> Result<Vec<u32>> {
    let directory = File::open(cgroup).with_context(|| format!("opening {}", cgroup.display()))?;
    let mut found = Vec::new();
    for hook in HOOKS {
        let mut ids = vec![0_u32; PROGRAMS_MAX as usize];
        let mut query = Query {
            target_fd: directory.as_raw_fd(),
            attach_type: hook,
            query_flags: 0,
            attach_flags: 0,
            prog_ids: ids.as_mut_ptr() as u64,
            prog_cnt: PROGRAMS_MAX,
            zero: 0,
        };
        // SAFETY: `ids` has room for as many as are said, and lives longer than the call.
        unsafe { bpf(PROG_QUERY, &mut query) }
            .with_context(|| format!("asking for the programs of {}", cgroup.display()))?;
        ids.truncate(query.prog_cnt as usize);
        found.append(&mut ids);
    }
    Ok(found)
}

/// The id of a pinned map.
pub fn pinned_map_id(path: &Path) -> Result<u32> {
    // `struct bpf_map_info` begins with type and id.
    let [_, id, _] = pinned_info(path)?;
    Ok(id)
}

/// The program of a pinned link.
pub(crate) fn program_of_link(path: &Path) -> Result<OwnedFd> {
    // `struct bpf_link_info` begins with type, id and the program's id.
    let [_, _, program] = pinned_info(path)?;
    by_id(PROG_GET_FD_BY_ID, program).with_context(|| format!("the program of {}", path.display()))
}

/// The first words of what the kernel says of a pinned object.
fn pinned_info(path: &Path) -> Result<[u32; 3]> {
    let context = || format!("opening the pin {}", path.display());
    let name = CString::new(path.as_os_str().as_bytes()).with_context(context)?;
    let mut attr = Pathname { pathname: name.as_ptr() as u64, fd: 0, flags: 0 };
    // SAFETY: the path ends in a zero byte and lives longer than the call.
    let fd = owned(unsafe { bpf(OBJ_GET, &mut attr) }).with_context(context)?;
    let mut info = [0_u32; 3];
    let mut attr = Info { fd: fd.as_raw_fd(), len: 12, info: info.as_mut_ptr() as u64 };
    // SAFETY: `info` has the twelve bytes that are said, and lives longer than the call.
    unsafe { bpf(OBJ_GET_INFO_BY_FD, &mut attr) }.with_context(context)?;
    Ok(info)
}

/// Whether a map exists, pinned or not.
pub fn map_exists(id: u32) -> Result<bool> {
    exists(MAP_GET_FD_BY_ID, id)
}

/// Whether a program exists, attached or not.
pub fn program_exists(id: u32) -> Result<bool> {
    exists(PROG_GET_FD_BY_ID, id)
}

fn exists(command: libc::c_int, id: u32) -> Result<bool> {
    match by_id(command, id) {
        Ok(_) => Ok(true),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(false),
        Err(error) => Err(error).context("asking for a BPF object by its id"),
    }
}

fn by_id(command: libc::c_int, id: u32) -> io::Result<OwnedFd> {
    let mut attr = [id, 0, 0];
    // SAFETY: three words: the id, where to go on, flags.
    owned(unsafe { bpf(command, &mut attr) })
}

/// The descriptor that a command of bpf(2) has made.
pub(crate) fn owned(result: io::Result<i32>) -> io::Result<OwnedFd> {
    // SAFETY: the kernel just gave us this descriptor.
    result.map(|descriptor| unsafe { OwnedFd::from_raw_fd(descriptor) })
}
