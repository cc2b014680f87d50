//! Requests of a test to the API server, as its administrator.
//!
//! They go through `kubectl proxy` on a Unix socket, which reaches into the lab's namespace from any thread and does TLS
//! and credentials. So what is left here is HTTP of the simplest kind.

use std::{
    io::{Read, Write},
    os::unix::net::UnixStream,
    path::PathBuf,
    time::Duration,
};

use anyhow::{Context, Result, bail};
use serde_json::{Value, json};

use crate::manifests::Object;

/// No request of a test takes long; a server that hangs shall not hang the test.
const PATIENCE: Duration = Duration::from_secs(60);

/// What the API server knows changes of the tests by.
const MANAGER: &str = "sheave-tests";

/// The way to the API server.
#[derive(Clone, Debug)]
pub struct Api {
    socket: PathBuf,
}

/// An answer that is no success.
#[derive(Debug)]
pub struct Refused {
    /// The HTTP status.
    pub code: u16,
    /// What the server says.
    pub message: String,
}

impl std::fmt::Display for Refused {
    fn fmt(&self, formatter: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(formatter, "the API server says {}: {}", self.code, self.message)
    }
}

impl std::error::Error for Refused {}

impl Api {
    pub(crate) fn new(socket: PathBuf) -> Self {
        Self { socket }
    }

    /// Makes an object, or makes it what is given: fields that an earlier apply gave and this one does not are removed.
    pub fn apply(&self, object: &Object) -> Result<Value> {
        let path = format!("{}?fieldManager={MANAGER}&force=true", path(object.json())?);
        self.request("PATCH", &path, "application/apply-patch+yaml", Some(object.json()))
    }

    /// Applies several objects.
    pub fn apply_all(&self, objects: &[Object]) -> Result<()> {
        objects.iter().try_for_each(|object| self.apply(object).map(drop))
    }

    /// Makes an object that is not there yet.
    pub fn create(&self, object: &Object) -> Result<Value> {
        self.post(&collection(object.json())?, object.json())
    }

    /// Changes the fields that are given (a merge patch; `null` removes).
    pub fn patch(&self, object: &Object, change: &Value) -> Result<Value> {
        self.request("PATCH", &path(object.json())?, "application/merge-patch+json", Some(change))
    }

    /// Sets the object's status to the one that is given.
    pub fn set_status(&self, object: &Object) -> Result<Value> {
        let status = object.json().get("status").context("an object without a status")?;
        let path = format!("{}/status", path(object.json())?);
        self.request("PATCH", &path, "application/merge-patch+json", Some(&json!({"status": status})))
    }

    /// The object as it is now.
    pub fn get(&self, object: &Object) -> Result<Value> {
        self.get_path(&path(object.json())?)
    }

    /// Removes an object at once; its dependents are removed by the garbage collector.
    pub fn delete(&self, object: &Object) -> Result<()> {
        self.delete_in(object, 0)
    }

    /// Removes an object after a grace period. A Pod that runs on a node is terminating from now on, and there until
    /// somebody deletes it at once, which would be its kubelet.
    pub fn delete_in(&self, object: &Object, grace_period_s: u32) -> Result<()> {
        let options = json!({"gracePeriodSeconds": grace_period_s, "propagationPolicy": "Background"});
        self.request("DELETE", &path(object.json())?, "application/json", Some(&options)).map(drop)
    }

    /// Anything that can be read.
    pub fn get_path(&self, path: &str) -> Result<Value> {
        self.request("GET", path, "application/json", None)
    }

    /// Anything that is text.
    pub fn get_text(&self, path: &str) -> Result<String> {
        self.exchange("GET", path, "application/json", None)
    }

    /// Posts to any path.
    pub fn post(&self, path: &str, body: &Value) -> Result<Value> {
        self.request("POST", path, "application/json", Some(body))
    }

    /// Replaces what is at a path.
    pub fn put(&self, path: &str, body: &Value) -> Result<Value> {
        self.request("PUT", path, "application/json", Some(body))
    }

    fn request(&self, method: &str, path: &str, kind: &str, body: Option<&Value>) -> Result<Value> {
        let text = self.exchange(method, path, kind, body)?;
        serde_json::from_str(&text).with_context(|| format!("{method} {path}: the answer {text:?}"))
    }

    fn exchange(&self, method: &str, path: &str, kind: &str, body: Option<&Value>) -> Result<String> {
        let (code, text) = exchange_on(
            UnixStream::connect(&self.socket).and_then(|stream| {
                stream.set_read_timeout(Some(PATIENCE))?;
                Ok(stream)
            }),
            method,
            path,
            kind,
            body,
        )
        .with_context(|| format!("{method} {path} through {}", self.socket.display()))?;
        if !(200..300).contains(&code) {
            let status: Option<Value> = serde_json::from_str(&text).ok();
            let message =
                status.as_ref().and_then(|status| status.get("message")?.as_str()).unwrap_or(text.trim());
            return Err(Refused { code, message: message.to_owned() })
                .with_context(|| format!("{method} {path}"));
        }
        Ok(text)
    }
}

/// One request of HTTP/1.0: the answer ends where the connection does.
pub(crate) fn exchange_on(
    stream: std::io::Result<impl Read + Write>,
    method: &str,
    path: &str,
    kind: &str,
    body: Option<&Value>,
) -> Result<(u16, String)> {
    let mut stream = stream.context("connecting")?;
    let body = body.map(Value::to_string).unwrap_or_default();
    let head = format!(
        "{method} {path} HTTP/1.0\r\nHost: localhost\r\nContent-Type: {kind}\r\nContent-Length: {}\r\n\r\n",
        body.len()
    );
    stream.write_all([head.as_bytes(), body.as_bytes()].concat().as_slice()).context("asking")?;
    let mut answer = Vec::new();
    stream.read_to_end(&mut answer).context("reading the answer")?;
    let answer = String::from_utf8(answer).context("the answer is no text")?;
    let Some((head, text)) = answer.split_once("\r\n\r\n") else { bail!("the answer is {answer:?}") };
    let code = head.split(' ').nth(1).and_then(|code| code.parse().ok());
    Ok((code.with_context(|| format!("the answer begins {head:?}"))?, text.to_owned()))
}

/// The path of an object's kind.
fn collection(object: &Value) -> Result<String> {
    let text = |pointer: &str| object.pointer(pointer).and_then(Value::as_str);
    let (Some(version), Some(kind)) = (text("/apiVersion"), text("/kind")) else {
        bail!("no object of the API: {object}");
    };
    let root = if version.contains('/') { "apis" } else { "api" };
    let mut plural = kind.to_lowercase();
    if !plural.ends_with('s') {
        plural.push('s');
    }
    Ok(match text("/metadata/namespace") {
        Some(namespace) => format!("/{root}/{version}/namespaces/{namespace}/{plural}"),
        None => format!("/{root}/{version}/{plural}"),
    })
}

/// The path of an object.
fn path(object: &Value) -> Result<String> {
    let name =
        object.pointer("/metadata/name").and_then(Value::as_str).context("an object without a name")?;
    Ok(format!("{}/{name}", collection(object)?))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::manifests::{node, service, slice};

    #[test]
    fn objects_have_their_paths() {
        let path = |object: Object| path(object.json()).unwrap();
        assert_eq!(path(service("a", &[])), "/api/v1/namespaces/default/services/a");
        assert_eq!(
            path(slice("b", "a", "IPv4").namespace("x")),
            "/apis/discovery.k8s.io/v1/namespaces/x/endpointslices/b"
        );
        assert_eq!(path(node("n", &[], &[])), "/api/v1/nodes/n");
    }
}
