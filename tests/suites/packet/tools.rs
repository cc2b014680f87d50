//! Everyday programs as clients: curl and iperf3, by node port and by the load balancer's address.

use std::process::{Child, Stdio};

use anyhow::ensure;
use sheave_tests::{
    daemon::Daemon,
    lab::Place,
    nodes::{Layout, World},
    scene::eventually,
};

use crate::stage::{Stage, bridge_pod, frontends, p2p_pod, served_at};

fn run(place: &Place, program: &str, arguments: &[&str]) -> anyhow::Result<String> {
    let output = place.command(program)?.args(arguments).stdin(Stdio::null()).output()?;
    let (said, errors) = (String::from_utf8(output.stdout)?, String::from_utf8_lossy(&output.stderr));
    ensure!(output.status.success(), "{program} {arguments:?}: {}: {said} {errors}", output.status);
    Ok(said)
}

fn backends(world: &World) -> [(u16, usize, &Place); 3] {
    [(1, 0, bridge_pod(world, 0, 0)), (2, 0, p2p_pod(world, 0, 0)), (3, 1, bridge_pod(world, 1, 0))]
}

#[test]
fn curl() {
    let stage = Stage::new(Layout::default());
    let world = &stage.world;
    for (number, node, pod) in backends(world) {
        let _daemon = Daemon::http(pod.netns(), &pod.sockets(8080), pod.name()).unwrap();
        let name = format!("http-{number}");
        stage.apply(&name, &served_at(world, &name, number, 8080, &[(node, pod)]));
        for from in [world.outside(), world.far()] {
            for to in [0, 1].map(|family| frontends(world, number, family)).concat() {
                let address = format!("http://{to}/");
                let said = run(from, "curl", &["-sS", "--globoff", "--max-time", "10", &address]);
                assert_eq!(said.unwrap(), pod.name(), "{address}");
            }
        }
    }
}

/// Ends when dropped.
struct Running(Child);

impl Drop for Running {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

#[test]
fn iperf3() {
    let stage = Stage::new(Layout::default());
    let world = &stage.world;
    for (number, node, pod) in backends(world) {
        let server = pod.command("iperf3").unwrap().args(["-s", "-p", "5201"]).stdout(Stdio::null()).spawn();
        let _server = Running(server.unwrap());
        let name = format!("iperf-{number}");
        stage.apply(&name, &served_at(world, &name, number, 5201, &[(node, pod)]));
        for family in [0, 1] {
            let [_, node_port, _, balancer] = frontends(world, number, family);
            for to in [node_port, balancer] {
                for way in [&[][..], &["-R"], &["-u", "-b", "40M"]] {
                    let (ip, port) = (to.ip().to_string(), to.port().to_string());
                    let mut arguments = vec!["-J", "-n", "4M", "-c", &ip, "-p", &port];
                    arguments.extend(way);
                    // The server may not listen yet, or not be done with the one before.
                    let said = eventually("iperf3", || {
                        let said = run(world.outside(), "iperf3", &arguments)?;
                        let said: serde_json::Value = serde_json::from_str(&said)?;
                        // It ends with success whatever it says.
                        ensure!(said.get("error").is_none(), "{}", said["error"]);
                        Ok(said)
                    });
                    let said = said.unwrap();
                    let sent = ["/end/sum_sent/bytes", "/end/sum/bytes"];
                    let bytes = sent.iter().find_map(|path| said.pointer(path)?.as_u64());
                    assert!(bytes.is_some_and(|bytes| bytes >= 3_000_000), "{to} {way:?}: {}", said["end"]);
                }
            }
        }
    }
}
