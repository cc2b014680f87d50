//! Builds the binaries, and says where they are.

use std::path::PathBuf;

use anyhow::{Context, Result};
use serde_json::Value;

use crate::shell::{cargo, output};

/// How to compile.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Profile {
    /// Fast to build.
    Dev,
    /// Optimised.
    Release,
}

/// What was built.
#[derive(Debug)]
pub(crate) struct Binaries {
    /// The agent.
    pub(crate) sheave: PathBuf,
    /// The client of the lab.
    pub(crate) lab_client: PathBuf,
}

/// Builds the agent and the lab's client.
pub(crate) fn build(profile: Profile) -> Result<Binaries> {
    let mut command = cargo()?;
    command.args(["build", "--package", "proxy-agent", "--package", "sheave-tests", "--bins"]);
    // Artifacts on stdout, for us; diagnostics and progress on stderr, for people.
    command.arg("--message-format=json-render-diagnostics");
    if profile == Profile::Release {
        command.arg("--release");
    }
    let messages = output(&mut command)?;
    let executables: Vec<_> = messages
        .split(|byte| *byte == b'\n')
        .filter_map(|line| serde_json::from_slice::<Value>(line).ok())
        .filter_map(|message| message.get("executable").and_then(Value::as_str).map(PathBuf::from))
        .collect();
    let find = |name: &str| {
        let found = executables.iter().find(|path| path.file_name().is_some_and(|file| file == name));
        found.cloned().with_context(|| format!("cargo built no binary `{name}`"))
    };
    Ok(Binaries { sheave: find("sheave")?, lab_client: find("lab-client")? })
}
