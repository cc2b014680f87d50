//! What was said about which object, so that the log says everything once.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt::Display;

use crate::object::{Change, Delta, ObjectKey, Problem, Read};

/// Where a problem was found: each source says all that it has of an object at once.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug)]
enum Source {
    /// In the object itself.
    Object,
    /// When its Service was resolved.
    Resolve,
    /// In what holds for the whole node.
    Node,
}

/// Something to say.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum News {
    /// A problem that was not said yet.
    Problem(Problem),
    /// This object had problems and has none any more.
    Gone(String),
}

impl News {
    /// Says it in the log.
    pub fn log(&self) {
        match self {
            Self::Problem(Problem { object, field, message }) => tracing::warn!(object, field, "{message}"),
            Self::Gone(object) => tracing::info!(object, "its problems are gone"),
        }
    }
}

/// See the module. Every method returns what is new.
#[derive(Default, Debug)]
pub struct Told {
    by_object: BTreeMap<(Source, String), BTreeSet<Problem>>,
}

impl Told {
    /// What a source reports.
    pub fn change(&mut self, change: &Change) -> Vec<News> {
        match change {
            Change::Service(delta) => {
                self.delta("Service", delta, |service| (&service.key, &service.problems))
            }
            Change::Slice(delta) => self.delta("EndpointSlice", delta, |slice| (&slice.key, &slice.problems)),
            Change::Node(delta) => self.delta("Node", delta, |node| (&node.name, &node.problems)),
            // Those who follow say that themselves.
            Change::OwnAddresses(_) | Change::Following { .. } => Vec::new(),
            Change::Mended(object) => self.tell(Source::Object, object.clone(), BTreeSet::new()),
        }
    }

    /// What resolving a Service found; nothing if it is gone.
    pub fn service(&mut self, key: &ObjectKey, problems: Vec<Problem>) -> Vec<News> {
        if problems.is_empty() && self.by_object.is_empty() {
            return Vec::new();
        }
        self.tell(Source::Resolve, format!("Service {key}"), problems.into_iter().collect())
    }

    /// What is odd about this node and the options.
    pub fn node(&mut self, name: &str, problems: Vec<Problem>) -> Vec<News> {
        self.tell(Source::Node, format!("Node {name}"), problems.into_iter().collect())
    }

    fn delta<T>(
        &mut self,
        kind: &str,
        delta: &Delta<T>,
        parts: impl Fn(&T) -> (&dyn Display, &Vec<Problem>),
    ) -> Vec<News> {
        let reads = match delta {
            Delta::List(list) => list.as_slice(),
            Delta::Apply(read) => std::slice::from_ref(read),
            Delta::Delete(key) => {
                self.by_object.remove(&(Source::Object, format!("{kind} {key}")));
                return Vec::new();
            }
        };
        let mut named: BTreeMap<String, BTreeSet<Problem>> = BTreeMap::new();
        for read in reads {
            // Nearly all: nothing is wrong with it, and nothing was said of anything.
            if self.by_object.is_empty() && read.as_ref().is_ok_and(|object| parts(object).1.is_empty()) {
                continue;
            }
            let (object, problems) = self.read(kind, read, &parts);
            named.entry(object).or_default().extend(problems);
        }
        if let Delta::List(_) = delta {
            // Whoever has the name of a file, not of an object, is mended by name.
            let is_of_kind =
                |object: &str| object.strip_prefix(kind).is_some_and(|rest| rest.starts_with(' '));
            self.by_object.retain(|(source, object), _| {
                *source != Source::Object || !is_of_kind(object) || named.contains_key(object)
            });
        }
        named.into_iter().flat_map(|(object, problems)| self.tell(Source::Object, object, problems)).collect()
    }

