//! Sets change thousands of times while clients connect in loops: nobody is ever led to a backend that was in no set of
//! that moment, and what must never be missing never is.
//!
//! Every state is logged with the time from before its file is written until its successor is known to be in the kernel.
//! An attempt may see any owner of its VIP whose time meets its own, with any set that this owner had meanwhile, and
//! nothing else. Owner and set are two writes: a VIP that moves from one Service to another while both change may still
//! lead to its old owner's new endpoints for a moment. It never leads to an owner that it did not have, nor nowhere.

#![expect(clippy::unwrap_used, reason = "the helpers of tests fail as tests do")]

use std::{
    collections::BTreeSet,
    time::{Duration, Instant},
};

use sheave_tests::{
    client::Client,
    engine::monotonic_ns,
    lab::{Node, Place},
    manifests::{Object, service},
    protocol::{Dial, LoopSpec, Record, Transport},
    random::Random,
    scene::{Scene, TARGET, at, slices},
};

/// Backends, each a pod; one pod more is the client.
const PODS: u8 = 6;

/// Long enough for thousands of changes on two processors in a debug build.
const LASTS: Duration = Duration::from_secs(10);
const CHANGES_AT_LEAST: usize = 2000;

/// So many changes are written in a row before anybody waits for the kernel to have them.
const BURST_MAX: usize = 12;

/// Between two attempts of a loop: the agent shall get a processor too.
const PAUSE: Duration = Duration::from_millis(2);

/// What may come of an attempt.
const REFUSED: &str = "ECONNREFUSED";

/// Some of the pods, by number; at least one.
fn one_or_more(random: &mut Random, pods: &[usize]) -> Vec<usize> {
    // Each bit is a pod, and none is no choice.
    let mask = 1 + random.below((1 << pods.len()) - 1);
    pods.iter().enumerate().filter(|(bit, _)| mask & (1 << bit) != 0).map(|(_, pod)| *pod).collect()
}

/// What an attempt may find: names, or a refusal.
type Allowed = BTreeSet<String>;

/// One state of a VIP.
struct Epoch {
    from_ns: u64,
    /// Open until the next state is in the kernel.
    to_ns: u64,
    /// Whose the VIP is.
    owner: usize,
    /// What each possible owner leads to.
    sets: Vec<Allowed>,
}

/// A VIP that changes, with all its states.
struct Track {
    name: &'static str,
    dials: Vec<(Transport, Dial)>,
    epochs: Vec<Epoch>,
}

impl Track {
    fn new(name: &'static str, dials: Vec<(Transport, Dial)>) -> Self {
        Self { name, dials, epochs: Vec::new() }
    }

    /// A new state is about to be written.
    fn begin(&mut self, owner: usize, sets: Vec<Allowed>) {
        self.epochs.push(Epoch { from_ns: monotonic_ns(), to_ns: u64::MAX, owner, sets });
    }

    /// The last state is in the kernel; whatever was before is over.
    fn settled(&mut self) {
        let now_ns = monotonic_ns();
        for epoch in self.epochs.iter_mut().rev().skip(1) {
            if epoch.to_ns != u64::MAX {
                break;
            }
            epoch.to_ns = now_ns;
        }
    }

    /// Attempts that no state of their time explains.
    fn wrong<'a>(&self, records: &'a [Record]) -> Vec<(&'a Record, Allowed)> {
        let mut wrong = Vec::new();
        for record in records {
            // States begin and end in their order.
            let first = self.epochs.partition_point(|epoch| epoch.to_ns < record.start_ns);
            let meet = |epoch: &&Epoch| epoch.from_ns <= record.end_ns;
            let meeting: Vec<&Epoch> = self.epochs.iter().skip(first).take_while(meet).collect();
            let owners: BTreeSet<usize> = meeting.iter().map(|epoch| epoch.owner).collect();
            let allowed: Allowed = meeting
                .iter()
                .flat_map(|epoch| owners.iter().filter_map(|owner| epoch.sets.get(*owner)))
                .flatten()
                .cloned()
                .collect();
            let (Ok(result) | Err(result)) = &record.result;
            if !allowed.contains(result) {
                wrong.push((record, allowed));
            }
        }
        wrong
    }
}

fn pod_names(pods: &[usize]) -> Allowed {
    pods.iter().map(|pod| format!("pod-1-{}", pod + 1)).collect()
}

