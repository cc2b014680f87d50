//! The processes of a control plane, on a machine of the nodes' network.

use std::{
    fs::{self, File},
    io,
    net::{SocketAddr, TcpStream},
    os::unix::process::CommandExt,
    path::{Path, PathBuf},
    process::{Child, Command, Output, Stdio},
    thread,
    time::{Duration, Instant},
};

use anyhow::{Context, Result, bail, ensure};
use base64::{Engine as _, engine::general_purpose::STANDARD as BASE64};
use nix::sys::{prctl::set_pdeathsig, signal::Signal};
use serde_json::{Value, json};

use super::{
    api::{Api, exchange_on},
    programs::{API_SERVER, CONTROLLER_MANAGER, ETCD, KUBECTL},
};
use crate::{
    kubernetes::account::kubeconfig,
    lab::{Lab, Node, Place},
};

/// Two seconds on a quiet machine.
const READY_WITHIN: Duration = Duration::from_secs(120);

/// Where the API server listens, on every address of its machine.
const PORT: u16 = 6443;

/// Where etcd listens, for its own machine only.
const ETCD_URL: &str = "http://127.0.0.1:2379";

/// What cluster IPs are taken from; two ranges make dual stack.
const SERVICE_CIDRS: &str = "10.96.0.0/16,fd00:10:96::/112";

/// The token of `system:masters`. It is worth nothing outside the lab.
const ADMIN_TOKEN: &str = "administrator";

/// The controllers that Services need. The one that watches nodes is left out: without kubelets it would call every pod
/// lost.
const CONTROLLERS: [&str; 5] = [
    "endpointslice-controller",
    "endpointslice-mirroring-controller",
    "garbage-collector-controller",
    "namespace-controller",
    "service-cidr-controller",
];

/// The most that etcd takes in one transaction.
const PUTS_AT_ONCE: usize = 128;

/// How much of a log an error quotes.
const LOG_LINES: usize = 20;

/// A control plane. It ends when dropped.
#[derive(Debug)]
pub struct ControlPlane {
    // In the order in which they go.
    proxy: Option<Process>,
    controllers: Option<Process>,
    api_server: Option<Process>,
    etcd: Option<Process>,
    machine: Place,
    directory: PathBuf,
}

impl ControlPlane {
    /// Starts it on a machine of its own in a lab, and waits until the API server is ready.
    pub fn start(lab: &Lab) -> Result<Self> {
        let directory = lab.directory().join("control-plane");
        fs::create_dir(&directory).with_context(|| format!("making {}", directory.display()))?;
        let machine = lab.machine("control-plane", 253)?;
        let mut plane =
            Self { proxy: None, controllers: None, api_server: None, etcd: None, machine, directory };
        plane.write_files()?;
        plane.etcd = Some(plane.start_etcd()?);
        plane.start_api_server()?;
        plane.proxy = Some(plane.start_proxy()?);
        plane.wait_ready()?;
        plane.controllers = Some(plane.start_controllers()?);
        Ok(plane)
    }

    /// The way to the API server.
    #[must_use]
    pub fn api(&self) -> Api {
        Api::new(self.file("api.sock"))
    }

    /// The machine that it runs on.
    #[must_use]
    pub fn machine(&self) -> &Place {
        &self.machine
    }

    /// Where the nodes reach the API server.
    #[must_use]
    pub fn address(&self) -> SocketAddr {
        SocketAddr::new(self.machine.v4().into(), PORT)
    }

    /// The certificates that the API server's own can be checked with.
    #[must_use]
    pub fn certificate_authority(&self) -> PathBuf {
        self.file("certificates/apiserver.crt")
    }

    /// The directory of its files.
    #[must_use]
    pub fn directory(&self) -> &Path {
        &self.directory
    }

    /// A `kubectl` of the administrator, for what it does best.
    pub fn kubectl(&self, arguments: &[&str]) -> Result<Output> {
        let output = self
            .command(&KUBECTL.path()?)?
            .arg("--kubeconfig")
            .arg(self.file("admin.conf"))
            .args(arguments)
            .stdin(Stdio::null())
            .output()
            .context("running kubectl")?;
        ensure!(
            output.status.success(),
            "kubectl {}: {}",
            arguments.join(" "),
            String::from_utf8_lossy(&output.stderr)
        );
        Ok(output)
    }

    /// Ends the API server, with every connection to it.
    pub fn stop_api_server(&mut self) -> Result<()> {
        self.api_server.take().context("no API server runs")?.end();
        Ok(())
    }

    /// Starts the API server again and waits until it is ready.
    pub fn restart_api_server(&mut self) -> Result<()> {
        self.start_api_server()?;
        self.wait_ready()
    }

    /// Has etcd forget every state but the present one. A watch cannot go on from a forgotten one.
    pub fn compact(&self) -> Result<()> {
        let answer = self.etcd_call("/v3/kv/range", &json!({"key": "AA=="}))?;
        let revision = answer.pointer("/header/revision").and_then(Value::as_str);
        let revision: u64 = revision
            .and_then(|revision| revision.parse().ok())
            .with_context(|| format!("etcd says {answer}"))?;
        self.etcd_call("/v3/kv/compaction", &json!({"revision": revision, "physical": true})).map(drop)
    }

