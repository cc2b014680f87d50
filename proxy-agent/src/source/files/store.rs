//! What all manifest files together say, and what changes when one of them does. No IO.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::sync::Arc;

use tracing::{debug, warn};

use super::document::{Broken, Entry, Id, Kind, Object, Parsed};
use crate::object::{Change, Delta, Name, Node, Problem, Read, Service, Slice, Unreadable};
use crate::source::derive::Derive;

/// One file, as last read.
#[derive(Default)]
struct File {
    objects: HashMap<Id, Object>,
    broken: Vec<Broken>,
}

impl File {
    /// What it holds, readable or not.
    fn ids(&self) -> impl Iterator<Item = &Id> {
        self.objects.keys().chain(self.broken.iter().filter_map(|broken| broken.id.as_ref()))
    }
}

/// What is to be said of an object.
#[derive(PartialEq, Eq, Default)]
struct Said {
    /// Its last good state, and the other places that claim it, too.
    good: Option<(Object, Vec<String>)>,
    /// Why its present text cannot be read.
    broken: Option<Box<Broken>>,
}

/// Names of files, sorted.
type Claimants = Vec<Name>;

/// All files. Files are known by name, and the first by name wins where two hold the same object.
#[derive(Default)]
pub(super) struct Store {
    files: BTreeMap<String, File>,
    /// Which files have, or had when last readable, an object, or have a broken one of that name.
    claims: HashMap<Id, Claimants>,
    derive: Derive,
}

impl Store {
    /// Names of the files that there are.
    pub(super) fn names(&self) -> impl Iterator<Item = &str> {
        self.files.keys().map(String::as_str)
    }

    /// The files of a start: what they say is asked for as [`Self::lists`].
    pub(super) fn fill(&mut self, updates: Vec<(String, Option<Parsed>)>) {
        for (name, parsed) in updates {
            // The lists have what is broken, too.
            self.replace(&name, parsed, &mut Vec::new());
        }
        let ids: Vec<Id> = self.claims.keys().filter(|id| id.kind != Kind::Slice).cloned().collect();
        for id in ids {
            let said = self.say(&id);
            self.feed_derive(&id, said.good.as_ref().map(|(object, _)| object));
        }
        self.derive.flush();
    }

    /// A file is new, changed or (`None`) gone. Returns what that changes: what is new and changed first, then what is
    /// gone, so that what moves from one file to another is never missing.
    pub(super) fn update(&mut self, updates: Vec<(String, Option<Parsed>)>) -> Vec<Change> {
        // Of all that these files held or hold, what was said before.
        let mut before: BTreeMap<Id, Said> = BTreeMap::new();
        for (name, parsed) in &updates {
            let held = self.files.get(name).into_iter().flat_map(File::ids);
            for id in held.chain(parsed.iter().flat_map(Parsed::ids)) {
                before.entry(id.clone()).or_insert_with_key(|id| self.say(id));
            }
        }
        let mut keyless = Vec::new();
        for (name, parsed) in updates {
            self.replace(&name, parsed, &mut keyless);
        }
        let mut applied: Vec<Change> = Vec::new();
        let mut deleted = Vec::new();
        for (id, old) in before {
            let said = self.say(&id);
            if self.claims.get(&id).is_some_and(Vec::is_empty) {
                self.claims.remove(&id);
            }
            if old == said {
                continue;
            }
            if id.kind == Kind::Pod && old.broken.is_some() && old.broken != said.broken {
                applied.push(Change::Mended(id.to_string()));
            }
            self.feed_derive(&id, said.good.as_ref().map(|(object, _)| object));
            if said == Said::default() {
                deleted.extend(deletion(id));
                continue;
            }
            // Good news first: a broken text of an object has its last good state in force.
            if let Some(good) = said.good.as_ref().filter(|_| old.good != said.good || said.broken.is_none())
            {
                applied.extend(application(&id, good));
            }
            if let Some(broken) = said.broken.as_ref().filter(|_| old.broken != said.broken) {
                applied.extend(failure(id.kind, broken));
            }
        }
        let derived = self.derive.flush().into_iter().map(Change::Slice);
        for change in derived {
            match change {
                Change::Slice(Delta::Delete(_)) => deleted.push(change),
                Change::Slice(Delta::Apply(_) | Delta::List(_))
                | Change::Service(_)
                | Change::Node(_)
                | Change::OwnAddresses(_)
                | Change::Mended(_)
                | Change::Following { .. } => applied.push(change),
            }
        }
        applied.append(&mut keyless);
        applied.append(&mut deleted);
        applied
    }