fn or_refused(pods: &[usize]) -> Allowed {
    if pods.is_empty() { Allowed::from([REFUSED.to_owned()]) } else { pod_names(pods) }
}

fn tcp(vips: &[&str], port: u16) -> Vec<(Transport, Dial)> {
    vips.iter().map(|vip| (Transport::Tcp, Dial::new(at(vip, port).unwrap()))).collect()
}

/// The stage with everything that changes on it.
struct Stage<'a> {
    scene: &'a Scene,
    random: Random,
    /// Which port name the renamed Service has now.
    renamed: bool,
    tracks: [Track; 5],
}

const STEADY: usize = 0;
const BLINKING: usize = 1;
const MOVING: usize = 2;
const RENAMED: usize = 3;
const REPLACED: usize = 4;

impl Stage<'_> {
    fn places(&self, pods: &[usize]) -> Vec<(&Node, &Place)> {
        let node = self.scene.node().unwrap();
        pods.iter().map(|pod| (node, node.pod(*pod).unwrap())).collect()
    }

    fn serving(&self, service: Object, name: &str, port_name: &str, pods: &[usize]) -> Vec<Object> {
        let mut objects = vec![service];
        objects.extend(slices(name, port_name, "TCP", &self.places(pods)));
        objects
    }

    fn write(&self, name: &str, objects: &[Object]) {
        self.scene.lab().manifests().write(name, objects).unwrap();
    }

    /// Its set is never empty, so nobody is ever refused; TCP and UDP.
    fn steady(&mut self) {
        let pods = one_or_more(&mut self.random, &[0, 1, 2, 3, 4, 5]);
        let web = service("steady", &["10.96.1.1", "fd00:10:96::101"])
            .port("http", "TCP", 80, TARGET)
            .port("dns", "UDP", 80, TARGET);
        let mut objects = self.serving(web, "steady", "http", &pods);
        objects.extend(slices("steady", "dns", "UDP", &self.places(&pods)));
        self.tracks[STEADY].begin(0, vec![pod_names(&pods)]);
        self.write("steady", &objects);
    }

    /// Its set is often empty.
    fn blinking(&mut self) {
        let pods =
            if self.random.below(2) == 0 { Vec::new() } else { one_or_more(&mut self.random, &[0, 2, 4]) };
        let web = service("blinking", &["10.96.1.2", "fd00:10:96::102"]).port("http", "TCP", 80, TARGET);
        let objects = self.serving(web, "blinking", "http", &pods);
        self.tracks[BLINKING].begin(0, vec![or_refused(&pods)]);
        self.write("blinking", &objects);
    }

    /// S13: an external IP goes from one Service to the other; it is never missing.
    fn moving(&mut self) {
        let first_has_it = self.random.below(2) == 0;
        let (first, second) =
            (one_or_more(&mut self.random, &[0, 1, 2]), one_or_more(&mut self.random, &[3, 4, 5]));
        let owner = |service: Object, has_it: bool| {
            if has_it { service.push("spec.externalIPs", "203.0.113.1") } else { service }
        };
        let one = service("one", &["10.96.1.3"]).port("http", "TCP", 80, TARGET);
        let two = service("two", &["10.96.1.4"]).port("http", "TCP", 80, TARGET);
        let mut objects = self.serving(owner(one, first_has_it), "one", "http", &first);
        objects.extend(self.serving(owner(two, !first_has_it), "two", "http", &second));
        self.tracks[MOVING].begin(usize::from(!first_has_it), vec![pod_names(&first), pod_names(&second)]);
        self.write("moving", &objects);
    }

    /// S13, S7: the port gets another name, so its frontends get another service port as their owner.
    fn renamed(&mut self) {
        self.renamed = !self.renamed;
        let name = if self.renamed { "new" } else { "old" };
        let pods = one_or_more(&mut self.random, if self.renamed { &[0, 1, 2] } else { &[3, 4, 5] });
        let web = service("renamed", &["10.96.1.5", "fd00:10:96::105"]).port(name, "TCP", 80, TARGET);
        let objects = self.serving(web, "renamed", name, &pods);
        self.tracks[RENAMED].begin(0, vec![pod_names(&pods)]);
        self.write("renamed", &objects);
    }

    /// S13: a Service is deleted and another one has its cluster IP, in one batch.
    fn replaced(&mut self) {
        let name = ["red", "green", "blue"][self.random.below(3)];
        let pods = one_or_more(&mut self.random, &[0, 1, 2, 3]);
        let web = service(name, &["10.96.1.6"]).port("http", "TCP", 80, TARGET);
        let objects = self.serving(web, name, "http", &pods);
        self.tracks[REPLACED].begin(0, vec![pod_names(&pods)]);
        self.write("replaced", &objects);
    }

    fn change(&mut self) {
        match self.random.below(5) {
            0 => self.steady(),
            1 => self.blinking(),
            2 => self.moving(),
            3 => self.renamed(),
            _ => self.replaced(),
        }
    }

    fn settle(&mut self) {
        self.scene.settle().unwrap();
        self.tracks.iter_mut().for_each(Track::settled);
    }
}