    fn read<T>(
        &self,
        kind: &str,
        read: &Read<T>,
        parts: impl Fn(&T) -> (&dyn Display, &Vec<Problem>),
    ) -> (String, Vec<Problem>) {
        match read {
            Ok(object) => {
                let (key, problems) = parts(object);
                (format!("{kind} {key}"), problems.clone())
            }
            Err(unreadable) => {
                let object = unreadable.problem.object.clone();
                let mut problems = vec![unreadable.problem.clone()];
                if unreadable.key.is_none() {
                    // One file may have many; they hold until it is mended.
                    let known = self.by_object.get(&(Source::Object, object.clone()));
                    problems.extend(known.into_iter().flatten().cloned());
                }
                (object, problems)
            }
        }
    }

    fn tell(&mut self, source: Source, object: String, problems: BTreeSet<Problem>) -> Vec<News> {
        let key = (source, object);
        if problems.is_empty() {
            let had = self.by_object.remove(&key).is_some();
            return had.then_some(News::Gone(key.1)).into_iter().collect();
        }
        let known = self.by_object.entry(key).or_default();
        let news = problems.difference(known).cloned().map(News::Problem).collect();
        *known = problems;
        news
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::object::{Node, Unreadable};

    fn problem(object: &str, message: &str) -> Problem {
        Problem { object: object.to_owned(), field: String::new(), message: message.to_owned() }
    }

    fn node(name: &str, messages: &[&str]) -> Read<Node> {
        let object = format!("Node {name}");
        let problems = messages.iter().map(|message| problem(&object, message)).collect();
        Ok(Node { name: name.to_owned(), zone: None, addresses: vec![], pod_cidrs: vec![], problems }.into())
    }

    fn list(reads: Vec<Read<Node>>) -> Change {
        Change::Node(Delta::List(reads))
    }

    /// The messages that are new.
    fn said(news: Vec<News>) -> Vec<String> {
        let text = |news| match news {
            News::Problem(problem) => problem.message,
            News::Gone(object) => format!("gone: {object}"),
        };
        news.into_iter().map(text).collect()
    }

    #[test]
    fn everything_is_said_once_and_its_end_too() {
        let mut told = Told::default();
        let bad = Change::Node(Delta::Apply(node("a", &["x"])));
        assert_eq!(said(told.change(&bad)), ["x"]);
        assert!(told.change(&bad).is_empty());
        assert_eq!(said(told.change(&Change::Node(Delta::Apply(node("a", &["x", "y"]))))), ["y"]);
        assert_eq!(said(told.change(&Change::Node(Delta::Apply(node("a", &[]))))), ["gone: Node a"]);
        assert_eq!(said(told.change(&bad)), ["x"]);
    }

    #[test]
    fn what_a_list_does_not_name_is_forgotten() {
        let mut told = Told::default();
        let file = problem("file.yaml", "torn");
        let torn = Err(Unreadable { key: None, problem: file.clone() });
        let first = list(vec![node("a", &["x"]), node("b", &["y"]), torn]);
        assert_eq!(said(told.change(&first)), ["x", "y", "torn"]);
        assert!(told.change(&list(vec![node("a", &["x"])])).is_empty());
        let left: Vec<&str> = told.by_object.keys().map(|(_, object)| object.as_str()).collect();
        assert_eq!(left, ["Node a", "file.yaml"]);
        assert_eq!(said(told.change(&Change::Mended(file.object))), ["gone: file.yaml"]);
        // It is news when it comes back.
        assert_eq!(said(told.change(&Change::Node(Delta::Apply(node("b", &["y"]))))), ["y"]);
    }

    #[test]
    fn n2_what_is_odd_about_the_node_is_said_once_for_each_change() {
        let mut told = Told::default();
        let open = problem("Node n1", "open");
        assert_eq!(said(told.node("n1", vec![open.clone()])), ["open"]);
        assert!(told.node("n1", vec![open.clone()]).is_empty());
        // The object itself is another matter.
        assert_eq!(said(told.change(&list(vec![node("n1", &["bad"])]))), ["bad"]);
        assert!(told.change(&list(vec![node("n1", &["bad"])])).is_empty());
        assert!(told.node("n1", vec![open]).is_empty());
        assert_eq!(said(told.node("n1", vec![])), ["gone: Node n1"]);
    }
}