    /// All there is, as complete lists.
    pub(super) fn lists(&self) -> Vec<Change> {
        let mut nodes: Vec<Read<Node>> = Vec::new();
        let mut services: Vec<Read<Service>> = Vec::new();
        let mut slices: Vec<Read<Slice>> = Vec::new();
        let keyless = self.files.values().flat_map(|f| &f.broken).filter(|b| b.id.is_none());
        services.extend(keyless.map(|broken| Err(broken.unreadable())));
        // In order, so that equal files give equal lists.
        let ids: BTreeSet<&Id> = self.claims.keys().collect();
        for id in ids {
            let said = self.say(id);
            let changes = match (&said.good, &said.broken) {
                (Some(good), _) => application(id, good),
                (None, Some(broken)) => failure(id.kind, broken),
                (None, None) => None,
            };
            match changes {
                Some(Change::Node(Delta::Apply(node))) => nodes.push(node),
                Some(Change::Service(Delta::Apply(service))) => services.push(service),
                Some(Change::Slice(Delta::Apply(slice))) => slices.push(slice),
                Some(
                    Change::Node(Delta::List(_) | Delta::Delete(_))
                    | Change::Service(Delta::List(_) | Delta::Delete(_))
                    | Change::Slice(Delta::List(_) | Delta::Delete(_))
                    | Change::OwnAddresses(_)
                    | Change::Mended(_)
                    | Change::Following { .. },
                )
                | None => {}
            }
        }
        slices.extend(self.derive.slices().cloned().map(Arc::new).map(Ok));
        vec![
            Change::Node(Delta::List(nodes)),
            Change::Service(Delta::List(services)),
            Change::Slice(Delta::List(slices)),
        ]
    }

    /// Puts the new content of one file in place of the old.
    fn replace(&mut self, name: &str, parsed: Option<Parsed>, keyless: &mut Vec<Change>) {
        let old = self.files.remove(name).unwrap_or_default();
        for id in old.ids() {
            if let Some(files) = self.claims.get_mut(id) {
                files.retain(|file| *file != name);
            }
        }
        let is_keyless = |broken: &&Broken| broken.id.is_none();
        let before: Vec<&Broken> = old.broken.iter().filter(is_keyless).collect();
        let now: Vec<&Broken> = parsed.iter().flat_map(|p| &p.broken).filter(is_keyless).collect();
        if before != now {
            keyless.extend(before.first().map(|broken| Change::Mended(broken.unreadable().problem.object)));
            keyless.extend(now.into_iter().filter_map(|broken| failure(Kind::Service, broken)));
        }
        let Some(Parsed { entries, broken }) = parsed else {
            return;
        };
        let mut new = File { objects: HashMap::new(), broken };
        for Entry { id, object, line } in entries {
            if new.objects.contains_key(&id) {
                warn!("{name}:{line}: {id}: there twice in this file; the first one counts");
                continue;
            }
            new.objects.insert(id, object);
        }
        if !new.broken.is_empty() {
            // Nobody can tell what a broken text was meant to hold: a file with one takes nothing away.
            for (id, object) in &old.objects {
                new.objects.entry(id.clone()).or_insert_with(|| object.clone());
            }
        }
        for broken in new.broken.iter().filter(|broken| !old.broken.contains(broken)) {
            // Whoever gets the changes tells people.
            debug!("{broken}; what it held before stays in force");
        }
        for id in new.ids() {
            let files = self.claims.entry(id.clone()).or_insert_with(|| Vec::with_capacity(1));
            if let Err(place) = files.binary_search_by(|file| (**file).cmp(name)) {
                files.insert(place, name.into());
            }
        }
        self.files.insert(name.to_owned(), new);
    }