/// Q4, S13, P12 under load: see the module.
#[test]
fn q4_s13_nobody_sees_half_a_change() {
    let mut scene = Scene::new(PODS + 1).unwrap();
    scene.serve().unwrap();
    let seed = monotonic_ns() | 1;
    println!("seed {seed}");
    let steady = ["10.96.1.1", "fd00:10:96::101"].map(|vip| Dial::new(at(vip, 80).unwrap()));
    let steady = vec![
        (Transport::Tcp, steady[0]),
        (Transport::Tcp, steady[1]),
        (Transport::Tcp, steady[0].mapped()),
        (Transport::UdpConnected, steady[0]),
        (Transport::UdpUnconnected, steady[1]),
    ];
    let mut stage = Stage {
        scene: &scene,
        random: Random::new(seed),
        renamed: false,
        tracks: [
            Track::new("steady", steady),
            Track::new("blinking", tcp(&["10.96.1.2", "fd00:10:96::102"], 80)),
            Track::new("moving", tcp(&["203.0.113.1"], 80)),
            Track::new("renamed", tcp(&["10.96.1.5", "fd00:10:96::105"], 80)),
            Track::new("replaced", tcp(&["10.96.1.6"], 80)),
        ],
    };
    stage.steady();
    stage.blinking();
    stage.moving();
    stage.renamed();
    stage.replaced();
    stage.settle();

    let client: Client = scene.pod(usize::from(PODS)).unwrap().client().unwrap();
    let mut loops = Vec::new();
    for (index, track) in stage.tracks.iter().enumerate() {
        for (transport, dial) in &track.dials {
            let spec = LoopSpec::new(*transport, *dial).pause(PAUSE).record();
            loops.push((index, *transport, dial.to, client.start_loop(spec).unwrap()));
        }
    }
    let started = Instant::now();
    let mut changes = 0;
    while started.elapsed() < LASTS || changes < CHANGES_AT_LEAST {
        for _ in 0..=stage.random.below(BURST_MAX) {
            stage.change();
            changes += 1;
        }
        stage.settle();
    }
    println!("{changes} changes in {:?}", started.elapsed());

    let mut attempts = 0;
    let mut failures = Vec::new();
    for (index, transport, to, id) in loops {
        let report = client.stop_loop(id).unwrap();
        let track = &stage.tracks[index];
        assert!(report.attempts > 500, "{} {to}: only {} attempts", track.name, report.attempts);
        attempts += report.attempts;
        let wrong = track.wrong(&report.records);
        if let Some((record, allowed)) = wrong.first() {
            failures.push(format!(
                "{} {transport:?} {to}: {} of {} attempts saw what was not there, the first after {} ms: {:?}, allowed {allowed:?}",
                track.name,
                wrong.len(),
                report.attempts,
                (record.end_ns - record.start_ns) / 1_000_000,
                record.result,
            ));
        }
        // The test would see nothing if nothing changed.
        assert!(report.answers.len() > 1, "{}: {:?}", track.name, report.answers);
    }
    println!("{attempts} attempts");
    assert!(failures.is_empty(), "{}", failures.join("\n"));
    let status = scene.agent().unwrap().status().unwrap();
    assert_eq!(status["failed"].as_object().unwrap().len(), 0, "{status}");
    println!(
        "a set changed under a reader to the end {} times",
        scene.agent().unwrap().counter("contended").unwrap()
    );
}
