//! `tests/scenarios/NAME.yaml`, the steps, and `NAME.golden`, the symbolic tables after each step, written by the tool:
//! `UPDATE_GOLDEN=1 cargo test --package proxy-agent --test pipeline`, then read the difference.
//!
//! Each scenario runs as written, and again with its events one by one in other orders, with writes that fail, and with
//! a new agent after every step that reads the objects from manifests: the end must be the same.

use std::fmt::Write as _;
use std::fs;
use std::path::{Path, PathBuf};

use proxy_agent::dataplane;
use proxy_agent::object::Family;
use proxy_agent::resolve::{NodePortAddresses, Policy};
use proxy_agent::source::files;
use serde::Deserialize;
use serde_json::{Value, json};

use crate::engine::Engine;
use crate::objects::{Event, Id, Objects, change, complete, merge};

/// What a file holds.
#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Scenario {
    /// What it shows.
    about: String,
    /// The rules that it is about.
    rules: String,
    /// `--nodeport-addresses` other than `primary`.
    #[serde(default)]
    nodeport_addresses: Vec<String>,
    steps: Vec<Step>,
}

/// Changes that arrive together.
#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Step {
    name: String,
    /// Whole objects.
    #[serde(default)]
    apply: Vec<Value>,
    /// Merged into objects that are there.
    #[serde(default)]
    patch: Vec<Value>,
    /// `Kind name`.
    #[serde(default)]
    delete: Vec<String>,
    /// Slices of a hundred endpoints each.
    #[serde(default)]
    endpoints: Option<Endpoints>,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Endpoints {
    service: String,
    count: u32,
}

impl Step {
    /// What a watch reports, as one batch. `objects` becomes the state after it.
    fn events(&self, objects: &mut Objects) -> Vec<Event> {
        let mut events: Vec<Event> = Vec::new();
        let whole = self.apply.iter().cloned().chain(self.endpoints.iter().flat_map(Endpoints::slices));
        events.extend(whole.map(complete).map(|object| (Id::of(&object), Some(object))));
        for patch in &self.patch {
            let id = Id::of(patch);
            let mut object = objects.0.get(&id).unwrap_or_else(|| panic!("{id:?} is not there")).clone();
            merge(&mut object, patch);
            events.push((id, Some(object)));
        }
        for text in &self.delete {
            let id = Id::parse(text);
            assert!(objects.0.contains_key(&id), "{id:?} is not there");
            events.push((id, None));
        }
        events.iter().for_each(|event| objects.apply(event));
        events
    }
}

impl Endpoints {
    fn slices(&self) -> Vec<Value> {
        let endpoint = |number: u32| {
            let [_, high, middle, low] = (number + 1).to_be_bytes();
            json!({"addresses": [format!("10.{}.{middle}.{low}", 128 + high)]})
        };
        let numbers: Vec<u32> = (0..self.count).collect();
        let slice = |(index, numbers): (usize, &[u32])| {
            json!({
                "kind": "EndpointSlice",
                "metadata": {
                    "name": format!("{}-{index:03}", self.service),
                    "labels": {"kubernetes.io/service-name": self.service},
                },
                "addressType": "IPv4",
                "ports": [{"name": "", "port": 8080}],
                "endpoints": numbers.iter().copied().map(endpoint).collect::<Vec<_>>(),
            })
        };
        numbers.chunks(100).enumerate().map(slice).collect()
    }
}

impl Scenario {
    fn policy(&self) -> Policy {
        let cidrs: Vec<_> = self.nodeport_addresses.iter().map(|cidr| cidr.parse().unwrap()).collect();
        let nodeport_addresses =
            if cidrs.is_empty() { NodePortAddresses::Primary } else { NodePortAddresses::Cidrs(cidrs) };
        Policy { nodeport_addresses, ..Policy::default() }
    }

    fn batches(&self) -> Vec<Vec<Event>> {
        let mut objects = Objects::default();
        self.steps.iter().map(|step| step.events(&mut objects)).collect()
    }

    /// One sync per step. The dumps after each.
    fn as_written(&self) -> Vec<Vec<String>> {
        let mut engine = Engine::new(self.policy());
        let batches = self.batches();
        let dump_after = |batch: &Vec<Event>| {
            engine.take(batch.iter().map(change));
            let report = engine.sync();
            assert!(report.failed.is_empty(), "{report:?}");
            engine.dump()
        };
        batches.iter().map(dump_after).collect()
    }

    /// One sync per event, in any order that keeps each object's own.
    fn in_another_order(&self, random: &mut Random) -> Vec<String> {
        let mut waiting: Vec<Vec<Event>> = Vec::new();
        for event in self.batches().into_iter().flatten() {
            match waiting.iter_mut().find(|events| events[0].0 == event.0) {
                Some(events) => events.push(event),
                None => waiting.push(vec![event]),
            }
        }
        let mut engine = Engine::new(self.policy());
        while !waiting.is_empty() {
            let which = random.below(waiting.len());
            engine.take([change(&waiting[which].remove(0))]);
            waiting.retain(|events| !events.is_empty());
            if random.below(3) > 0 {
                engine.sync();
            }
        }
        engine.settle();
        engine.dump()
    }

    /// A part of the writes fails, until all events are in.
    fn with_faults(&self, random: &mut Random) -> Vec<String> {
        let mut engine = Engine::new(self.policy());
        let mut fails = Random(random.next());
        let percent = 5 + random.below(50);
        engine.dataplane.fails = Box::new(move |_| fails.below(100) < percent);
        for batch in self.batches() {
            engine.take(batch.iter().map(change));
            engine.sync();
        }
        engine.dataplane.fails = Box::new(|_| false);
        engine.settle();
        engine.dump()
    }

