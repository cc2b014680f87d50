//! Objects as a source sees them: by kind and key, as JSON, and what a source reports of them.

use std::collections::BTreeMap;
use std::path::Path;
use std::sync::Arc;

use proxy_agent::object::{Change, Delta, ObjectKey, Problem, Readable, Reading, Unreadable};
use serde::Deserialize;
use serde_json::{Value, json};

/// Kind and `namespace/name`, or the name alone for a Node.
#[derive(Clone, PartialEq, Eq, PartialOrd, Ord, Debug)]
pub(crate) struct Id(pub(crate) String, pub(crate) String);

impl Id {
    /// `Service web`: in the namespace `default`.
    pub(crate) fn parse(text: &str) -> Self {
        let (kind, name) = text.split_once(' ').unwrap();
        let name =
            if kind == "Node" || name.contains('/') { name.to_owned() } else { format!("default/{name}") };
        Self(kind.to_owned(), name)
    }

    pub(crate) fn of(object: &Value) -> Self {
        let text = |field| object.pointer(field).and_then(Value::as_str).unwrap_or_default();
        let (kind, name) = (text("/kind"), text("/metadata/name"));
        if kind == "Node" {
            return Self(kind.to_owned(), name.to_owned());
        }
        let namespace = Some(text("/metadata/namespace")).filter(|namespace| !namespace.is_empty());
        Self(kind.to_owned(), format!("{}/{name}", namespace.unwrap_or("default")))
    }

    fn key(&self) -> ObjectKey {
        let (namespace, name) = self.1.split_once('/').unwrap_or(("", &self.1));
        ObjectKey::new(namespace, name)
    }
}

/// One object is new, changed or (`None`) gone.
pub(crate) type Event = (Id, Option<Value>);

/// The state of an API server.
#[derive(Clone, Default)]
pub(crate) struct Objects(pub(crate) BTreeMap<Id, Value>);

impl Objects {
    pub(crate) fn apply(&mut self, (id, object): &Event) {
        match object {
            Some(object) => self.0.insert(id.clone(), object.clone()),
            None => self.0.remove(id),
        };
    }

    /// Manifests of all objects, in as many files.
    pub(crate) fn write(&self, directory: &Path) {
        for (number, object) in self.0.values().enumerate() {
            let path = directory.join(format!("{number:04}.json"));
            std::fs::write(path, serde_json::to_vec(object).unwrap()).unwrap();
        }
    }
}

/// Fills in what the API server would.
pub(crate) fn complete(mut object: Value) -> Value {
    let is_node = object["kind"] == "Node";
    let version = if object["kind"] == "EndpointSlice" { "discovery.k8s.io/v1" } else { "v1" };
    object["apiVersion"] = json!(version);
    if !is_node && object["metadata"]["namespace"].is_null() {
        object["metadata"]["namespace"] = json!("default");
    }
    object
}

/// What a watch with the selectors of S3 reports.
pub(crate) fn change((id, object): &Event) -> Change {
    let has_label = |label: &str| {
        let labels = object.as_ref().and_then(|object| object.pointer("/metadata/labels"));
        labels.is_some_and(|labels| labels.get(label).is_some())
    };
    match id.0.as_str() {
        "Service" if has_label("service.kubernetes.io/service-proxy-name") => {
            Change::Service(Delta::Delete(id.key()))
        }
        "EndpointSlice" if has_label("service.kubernetes.io/headless") => {
            Change::Slice(Delta::Delete(id.key()))
        }
        "Service" => Change::Service(delta(id, object.as_ref())),
        "EndpointSlice" => Change::Slice(delta(id, object.as_ref())),
        "Node" => Change::Node(delta(id, object.as_ref())),
        other => panic!("{other} is read by no one"),
    }
}

fn delta<T: Readable>(id: &Id, object: Option<&Value>) -> Delta<T> {
    let Some(object) = object else { return Delta::Delete(id.key()) };
    let read = Reading::deserialize(object).unwrap().content.map(Arc::new).map_err(|mismatch| Unreadable {
        key: Some(id.key()),
        problem: Problem {
            object: format!("{} {}", id.0, id.1),
            field: mismatch.field(),
            message: mismatch.message().to_owned(),
        },
    });
    Delta::Apply(read)
}

/// RFC 7386: what is not named stays, null takes away.
pub(crate) fn merge(target: &mut Value, patch: &Value) {
    let Value::Object(patch) = patch else {
        *target = patch.clone();
        return;
    };
    if !target.is_object() {
        *target = json!({});
    }
    for (key, value) in patch {
        if value.is_null() {
            if let Value::Object(fields) = target {
                fields.remove(key);
            }
        } else {
            merge(&mut target[key.as_str()], value);
        }
    }
}
