//! What Sheave is compared with, in the lab: kube-proxy itself, which serves what was put into the store.

use std::time::Duration;

use sheave_tests::{
    kubernetes::{
        control_plane::ControlPlane,
        kube_proxy::{KubeProxy, Mode},
    },
    lab::Lab,
    manifests::{lab_node, service, slice},
    protocol::{Dial, Transport},
    scene::{TARGET, at, eventually_within, fail, reach},
};

/// A busy kernel takes its time for rules.
const SERVES_WITHIN: Duration = Duration::from_secs(180);

#[test]
fn kube_proxy_serves_by_packets_what_the_store_has() {
    for mode in [Mode::Nftables, Mode::Iptables] {
        let lab = Lab::new(2).unwrap();
        let (node, client, backend) = (lab.node(0).unwrap(), lab.pod(0).unwrap(), lab.pod(1).unwrap());
        let _server = backend.serve(TARGET).unwrap();
        let client = client.client().unwrap();
        let dial = Dial::new(at("10.96.0.1", 80).unwrap()).timeout(Duration::from_millis(500));
        fail(&client, Transport::Tcp, dial).unwrap();

        let plane = ControlPlane::start(&lab).unwrap();
        let service = service("a", &["10.96.0.1"]).port("http", "TCP", 80, TARGET);
        let slice = slice("a-1", "a", "IPv4").slice_port("http", "TCP", TARGET);
        let slice = slice.endpoint(&backend.v4().to_string(), node.name());
        let objects = [
            (format!("minions/{}", node.name()), lab_node(node)),
            ("services/specs/default/a".to_owned(), service),
            ("endpointslices/default/a-1".to_owned(), slice),
        ];
        plane.store(objects.map(|(key, object)| (key, object.json().clone()))).unwrap();
        let kubeconfig = plane.join(node, 1).unwrap();
        let mut proxy = KubeProxy::start(node, &kubeconfig, mode, "10.244.0.0/16,fd00::/16", 1000).unwrap();

        let exchange =
            eventually_within(SERVES_WITHIN, "kube-proxy serves", || reach(&client, Transport::Tcp, dial))
                .unwrap();
        assert_eq!(exchange.answer.as_deref(), Some(backend.name()), "{mode:?}");
        proxy.check().unwrap();
    }
}