    /// Requests of the agents that the API server has answered, in their order.
    pub fn audit(&self) -> Result<Vec<Value>> {
        let path = self.file("audit.log");
        let text = fs::read_to_string(&path).with_context(|| format!("reading {}", path.display()))?;
        // The last line may be half written.
        Ok(text.lines().filter_map(|line| serde_json::from_str(line).ok()).collect())
    }

    /// Puts objects where the API server finds them, without asking it: a hundred thousand take seconds. Nobody checks
    /// them, and no controller is asked for addresses. `key` is what the API server would store an object under, without
    /// the leading `/registry/`.
    pub fn store(&self, objects: impl IntoIterator<Item = (String, Value)>) -> Result<()> {
        let put = |(key, object): (String, Value)| json!({"requestPut": {"key": BASE64.encode(format!("/registry/{key}")), "value": BASE64.encode(object.to_string())}});
        let mut puts = objects.into_iter().map(put).peekable();
        while puts.peek().is_some() {
            let some: Vec<_> = puts.by_ref().take(PUTS_AT_ONCE).collect();
            let answer = self.etcd_call("/v3/kv/txn", &json!({"success": some}))?;
            ensure!(answer["succeeded"] == json!(true), "etcd says {answer}");
        }
        Ok(())
    }

    /// Links a node of another lab with the control plane, by a cable of its own; `number` differs by node. Returns a
    /// kubeconfig of the administrator, which lies in the node's directory.
    pub fn join(&self, node: &Node, number: u8) -> Result<PathBuf> {
        let (near, far) = (number * 2, number * 2 + 1);
        // Of a node that has gone: its namespace, and with it the cable, goes a moment later.
        let _ = self.machine.netns().ip(&format!("link delete cable{number}\n"));
        node.host().netns().ip(&format!(
            "link add cable type veth peer name cable{number} netns {}\n\
             address add 192.0.2.{near}/31 dev cable\n\
             link set cable up\n",
            self.machine.netns().path().display()
        ))?;
        self.machine
            .netns()
            .ip(&format!("address add 192.0.2.{far}/31 dev cable{number}\nlink set cable{number} up\n"))?;
        let mut config = kubeconfig(self, &json!({"token": ADMIN_TOKEN}));
        // The server's certificate does not name this address.
        config["clusters"][0]["cluster"] =
            json!({"server": format!("https://192.0.2.{far}:{PORT}"), "insecure-skip-tls-verify": true});
        let path = node.directory().join("admin.conf");
        fs::write(&path, config.to_string()).with_context(|| format!("writing {}", path.display()))?;
        Ok(path)
    }

    fn etcd_call(&self, path: &str, body: &Value) -> Result<Value> {
        let stream = self.machine.netns().run(|| TcpStream::connect("127.0.0.1:2379"))?;
        let (code, text) = exchange_on(stream, "POST", path, "application/json", Some(body))?;
        ensure!(code == 200, "etcd: {path}: {code}: {text}");
        serde_json::from_str(&text).with_context(|| format!("etcd: {path}: {text}"))
    }

    fn file(&self, name: &str) -> PathBuf {
        self.directory.join(name)
    }

    fn write_files(&self) -> Result<()> {
        let write = |name: &str, text: &str| {
            let path = self.file(name);
            fs::write(&path, text).with_context(|| format!("writing {}", path.display()))
        };
        write("tokens.csv", &format!("{ADMIN_TOKEN},admin,1,\"system:masters\"\n"))?;
        let mut admin = kubeconfig(self, &json!({"token": ADMIN_TOKEN}));
        // Read before the server has made its certificate; the agents check it.
        admin["clusters"][0]["cluster"] =
            json!({"server": format!("https://{}", self.address()), "insecure-skip-tls-verify": true});
        write("admin.conf", &admin.to_string())?;
        let policy = json!({
            "apiVersion": "audit.k8s.io/v1",
            "kind": "Policy",
            "omitStages": ["RequestReceived"],
            "rules": [{"level": "Metadata", "userGroups": ["system:serviceaccounts"]}, {"level": "None"}],
        });
        write("audit.yaml", &policy.to_string())
    }

    fn start_etcd(&self) -> Result<Process> {
        let peer = "http://127.0.0.1:2380";
        let mut command = self.command(&ETCD.path()?)?;
        command
            .args(["--unsafe-no-fsync", "--log-level=error", "--name=etcd"])
            .args(["--listen-client-urls", ETCD_URL, "--advertise-client-urls", ETCD_URL])
            .args(["--listen-peer-urls", peer, "--initial-advertise-peer-urls", peer])
            .args(["--initial-cluster", &format!("etcd={peer}")])
            .arg("--data-dir")
            .arg(self.file("etcd"));
        self.spawn("etcd", command)
    }