    /// Each step is met by the agent that its predecessor's death made necessary.
    fn with_restarts(&self, rested: bool) -> Vec<Vec<String>> {
        let mut objects = Objects::default();
        let mut engine = Engine::new(self.policy());
        let mut dumps = Vec::new();
        for step in &self.steps {
            let events = step.events(&mut objects);
            engine.take(events.iter().map(change));
            engine.settle();
            if rested {
                engine.rest();
            }
            let directory = tempfile::tempdir().unwrap();
            objects.write(directory.path());
            let mut tables = engine.dataplane.inner;
            tables.log.clear();
            engine = Engine::on(tables, self.policy());
            engine.take(files::load(directory.path()).unwrap());
            let report = engine.sync();
            assert!(report.failed.is_empty(), "{report:?}");
            // An agent that went before its places had rested left backends behind; its successor says that they are
            // gone (A7), and nothing else.
            let gone = |write: &&dataplane::Write| matches!(write, dataplane::Write::Backend { value, .. } if !value.is_live());
            let log = &engine.dataplane.inner.log;
            let allowed = if rested { 0 } else { log.iter().filter(gone).count() };
            assert_eq!(log.len(), allowed, "a restart changes nothing: {}: {log:?}", step.name);
            dumps.push(engine.dump());
        }
        dumps
    }
}

/// xorshift64: runs repeat.
struct Random(u64);

impl Random {
    fn next(&mut self) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0
    }

    fn below(&mut self, bound: usize) -> usize {
        usize::try_from(self.next() % u64::try_from(bound).unwrap()).unwrap()
    }
}

fn directory() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/scenarios")
}

fn all() -> Vec<(String, Scenario)> {
    let mut paths: Vec<PathBuf> =
        fs::read_dir(directory()).unwrap().map(|entry| entry.unwrap().path()).collect();
    paths.retain(|path| path.extension().is_some_and(|extension| extension == "yaml"));
    paths.sort();
    let read = |path: &PathBuf| {
        let text = fs::read_to_string(path).unwrap();
        let scenario =
            serde_saphyr::from_str(&text).unwrap_or_else(|error| panic!("{}: {error}", path.display()));
        (path.file_stem().unwrap().to_str().unwrap().to_owned(), scenario)
    };
    paths.iter().map(read).collect()
}

/// What a file source says of an unreadable object names the file.
fn tables(dump: &[String]) -> Vec<&String> {
    dump.iter().filter(|line| !line.starts_with("problem ")).collect()
}

/// Draining backends depend on what was there before.
fn without_history(dump: &[String]) -> Vec<&String> {
    dump.iter().filter(|line| !line.contains(" draining ")).collect()
}

#[test]
fn as_written() {
    let mut wrong = Vec::new();
    for (name, scenario) in all() {
        assert!(!scenario.about.is_empty() && !scenario.rules.is_empty(), "{name}");
        let mut text = String::new();
        for (step, dump) in scenario.steps.iter().zip(scenario.as_written()) {
            writeln!(text, "## {}", step.name).unwrap();
            dump.iter().for_each(|line| writeln!(text, "{}", line.trim_end()).unwrap());
        }
        let path = directory().join(format!("{name}.golden"));
        if std::env::var_os("UPDATE_GOLDEN").is_some() {
            fs::write(&path, &text).unwrap();
        }
        let golden = fs::read_to_string(&path).unwrap_or_default();
        if golden != text {
            let differs = |(ours, theirs): &(&str, &str)| ours != theirs;
            let line = text.lines().zip(golden.lines()).position(|pair| differs(&pair));
            let at = line.unwrap_or_else(|| text.lines().count().min(golden.lines().count()));
            wrong.push(format!(
                "{name}.golden:{}: is {:?}, golden {:?}",
                at + 1,
                text.lines().nth(at),
                golden.lines().nth(at)
            ));
        }
    }
    assert!(wrong.is_empty(), "{}\n(UPDATE_GOLDEN=1 writes the goldens anew)", wrong.join("\n"));
}

#[test]
fn in_other_orders() {
    let mut random = Random(0x5eed);
    for (name, scenario) in all() {
        let expected = scenario.as_written().pop().unwrap();
        for _ in 0..8 {
            let dump = scenario.in_another_order(&mut random);
            assert_eq!(without_history(&dump), without_history(&expected), "{name}");
        }
    }
}

#[test]
fn with_faults() {
    let mut random = Random(0xfa17);
    for (name, scenario) in all() {
        let expected = scenario.as_written().pop().unwrap();
        for _ in 0..8 {
            let dump = scenario.with_faults(&mut random);
            assert_eq!(without_history(&dump), without_history(&expected), "{name}");
        }
    }
}

#[test]
fn with_restarts() {
    for (name, scenario) in all() {
        let expected = scenario.as_written();
        for rested in [true, false] {
            let dumps = scenario.with_restarts(rested);
            for ((dump, expected), step) in dumps.iter().zip(&expected).zip(&scenario.steps) {
                assert_eq!(tables(dump), tables(expected), "{name}: {}", step.name);
            }
        }
    }
}

/// Both families are there, or half of the rules were not looked at.
#[test]
fn scenarios_have_both_families() {
    let text: String = all().iter().flat_map(|(_, scenario)| scenario.as_written()).flatten().collect();
    for family in Family::ALL {
        let mark = if family == Family::V4 { " v4 " } else { " v6 " };
        assert!(text.contains(mark), "{}", family.name());
    }
}
