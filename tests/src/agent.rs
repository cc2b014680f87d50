//! Runs the agent on a lab's node, as its own process, the way a DaemonSet would.

use std::{
    ffi::OsStr,
    fs::{self, OpenOptions},
    io::Write as _,
    net::SocketAddr,
    os::unix::{net::UnixStream, process::ExitStatusExt},
    os::{fd::AsRawFd as _, unix::process::CommandExt as _},
    path::{Path, PathBuf},
    process::{Child, Command, ExitStatus, Output, Stdio},
    thread,
    time::{Duration, Instant},
};

use anyhow::{Context, Result, bail};
use nix::{
    mount::{MsFlags, mount},
    sys::{
        signal::{Signal, kill},
        statfs::{BPF_FS_MAGIC, statfs},
    },
    unistd::Pid,
};
use serde_json::Value;

use crate::{
    client::binary,
    lab::{Lab, Node},
};

/// Loading the programs in a debug build on a busy machine takes seconds, and in a virtual machine without KVM, beside
/// busy clients, minutes.
pub(crate) const SYNCED_WITHIN: Duration = Duration::from_secs(300);

/// How long the agent may take to end when asked to.
const STOPPED_WITHIN: Duration = Duration::from_secs(10);

/// How much of the log an error quotes.
const LOG_TAIL_LINES: usize = 30;

/// An agent that runs. It is killed when dropped; its pinned programs stay until the lab goes.
#[derive(Debug)]
pub struct Agent {
    child: Child,
    program: PathBuf,
    bpffs: PathBuf,
    control_socket: PathBuf,
    log: PathBuf,
}