    /// What is to be said of an object now.
    fn say(&self, id: &Id) -> Said {
        let Some(claims) = self.claims.get(id) else {
            return Said::default();
        };
        let mut said = Said::default();
        for name in claims {
            let Some(file) = self.files.get(&**name) else {
                continue;
            };
            match (file.objects.get(id), &mut said.good) {
                // S3: as if it were not there.
                (Some(object), _) if *object == Object::Excluded => {}
                (Some(object), None) => said.good = Some((object.clone(), Vec::new())),
                (Some(_), Some((_, others))) => others.push(name.to_string()),
                (None, _) => {}
            }
            if said.broken.is_none() {
                said.broken = file.broken.iter().find(|b| b.id.as_ref() == Some(id)).cloned().map(Box::new);
            }
        }
        said
    }

    fn feed_derive(&mut self, id: &Id, object: Option<&Object>) {
        match (id.kind, object) {
            (Kind::Service, Some(Object::Service(_, selection))) => {
                self.derive.set_service(&id.key, selection.as_deref().cloned());
            }
            (Kind::Pod, Some(Object::Pod(pod))) => self.derive.set_pod(&id.key, Some((**pod).clone())),
            (Kind::Node, Some(Object::Node(node))) => self.derive.set_zone(&node.name, node.zone.as_deref()),
            (Kind::Service, _) => self.derive.set_service(&id.key, None),
            (Kind::Pod, _) => self.derive.set_pod(&id.key, None),
            (Kind::Node, _) => self.derive.set_zone(&id.key.name, None),
            (Kind::Slice, _) => {}
        }
    }
}

fn application(id: &Id, (object, others): &(Object, Vec<String>)) -> Option<Change> {
    let problem = (!others.is_empty()).then(|| Problem {
        object: id.to_string(),
        field: String::new(),
        message: format!("also in {}: ignored there, the first file by name counts", others.join(", ")),
    });
    match object {
        Object::Service(service, _) => {
            Some(Change::Service(Delta::Apply(noted(service, problem, |service| &mut service.problems))))
        }
        Object::Slice(slice) => {
            Some(Change::Slice(Delta::Apply(noted(slice, problem, |slice| &mut slice.problems))))
        }
        Object::Node(node) => {
            Some(Change::Node(Delta::Apply(noted(node, problem, |node| &mut node.problems))))
        }
        Object::Pod(_) => {
            if let Some(problem) = problem {
                warn!("{}: {}", problem.object, problem.message);
            }
            None
        }
        Object::Excluded => None,
    }
}

/// The same object, unless there is something to say of it.
fn noted<T: Clone>(
    object: &Arc<T>,
    problem: Option<Problem>,
    problems: impl FnOnce(&mut T) -> &mut Vec<Problem>,
) -> Read<T> {
    let mut object = Arc::clone(object);
    if let Some(problem) = problem {
        problems(Arc::make_mut(&mut object)).push(problem);
    }
    Ok(object)
}

fn failure(kind: Kind, broken: &Broken) -> Option<Change> {
    let unreadable = broken.unreadable();
    match kind {
        Kind::Node => Some(Change::Node(Delta::Apply(Err(unreadable)))),
        Kind::Service => Some(Change::Service(Delta::Apply(Err(unreadable)))),
        Kind::Slice => Some(Change::Slice(Delta::Apply(Err(unreadable)))),
        // Pods are not reported, but what is wrong with one is.
        Kind::Pod => Some(Change::Service(Delta::Apply(Err(Unreadable { key: None, ..unreadable })))),
    }
}

fn deletion(id: Id) -> Option<Change> {
    match id.kind {
        Kind::Node => Some(Change::Node(Delta::Delete(id.key))),
        Kind::Service => Some(Change::Service(Delta::Delete(id.key))),
        Kind::Slice => Some(Change::Slice(Delta::Delete(id.key))),
        Kind::Pod => None,
    }
}
