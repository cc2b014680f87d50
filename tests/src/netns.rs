//! Network namespaces without names: they live as long as a file descriptor, a process or a socket holds them, so
//! a killed run leaves none behind.

use std::{
    fs,
    io::{self, Write},
    os::{
        fd::{AsFd, AsRawFd, OwnedFd},
        unix::{fs::MetadataExt, process::CommandExt},
    },
    path::PathBuf,
    process::{Command, Stdio},
    sync::Arc,
    thread,
};

use anyhow::{Context, Result, bail};
use nix::{
    sched::{CloneFlags, setns, unshare},
    sys::socket::{AddressFamily, MsgFlags, SockFlag, SockProtocol, SockType, recv, send, socket},
};

/// One network namespace.
#[derive(Clone, Debug)]
pub struct Netns {
    descriptor: Arc<OwnedFd>,
}

impl Netns {
    /// Makes an empty namespace with `lo` up, forwarding on, and IPv6 addresses usable at once.
    pub fn new() -> Result<Self> {
        let descriptor = in_thread(|| {
            unshare(CloneFlags::CLONE_NEWNET).context(
                "cannot make a network namespace: the lab needs root (CAP_SYS_ADMIN and CAP_NET_ADMIN)",
            )?;
            // The new namespace of this thread; `/proc/self` would be the one of the process.
            let file =
                fs::File::open("/proc/thread-self/ns/net").context("opening /proc/thread-self/ns/net")?;
            anyhow::Ok(OwnedFd::from(file))
        })?;
        let netns = Self { descriptor: Arc::new(descriptor) };
        netns.sysctls(&[
            ("net/ipv4/ip_forward", "1"),
            ("net/ipv6/conf/all/forwarding", "1"),
            ("net/ipv6/conf/all/disable_ipv6", "0"),
            ("net/ipv6/conf/default/disable_ipv6", "0"),
            // Duplicate address detection makes an address unusable for a second.
            ("net/ipv6/conf/all/accept_dad", "0"),
            ("net/ipv6/conf/default/accept_dad", "0"),
            // IPv4 settings of a new namespace are copied from the machine's: set what the lab relies on.
            ("net/ipv4/conf/all/rp_filter", "0"),
            ("net/ipv4/conf/default/rp_filter", "0"),
        ])?;
        netns.ip("link set lo up\n")?;
        Ok(netns)
    }

    /// A path that names the namespace for the `ip` command and for `nsenter --net=`, while this process lives.
    #[must_use]
    pub fn path(&self) -> PathBuf {
        format!("/proc/{}/fd/{}", std::process::id(), self.descriptor.as_raw_fd()).into()
    }

    /// The namespace's inode number, which `/proc/PID/ns/net` shows too.
    pub fn inode(&self) -> Result<u64> {
        let path = self.path();
        Ok(fs::metadata(&path).with_context(|| format!("looking at {}", path.display()))?.ino())
    }

    /// Runs `work` on a thread inside the namespace. Sockets made there stay there, whoever uses them later.
    pub fn run<T: Send>(&self, work: impl FnOnce() -> T + Send) -> Result<T> {
        in_thread(|| {
            setns(self.descriptor.as_fd(), CloneFlags::CLONE_NEWNET)
                .context("entering a network namespace")?;
            Ok(work())
        })
    }

    /// A command whose process enters the namespace before it becomes `program`.
    pub fn command(&self, program: impl AsRef<std::ffi::OsStr>) -> Command {
        let descriptor = Arc::clone(&self.descriptor);
        let mut command = Command::new(program);
        // SAFETY: between fork and exec the closure makes one system call and touches no memory of other threads.
        unsafe {
            command.pre_exec(move || {
                setns(descriptor.as_fd(), CloneFlags::CLONE_NEWNET).map_err(io::Error::from)
            });
        }
        command
    }

    /// Runs lines of `ip` sub-commands in the namespace; the first that fails ends it.
    pub fn ip(&self, batch: &str) -> Result<()> {
        let mut child = self
            .command("ip")
            .args(["-batch", "-"])
            .stdin(Stdio::piped())
            .stdout(Stdio::null())
            .stderr(Stdio::piped())
            .spawn()
            .context("cannot run `ip` (Debian package iproute2): `cargo xtask setup` installs it")?;
        if let Some(mut stdin) = child.stdin.take() {
            // A process that ended early says why on stderr, which is read below.
            let _ = stdin.write_all(batch.as_bytes());
        }
        let output = child.wait_with_output().context("waiting for `ip -batch`")?;
        if !output.status.success() {
            bail!(
                "`ip -batch` failed: {}\nwith the lines:\n{batch}",
                String::from_utf8_lossy(&output.stderr)
            );
        }
        Ok(())
    }

    /// Has connection tracking forget every connection of the namespace.
    pub fn forget_connections(&self) -> Result<()> {
        // A netlink header (length, type 2 of ctnetlink: delete; request and acknowledgement), and nothing that selects.
        let request: [u16; 10] = [20, 0, 0x102, 0x5, 0, 0, 0, 0, 0, 0];
        let request: Vec<u8> = request.into_iter().flat_map(u16::to_ne_bytes).collect();
        let reply = self.run(|| {
            let socket = socket(
                AddressFamily::Netlink,
                SockType::Raw,
                SockFlag::SOCK_CLOEXEC,
                SockProtocol::NetlinkNetFilter,
            )?;
            send(socket.as_raw_fd(), &request, MsgFlags::empty())?;
            let mut reply = [0; 64];
            let length = recv(socket.as_raw_fd(), &mut reply, MsgFlags::empty())?;
            nix::Result::Ok(reply.get(..length).unwrap_or_default().to_vec())
        })?;
        let reply = reply.context("asking connection tracking (ctnetlink)")?;
        // Behind the header: zero, or a negated error number.
        let error = reply.get(16..20).and_then(|error| Some(i32::from_ne_bytes(error.try_into().ok()?)));
        match error {
            Some(0) => Ok(()),
            Some(error) => Err(io::Error::from_raw_os_error(-error)).context("emptying connection tracking"),
            None => bail!("connection tracking answers {reply:?}"),
        }
    }

    /// Writes kernel settings of the namespace; keys are paths below `/proc/sys`.
    pub fn sysctls(&self, settings: &[(&str, &str)]) -> Result<()> {
        self.run(|| {
            for (key, value) in settings {
                fs::write(format!("/proc/sys/{key}"), value)
                    .with_context(|| format!("writing {value} to /proc/sys/{key}"))?;
            }
            Ok(())
        })?
    }
}

/// Runs `work` on a thread of its own, so that its namespace ends with it, and hands a panic on.
fn in_thread<T: Send>(work: impl FnOnce() -> Result<T> + Send) -> Result<T> {
    thread::scope(|scope| match scope.spawn(work).join() {
        Ok(result) => result,
        Err(panic) => std::panic::resume_unwind(panic),
    })
}