    fn start_api_server(&mut self) -> Result<()> {
        let mut command = self.command(&API_SERVER.path()?)?;
        let address = self.machine.v4().to_string();
        command
            .args(["--etcd-servers", ETCD_URL])
            .args(["--bind-address=0.0.0.0", "--advertise-address", &address])
            .args(["--secure-port", &PORT.to_string()])
            .args(["--service-cluster-ip-range", SERVICE_CIDRS])
            .args(["--authorization-mode=RBAC", "--service-account-issuer=https://kubernetes.default.svc"])
            // Nobody makes an account for every namespace here.
            .arg("--disable-admission-plugins=ServiceAccount")
            // The DaemonSet of `deploy/` is.
            .arg("--allow-privileged=true");
        for (option, file) in [
            ("--cert-dir", "certificates"),
            // The server makes this key for itself, before it reads these options: one key less to make.
            ("--service-account-key-file", "certificates/apiserver.key"),
            ("--service-account-signing-key-file", "certificates/apiserver.key"),
            ("--token-auth-file", "tokens.csv"),
            ("--audit-policy-file", "audit.yaml"),
            ("--audit-log-path", "audit.log"),
        ] {
            command.arg(option).arg(self.file(file));
        }
        self.api_server = Some(self.spawn("kube-apiserver", command)?);
        Ok(())
    }

    fn start_controllers(&self) -> Result<Process> {
        let mut command = self.command(&CONTROLLER_MANAGER.path()?)?;
        command
            .arg("--kubeconfig")
            .arg(self.file("admin.conf"))
            .args(["--controllers", &CONTROLLERS.join(",")])
            .args(["--leader-elect=false", "--bind-address=127.0.0.1"]);
        self.spawn("kube-controller-manager", command)
    }

    fn start_proxy(&self) -> Result<Process> {
        let mut command = self.command(&KUBECTL.path()?)?;
        command
            .arg("--kubeconfig")
            .arg(self.file("admin.conf"))
            .args(["proxy", "--unix-socket"])
            .arg(self.file("api.sock"));
        self.spawn("kubectl-proxy", command)
    }

    fn wait_ready(&mut self) -> Result<()> {
        let deadline = Instant::now() + READY_WITHIN;
        loop {
            let Err(error) = self.api().get_text("/readyz") else { return Ok(()) };
            for process in [&mut self.etcd, &mut self.api_server, &mut self.proxy].into_iter().flatten() {
                process.check()?;
            }
            if Instant::now() > deadline {
                let log = self.api_server.as_ref().map(Process::log_ends).unwrap_or_default();
                return Err(error).with_context(|| {
                    format!("the API server was not ready within {READY_WITHIN:?}; its log:\n{log}")
                });
            }
            thread::sleep(Duration::from_millis(20));
        }
    }

    fn command(&self, program: &Path) -> Result<Command> {
        let mut command = self.machine.command(program)?;
        command.env_remove("KUBECONFIG").env("HOME", &self.directory);
        Ok(command)
    }

    fn spawn(&self, name: &'static str, command: Command) -> Result<Process> {
        Process::spawn(name, command, self.file(&format!("{name}.log")))
    }
}

/// A process of the control plane, or of a node's. It is killed when dropped: nothing of a lab is worth a good end.
#[derive(Debug)]
pub(super) struct Process {
    name: &'static str,
    child: Child,
    log: PathBuf,
}

impl Process {
    pub(super) fn spawn(name: &'static str, mut command: Command, log: PathBuf) -> Result<Self> {
        let output = File::options().create(true).append(true).open(&log);
        let output = output.with_context(|| format!("opening {}", log.display()))?;
        // SAFETY: between fork and exec the closure makes one system call.
        unsafe {
            // The lab's cgroup is swept only when the next lab is made: too late for what holds so much memory. The
            // signal comes at the end of the thread that starts the process, which is the test's own.
            command.pre_exec(|| set_pdeathsig(Signal::SIGKILL).map_err(io::Error::from));
        }
        let child = command
            .stdin(Stdio::null())
            // A terminal's Ctrl-C is for whoever started it: what is waited for does not end before.
            .process_group(0)
            .stdout(output.try_clone().context("sharing a log")?)
            .stderr(output)
            .spawn()
            .with_context(|| format!("starting {name}"))?;
        Ok(Self { name, child, log })
    }

    pub(super) fn id(&self) -> u32 {
        self.child.id()
    }

    pub(super) fn check(&mut self) -> Result<()> {
        if let Some(status) = self.child.try_wait().with_context(|| format!("looking after {}", self.name))? {
            bail!("{} ended early ({status}); its log:\n{}", self.name, self.log_ends());
        }
        Ok(())
    }

    /// The log's first and last lines: what is written in Go says why it panics before it says where.
    fn log_ends(&self) -> String {
        let text = fs::read(&self.log).unwrap_or_default();
        let text = String::from_utf8_lossy(&text);
        let lines: Vec<_> = text.lines().collect();
        if lines.len() <= 2 * LOG_LINES {
            return lines.join("\n");
        }
        let (head, rest) = lines.split_at(LOG_LINES);
        let (_, tail) = rest.split_at(rest.len() - LOG_LINES);
        format!("{}\n[...]\n{}", head.join("\n"), tail.join("\n"))
    }

    fn end(mut self) {
        self.kill();
    }

    fn kill(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        self.kill();
    }
}