/// Where an agent has its objects from.
#[derive(Clone, Copy, Debug)]
pub enum Source<'a> {
    /// A directory of manifests.
    Manifests(&'a Path),
    /// The API server that a kubeconfig names.
    Kubeconfig(&'a Path),
    /// What a pod is given.
    Account {
        /// The files of its service account; the agent sees them where a pod does.
        directory: &'a Path,
        /// The API server, in the environment.
        server: SocketAddr,
    },
}

/// Shows the directory `$1` where a pod finds its account, and becomes the rest of the arguments. `/run` is hidden: what
/// the directory is mounted on need not be on the machine.
const IN_A_POD: &str = "mount -t tmpfs tmpfs /run && d=/run/secrets/kubernetes.io/serviceaccount && mkdir -p $d && \
                        mount --bind \"$1\" $d && shift && exec \"$@\"";

/// Runs a command of the agent's binary on a node, whether an agent runs there or not; the arguments begin with the verb.
/// Exit codes are the caller's to judge.
pub fn sheave(node: &Node, arguments: &[&str]) -> Result<Output> {
    let program = binary("sheave", "SHEAVE_BIN")?;
    let directory = node.directory();
    let mut command = node.host().command(&program)?;
    run_against(&mut command, arguments, &directory.join("bpffs"), &directory.join("agent.sock"))
}

/// The same as a user without any rights.
pub fn sheave_as_nobody(node: &Node, arguments: &[&str]) -> Result<Output> {
    const NOBODY: u32 = 65_534;
    let program = binary("sheave", "SHEAVE_BIN")?;
    // By descriptor: nobody may not search the directories that lead to it.
    let file = fs::File::open(&program).with_context(|| format!("opening {}", program.display()))?;
    let mut command = node.host().command(format!("/proc/self/fd/{}", file.as_raw_fd()))?;
    // SAFETY: between fork and exec the closure makes system calls only.
    unsafe {
        command.pre_exec(|| {
            nix::unistd::setgroups(&[])?;
            nix::unistd::setresgid(NOBODY.into(), NOBODY.into(), NOBODY.into())?;
            Ok(nix::unistd::setresuid(NOBODY.into(), NOBODY.into(), NOBODY.into())?)
        });
    }
    let directory = node.directory();
    run_against(&mut command, arguments, &directory.join("bpffs"), &directory.join("agent.sock"))
}

/// Says to a command where its agent and its tables are.
fn run_against(
    command: &mut Command,
    arguments: &[&str],
    bpffs: &Path,
    control_socket: &Path,
) -> Result<Output> {
    command.args(arguments);
    let verb = arguments.first().copied().unwrap_or_default();
    command.arg("--control-socket").arg(control_socket);
    if verb != "plan" {
        command.arg("--bpffs").arg(bpffs);
    }
    let output = command.stdin(Stdio::null()).output();
    output.with_context(|| format!("running `sheave {}`", arguments.join(" ")))
}

impl Agent {
    /// Starts the agent on a node with the lab's manifests, and waits until it has synced.
    pub fn start(lab: &Lab, node: &Node) -> Result<Self> {
        let mut agent = Self::spawn(lab, node, &[] as &[&str])?;
        agent.wait_synced(SYNCED_WITHIN)?;
        Ok(agent)
    }

    /// Starts the agent with more arguments, and does not wait.
    pub fn spawn(lab: &Lab, node: &Node, arguments: &[impl AsRef<OsStr>]) -> Result<Self> {
        Self::spawn_with(node, &Source::Manifests(lab.manifests().path()), node.cgroup(), arguments)
    }

    /// Starts the agent with any source and on any cgroup, and does not wait.
    pub fn spawn_with(
        node: &Node,
        source: &Source<'_>,
        cgroup: &Path,
        arguments: &[impl AsRef<OsStr>],
    ) -> Result<Self> {
        let program = binary("sheave", "SHEAVE_BIN")?;
        let directory = node.directory();
        let (bpffs, log) = (directory.join("bpffs"), directory.join("agent.log"));
        let control_socket = directory.join("agent.sock");
        fs::create_dir_all(&bpffs).with_context(|| format!("making {}", bpffs.display()))?;
        // The log goes on over restarts.
        let output = OpenOptions::new()
            .create(true)
            .append(true)
            .open(&log)
            .with_context(|| format!("opening {}", log.display()))?;
        let mut command = match source {
            Source::Manifests(path) => {
                let mut command = node.host().command(&program)?;
                command.arg("run").arg("--manifests").arg(path);
                command
            }
            Source::Kubeconfig(path) => {
                let mut command = node.host().command(&program)?;
                command.arg("run").arg("--kubeconfig").arg(path);
                command
            }
            Source::Account { directory, server } => {
                // The agent would mount it where nobody else sees it.
                let found = statfs(&bpffs).with_context(|| format!("looking at {}", bpffs.display()))?;
                if found.filesystem_type() != BPF_FS_MAGIC {
                    mount(Some("bpf"), &bpffs, Some("bpf"), MsFlags::empty(), None::<&str>)
                        .with_context(|| format!("mounting {}", bpffs.display()))?;
                }
                let mut command = node.host().command("unshare")?;
                command.args(["--mount", "sh", "-c", IN_A_POD, "sh"]).arg(directory).arg(&program).arg("run");
                command
                    .env("KUBERNETES_SERVICE_HOST", server.ip().to_string())
                    .env("KUBERNETES_SERVICE_PORT", server.port().to_string());
                command
            }
        };
        let child = command
            .args(["--node-name", node.name()])
            .arg("--cgroup-root")
            .arg(cgroup)
            .arg("--bpffs")
            .arg(&bpffs)
            .arg("--control-socket")
            .arg(&control_socket)
            .args(arguments)
            .env_remove("KUBECONFIG")
            .stdin(Stdio::null())
            .stdout(output.try_clone().context("sharing the agent's log")?)
            .stderr(output)
            .spawn()
            .with_context(|| format!("starting {} on {}", program.display(), node.name()))?;
        Ok(Self { child, program, bpffs, control_socket, log })
    }

    /// The process id.
    #[must_use]
    pub fn pid(&self) -> u32 {
        self.child.id()
    }

    /// Where it logs to; restarts append.
    #[must_use]
    pub fn log(&self) -> &Path {
        &self.log
    }

    /// Where it can be asked.
    #[must_use]
    pub fn control_socket(&self) -> &Path {
        &self.control_socket
    }

    /// Waits until the agent says that it has synced.
    pub fn wait_synced(&mut self, within: Duration) -> Result<()> {
        self.wait_synced_while(within, || Ok(()))
    }

    /// The same, as long as there is a reason to wait.
    pub fn wait_synced_while(&mut self, within: Duration, go_on: impl Fn() -> Result<()>) -> Result<()> {
        let deadline = Instant::now() + within;
        loop {
            go_on()?;
            if let Some(status) = self.child.try_wait().context("looking after the agent")? {
                bail!("the agent ended early ({status}); its log ends:\n{}", self.log_tail());
            }
            let answer = self.status();
            if answer.as_ref().is_ok_and(|status| status.get("synced") == Some(&Value::Bool(true))) {
                return Ok(());
            }
            if Instant::now() > deadline {
                let said = answer.map_or_else(|error| format!("{error:#}"), |status| status.to_string());
                bail!(
                    "the agent did not sync within {within:?}; status: {said}; its log ends:\n{}",
                    self.log_tail()
                );
            }
            thread::sleep(Duration::from_millis(10));
        }
    }

    /// What `sheave status -o json` says.
    pub fn status(&self) -> Result<Value> {
        let output = self.ask(&["status", "-o", "json"])?;
        serde_json::from_slice(&output.stdout)
            .with_context(|| format!("`sheave status` said {:?}", String::from_utf8_lossy(&output.stdout)))
    }

    /// Runs a command of the agent's binary against this agent; the arguments begin with the verb.
    pub fn ask(&self, arguments: &[&str]) -> Result<Output> {
        let mut command = Command::new(&self.program);
        let output = run_against(&mut command, arguments, &self.bpffs, &self.control_socket)?;
        if !output.status.success() {
            bail!(
                "sheave {}: {}: {}",
                arguments.join(" "),
                output.status,
                String::from_utf8_lossy(&output.stderr)
            );
        }
        Ok(output)
    }

    /// What `sheave status` says that a program counted.
    pub fn counter(&self, name: &str) -> Result<u64> {
        let status = self.status()?;
        let counter = status.pointer(&format!("/counters/{name}")).and_then(Value::as_u64);
        counter.with_context(|| format!("no counter {name} in {status}"))
    }

    /// The service ports that are programmed now, asked on the control socket itself: no process is started for it.
    pub fn programmed(&self) -> Result<Vec<String>> {
        let context = || format!("asking on {}", self.control_socket.display());
        let mut stream = UnixStream::connect(&self.control_socket).with_context(context)?;
        stream.write_all(b"\"names\"\n").with_context(context)?;
        let reply: Value = serde_json::from_reader(stream).with_context(context)?;
        let names = reply.get("ok").and_then(Value::as_object).with_context(|| format!("it said {reply}"))?;
        Ok(names.values().filter_map(Value::as_str).map(ToOwned::to_owned).collect())
    }

    /// Waits until the agent has ended by itself.
    pub fn wait_ended(mut self, within: Duration) -> Result<ExitStatus> {
        let deadline = Instant::now() + within;
        while Instant::now() < deadline {
            if let Some(status) = self.child.try_wait().context("waiting for the agent")? {
                return Ok(status);
            }
            thread::sleep(Duration::from_millis(5));
        }
        bail!("the agent did not end within {within:?}; its log ends:\n{}", self.log_tail())
    }

    /// Asks the agent to end and waits; one that does not is killed, which is an error.
    pub fn stop(self) -> Result<ExitStatus> {
        self.signal(Signal::SIGTERM)?;
        self.wait_ended(STOPPED_WITHIN)
    }

    /// Kills the agent where it stands.
    pub fn kill(mut self) -> Result<()> {
        self.signal(Signal::SIGKILL)?;
        let status = self.child.wait().context("waiting for the agent")?;
        if status.signal().is_none() {
            bail!("the agent had ended before it was killed ({status}); its log ends:\n{}", self.log_tail());
        }
        Ok(())
    }

    /// Sends the agent a signal.
    pub fn signal(&self, signal: Signal) -> Result<()> {
        let pid = Pid::from_raw(self.child.id().try_into().context("a process id")?);
        kill(pid, signal).with_context(|| format!("sending {signal} to the agent"))
    }

    /// The last lines of the log.
    #[must_use]
    pub fn log_tail(&self) -> String {
        let text = fs::read(&self.log).unwrap_or_default();
        let text = String::from_utf8_lossy(&text);
        let lines: Vec<_> = text.lines().collect();
        lines.get(lines.len().saturating_sub(LOG_TAIL_LINES)..).unwrap_or_default().join("\n")
    }
}

impl Drop for Agent {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}
