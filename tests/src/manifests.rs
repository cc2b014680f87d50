//! Writes what `sheave run --manifests DIR` reads: YAML files of Services, Pods, EndpointSlices and Nodes.
//!
//! Builders give what a test usually wants; [`Object::set`] changes anything else by its path in the object.

use std::{
    fmt::Write as _,
    fs, io,
    path::{Path, PathBuf},
};

use anyhow::{Context, Result};
use serde_json::{Map, Value, json};

/// A directory of manifests.
#[derive(Debug)]
pub struct Manifests {
    directory: PathBuf,
}

impl Manifests {
    /// Makes the directory.
    pub fn new(directory: PathBuf) -> Result<Self> {
        fs::create_dir_all(&directory).with_context(|| format!("making {}", directory.display()))?;
        Ok(Self { directory })
    }

    /// Where it is.
    #[must_use]
    pub fn path(&self) -> &Path {
        &self.directory
    }

    /// Writes objects into the file `NAME.yaml`; a reader sees the old file or the new one, nothing between.
    pub fn write(&self, name: &str, objects: &[Object]) -> Result<()> {
        let documents: Vec<_> = objects.iter().map(Object::yaml).collect();
        self.write_text(name, &documents.join("---\n"))
    }

    /// Writes any text into the file `NAME.yaml`.
    pub fn write_text(&self, name: &str, text: &str) -> Result<()> {
        // A name without the ending: readers take YAML files only.
        let (unfinished, path) = (self.directory.join(format!(".{name}.new")), self.file(name));
        fs::write(&unfinished, text).with_context(|| format!("writing {}", unfinished.display()))?;
        fs::rename(&unfinished, &path).with_context(|| format!("writing {}", path.display()))
    }

    /// Removes the file `NAME.yaml`, if it is there.
    pub fn remove(&self, name: &str) -> Result<()> {
        let path = self.file(name);
        match fs::remove_file(&path) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => {
                Err(error).with_context(|| format!("removing {}", path.display()))
            }
            Ok(()) | Err(_) => Ok(()),
        }
    }

    fn file(&self, name: &str) -> PathBuf {
        self.directory.join(format!("{name}.yaml"))
    }
}

/// One Kubernetes object.
#[derive(Clone, Debug, PartialEq)]
pub struct Object(Value);

impl Object {
    fn new(api_version: &str, kind: &str, name: &str) -> Self {
        object(api_version, kind, name).namespace("default")
    }

    /// Sets a field by its path (`spec.internalTrafficPolicy`), making what is missing on the way. Numbers on the path
    /// count list items.
    #[must_use]
    pub fn set(mut self, path: &str, value: impl Into<Value>) -> Self {
        *self.slot(path) = value.into();
        self
    }

    /// Appends to a list by its path.
    #[must_use]
    pub fn push(mut self, path: &str, value: impl Into<Value>) -> Self {
        let slot = self.slot(path);
        if !slot.is_array() {
            *slot = Value::Array(Vec::new());
        }
        if let Value::Array(items) = slot {
            items.push(value.into());
        }
        self
    }

    /// In another namespace.
    #[must_use]
    pub fn namespace(self, namespace: &str) -> Self {
        self.set("metadata.namespace", namespace)
    }

    /// With a label; keys may hold dots.
    #[must_use]
    pub fn label(mut self, key: &str, value: &str) -> Self {
        insert(self.slot("metadata.labels"), key, value);
        self
    }

    /// The object as JSON.
    #[must_use]
    pub fn json(&self) -> &Value {
        &self.0
    }

    /// The object as YAML, as a person would write it.
    #[must_use]
    pub fn yaml(&self) -> String {
        let mut text = String::new();
        block(&self.0, 0, &mut text);
        text
    }

    fn slot(&mut self, path: &str) -> &mut Value {
        path.split('.').fold(&mut self.0, |value, step| match step.parse::<usize>() {
            Ok(index) => item(value, index),
            Err(_) => member(value, step),
        })
    }
}

fn member<'a>(value: &'a mut Value, key: &str) -> &'a mut Value {
    if !value.is_object() {
        *value = Value::Object(Map::new());
    }
    // `Value` makes the member if it is missing, as the value is an object now.
    &mut value[key]
}

