//! WireGuard between two nodes, by the kernel's own device (module wireguard).

use std::{
    io::Write,
    net::Ipv6Addr,
    process::{Command, Stdio},
    thread,
    time::{Duration, Instant},
};

use anyhow::{Context, Result, ensure};

use crate::netns::Netns;

/// Its name.
pub(super) const DEVICE: &str = "wg0";

const PORT: u16 = 51820;

/// Makes the device of a node, whose only peer is another node. It takes everything from there: which addresses the nodes
/// send through it is the routes' to say.
pub(super) fn device(netns: &Netns, own: &str, peer: &str, peer_address: Ipv6Addr) -> Result<()> {
    netns.ip(&format!("link add {DEVICE} type wireguard\n"))?;
    let public = wg(Command::new("wg").arg("pubkey"), &private_key(peer))?;
    let (port, endpoint) = (PORT.to_string(), format!("[{peer_address}]:{PORT}"));
    let set = ["set", DEVICE, "listen-port", &port, "private-key", "/dev/stdin"];
    let allow = ["peer", public.trim(), "endpoint", &endpoint, "allowed-ips", "0.0.0.0/0,::/0"];
    // Shakes hands as soon as the device is up, without waiting for a packet.
    let begin = ["persistent-keepalive", "25"];
    wg(netns.command("wg").args(set).args(allow).args(begin), &private_key(own)).map(drop)
}

/// Waits until the device and its peer have shaken hands. Who speaks before the peer is there tries again in five seconds.
pub(super) fn wait(netns: &Netns) -> Result<()> {
    const PATIENCE: Duration = Duration::from_secs(30);
    let started = Instant::now();
    loop {
        let shaken = wg(netns.command("wg").args(["show", DEVICE, "latest-handshakes"]), "")?;
        // A line for each peer: its key, and the second of the last time; 0: never.
        if shaken.split_whitespace().last().is_some_and(|second| second != "0") {
            return Ok(());
        }
        ensure!(started.elapsed() < PATIENCE, "no hands shaken in {PATIENCE:?}: {shaken}");
        thread::sleep(Duration::from_millis(100));
    }
}

/// A key is any 32 bytes, in base64; here each is 32 times the same. Nobody else can reach these nodes.
fn private_key(node: &str) -> String {
    let (three, two) = if node == "node-1" { ("AQEB", "AQE=") } else { ("AgIC", "AgI=") };
    format!("{}{two}\n", three.repeat(10))
}

/// Runs `wg`; returns what it says.
fn wg(command: &mut Command, input: &str) -> Result<String> {
    let mut child = command
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .context("cannot run `wg` (Debian package wireguard-tools)")?;
    let mut stdin = child.stdin.take().context("the input of `wg`")?;
    stdin.write_all(input.as_bytes()).context("telling `wg` a key")?;
    drop(stdin);
    let output = child.wait_with_output().context("waiting for `wg`")?;
    ensure!(output.status.success(), "`wg` failed: {}", String::from_utf8_lossy(&output.stderr));
    String::from_utf8(output.stdout).context("what `wg` says")
}
