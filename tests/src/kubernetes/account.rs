//! Who the agents are to the API server: the account and the role of `deploy/sheave.yaml`, itself.

use std::{
    fs,
    os::unix::fs::symlink,
    path::{Path, PathBuf},
};

use anyhow::{Context, Result};
use serde_json::{Value, json};

use super::{api::Api, control_plane::ControlPlane};

/// What a cluster is given to run Sheave.
const MANIFEST: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/../deploy/sheave.yaml");

/// Where the account is.
const ACCOUNT: &str = "/api/v1/namespaces/kube-system/serviceaccounts/sheave";

/// Where the role is.
const ROLE: &str = "/apis/rbac.authorization.k8s.io/v1/clusterroles/sheave";

/// Tokens of a test live as long as it may last.
const TOKEN_LIVES_S: u32 = 3600;

/// A kubeconfig of the lab's API server for a user as kubeconfigs write it.
pub(crate) fn kubeconfig(plane: &ControlPlane, user: &Value) -> Value {
    json!({
        "apiVersion": "v1",
        "kind": "Config",
        "clusters": [{"name": "lab", "cluster": {
            "server": format!("https://{}", plane.address()),
            "certificate-authority": plane.certificate_authority(),
        }}],
        "users": [{"name": "user", "user": user}],
        "contexts": [{"name": "lab", "context": {"cluster": "lab", "user": "user"}}],
        "current-context": "lab",
    })
}

/// Gives the cluster all that is in `deploy/sheave.yaml`: the account, its role, and a DaemonSet that nobody runs.
pub fn deploy(plane: &ControlPlane) -> Result<()> {
    // A test may have changed the role meanwhile.
    let options = ["--server-side", "--force-conflicts", "--validate=false"];
    plane.kubectl(&[&["apply", "-f", MANIFEST], &options[..]].concat()).map(drop)
}

/// A token of the account. One that is bound to a Pod is worth nothing any more when the Pod is gone.
pub fn token(api: &Api, bound_to: Option<&str>) -> Result<String> {
    let mut request = json!({"spec": {"expirationSeconds": TOKEN_LIVES_S}});
    if let Some(pod) = bound_to {
        request["spec"]["boundObjectRef"] = json!({"kind": "Pod", "apiVersion": "v1", "name": pod});
    }
    let answer = api.post(&format!("{ACCOUNT}/token"), &request)?;
    let token = answer.pointer("/status/token").and_then(Value::as_str);
    Ok(token.with_context(|| format!("asked for a token, the API server said {answer}"))?.to_owned())
}

/// A kubeconfig that has the token in a file, and that file.
pub fn kubeconfig_with_token_file(
    plane: &ControlPlane,
    name: &str,
    token: &str,
) -> Result<(PathBuf, PathBuf)> {
    let directory = plane.directory();
    let (config, file) = (directory.join(format!("{name}.conf")), directory.join(format!("{name}.token")));
    fs::write(&file, token).with_context(|| format!("writing {}", file.display()))?;
    let text = kubeconfig(plane, &json!({"tokenFile": file})).to_string();
    fs::write(&config, text).with_context(|| format!("writing {}", config.display()))?;
    Ok((config, file))
}

/// Writes what a pod finds of its account, as a kubelet does: a link is moved to a new directory, so that a reader sees
/// the old files or the new ones.
pub fn write_account(plane: &ControlPlane, directory: &Path, generation: u32, token: &str) -> Result<()> {
    let context = || format!("writing the account in {}", directory.display());
    let files = directory.join(format!("..{generation}"));
    fs::create_dir_all(&files).with_context(context)?;
    fs::write(files.join("token"), token).with_context(context)?;
    fs::write(files.join("namespace"), "kube-system").with_context(context)?;
    fs::copy(plane.certificate_authority(), files.join("ca.crt")).with_context(context)?;
    let (new, data) = (directory.join("..new"), directory.join("..data"));
    symlink(format!("..{generation}"), &new).with_context(context)?;
    fs::rename(&new, &data).with_context(context)?;
    for name in ["token", "namespace", "ca.crt"] {
        if !directory.join(name).exists() {
            symlink(format!("..data/{name}"), directory.join(name)).with_context(context)?;
        }
    }
    Ok(())
}

/// Takes a verb on a resource from the role.
pub fn forbid(api: &Api, resource: &str, verb: &str) -> Result<()> {
    let mut role = api.get_path(ROLE)?;
    let rules = role["rules"].as_array_mut().context("a role without rules")?;
    for rule in rules.iter_mut().filter(|rule| rule["resources"] == json!([resource])) {
        rule["verbs"].as_array_mut().context("a rule without verbs")?.retain(|other| other != verb);
    }
    // An empty list of verbs is none that the API takes.
    rules.retain(|rule| rule["verbs"] != json!([]));
    api.put(ROLE, &role).map(drop)
}