fn item(value: &mut Value, index: usize) -> &mut Value {
    if !value.is_array() {
        *value = Value::Array(Vec::new());
    }
    if let Value::Array(items) = value
        && items.len() <= index
    {
        items.resize(index + 1, Value::Null);
    }
    &mut value[index]
}

fn insert(map: &mut Value, key: &str, value: impl Into<Value>) {
    *member(map, key) = value.into();
}

/// A Service with cluster IPs of one or both families, the first being its primary family.
#[must_use]
pub fn service(name: &str, cluster_ips: &[&str]) -> Object {
    let families: Vec<_> =
        cluster_ips.iter().map(|address| if address.contains(':') { "IPv6" } else { "IPv4" }).collect();
    let policy = if families.len() > 1 { "RequireDualStack" } else { "SingleStack" };
    Object::new("v1", "Service", name)
        .set("spec.type", "ClusterIP")
        .set("spec.clusterIP", cluster_ips.first().copied().unwrap_or("None"))
        .set("spec.clusterIPs", cluster_ips)
        .set("spec.ipFamilies", families)
        .set("spec.ipFamilyPolicy", policy)
}

impl Object {
    /// A Service's port; `target` is a port number or the name of a container port.
    #[must_use]
    pub fn port(self, name: &str, protocol: &str, port: u16, target: impl Into<Value>) -> Self {
        let target: Value = target.into();
        self.push(
            "spec.ports",
            json!({"name": name, "protocol": protocol, "port": port, "targetPort": target}),
        )
    }

    /// A Service's selector.
    #[must_use]
    pub fn selector(mut self, key: &str, value: &str) -> Self {
        insert(self.slot("spec.selector"), key, value);
        self
    }

    /// A Service of type NodePort; `node_ports` go to the ports in their order.
    #[must_use]
    pub fn node_ports(self, node_ports: &[u16]) -> Self {
        node_ports.iter().enumerate().fold(self.set("spec.type", "NodePort"), |object, (index, node_port)| {
            object.set(&format!("spec.ports.{index}.nodePort"), *node_port)
        })
    }

    /// A container's port of a Pod.
    #[must_use]
    pub fn container_port(self, name: &str, protocol: &str, port: u16) -> Self {
        self.push(
            "spec.containers.0.ports",
            json!({"name": name, "protocol": protocol, "containerPort": port}),
        )
    }

    /// Whether a Pod is ready.
    #[must_use]
    pub fn ready(self, ready: bool) -> Self {
        let status = if ready { "True" } else { "False" };
        self.set("status.conditions", json!([{"type": "Ready", "status": status}]))
    }

    /// A slice's port.
    #[must_use]
    pub fn slice_port(self, name: &str, protocol: &str, port: u16) -> Self {
        self.push("ports", json!({"name": name, "protocol": protocol, "port": port}))
    }

    /// A ready endpoint of a slice.
    #[must_use]
    pub fn endpoint(self, address: &str, node: &str) -> Self {
        self.endpoint_with(address, node, true, true, false)
    }

    /// An endpoint of a slice with its conditions.
    #[must_use]
    pub fn endpoint_with(
        self,
        address: &str,
        node: &str,
        ready: bool,
        serving: bool,
        terminating: bool,
    ) -> Self {
        self.push(
            "endpoints",
            json!({
                "addresses": [address],
                "conditions": {"ready": ready, "serving": serving, "terminating": terminating},
                "nodeName": node,
            }),
        )
    }
}

/// A Pod that runs and is ready.
#[must_use]
pub fn pod(name: &str, node: &str, addresses: &[String]) -> Object {
    let ips: Vec<_> = addresses.iter().map(|address| json!({"ip": address})).collect();
    Object::new("v1", "Pod", name)
        .set("spec.nodeName", node)
        .set("spec.containers.0.name", "server")
        .set("status.phase", "Running")
        .set("status.podIP", addresses.first().cloned().unwrap_or_default())
        .set("status.podIPs", ips)
        .ready(true)
}

/// An EndpointSlice of a Service; `family` is `IPv4` or `IPv6`.
#[must_use]
pub fn slice(name: &str, service: &str, family: &str) -> Object {
    Object::new("discovery.k8s.io/v1", "EndpointSlice", name)
        .label("kubernetes.io/service-name", service)
        .set("addressType", family)
        .set("ports", json!([]))
        .set("endpoints", json!([]))
}

/// A Node with its own addresses and the prefixes of its pods.
#[must_use]
pub fn node(name: &str, addresses: &[String], pod_cidrs: &[String]) -> Object {
    let addresses: Vec<_> =
        addresses.iter().map(|address| json!({"type": "InternalIP", "address": address})).collect();
    object("v1", "Node", name)
        .set("spec.podCIDR", pod_cidrs.first().cloned().unwrap_or_default())
        .set("spec.podCIDRs", pod_cidrs)
        .set("status.addresses", addresses)
}

/// An object of any kind, in no namespace.
#[must_use]
pub fn object(api_version: &str, kind: &str, name: &str) -> Object {
    Object(json!({"apiVersion": api_version, "kind": kind, "metadata": {"name": name}}))
}

/// The Node object of a lab's node.
#[must_use]
pub fn lab_node(node_: &crate::lab::Node) -> Object {
    node(
        node_.name(),
        &[node_.host().v4().to_string(), node_.host().v6().to_string()],
        &[node_.pod_cidr_v4(), node_.pod_cidr_v6()],
    )
}

/// The Pod object of a lab's pod, under a name and with a label `app`.
#[must_use]
pub fn lab_pod(name: &str, app: &str, node: &crate::lab::Node, place: &crate::lab::Place) -> Object {
    pod(name, node.name(), &[place.v4().to_string(), place.v6().to_string()]).label("app", app)
}

/// Writes a value at an indentation. Keys of the API need no quotes; strings are quoted as in JSON, which YAML reads too.
fn block(value: &Value, indent: usize, text: &mut String) {
    // Writing to a string cannot fail.
    match value {
        Value::Object(members) => {
            for (key, member) in members {
                let _ = write!(text, "{:indent$}{key}:", "");
                nested(member, indent, text);
            }
        }
        Value::Array(items) => {
            for item in items {
                if is_branch(item) {
                    // The first member stands on the line of the dash.
                    let mut inner = String::new();
                    block(item, indent + 2, &mut inner);
                    let _ = write!(text, "{:indent$}- {}", "", inner.trim_start());
                } else {
                    let _ = writeln!(text, "{:indent$}- {item}", "");
                }
            }
        }
        Value::Null | Value::Bool(_) | Value::Number(_) | Value::String(_) => {
            let _ = writeln!(text, "{:indent$}{value}", "");
        }
    }
}

fn nested(value: &Value, indent: usize, text: &mut String) {
    if is_branch(value) {
        text.push('\n');
        block(value, indent + 2, text);
    } else {
        let _ = writeln!(text, " {value}");
    }
}

/// Whether a value takes lines of its own; empty ones are written `[]` and `{}`.
fn is_branch(value: &Value) -> bool {
    match value {
        Value::Object(members) => !members.is_empty(),
        Value::Array(items) => !items.is_empty(),
        Value::Null | Value::Bool(_) | Value::Number(_) | Value::String(_) => false,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_service_reads_as_a_person_would_write_it() {
        let service = service("web", &["10.96.0.1", "fd00:96::1"])
            .port("http", "TCP", 80, 9876)
            .selector("app.kubernetes.io/name", "web")
            .node_ports(&[30080]);
        assert_eq!(
            service.yaml(),
            r#"apiVersion: "v1"
kind: "Service"
metadata:
  name: "web"
  namespace: "default"
spec:
  clusterIP: "10.96.0.1"
  clusterIPs:
    - "10.96.0.1"
    - "fd00:96::1"
  ipFamilies:
    - "IPv4"
    - "IPv6"
  ipFamilyPolicy: "RequireDualStack"
  ports:
    - name: "http"
      nodePort: 30080
      port: 80
      protocol: "TCP"
      targetPort: 9876
  selector:
    app.kubernetes.io/name: "web"
  type: "NodePort"
"#
        );
    }

    #[test]
    fn empty_lists_stay_lists() {
        let slice = slice("web-1", "web", "IPv4").slice_port("http", "TCP", 9876);
        assert!(slice.yaml().contains("endpoints: []\n"), "{}", slice.yaml());
        assert!(slice.endpoint("10.0.0.1", "n").yaml().contains("  - addresses:\n      - \"10.0.0.1\"\n"));
    }
}
