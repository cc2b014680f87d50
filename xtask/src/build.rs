//! Builds the binaries, and says where they are.

use std::{env, path::PathBuf, process::Command};

use anyhow::{Context, Result};
use serde_json::Value;

use crate::shell::{cargo, output};

/// Set where `SHEAVE_BIN` and `SHEAVE_LAB_CLIENT` say where the binaries are and nothing is to be built or set up.
pub(crate) const PREPARED: &str = "SHEAVE_PREPARED";

/// Whether this process was told where the binaries are.
pub(crate) fn is_prepared() -> bool {
    env::var_os(PREPARED).is_some()
}

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
    if profile == Profile::Release {
        command.arg("--release");
    }
    let executables = executables(&mut command)?;
    let find = |name: &str| {
        let found = executables.iter().find(|(target, _)| target == name).map(|(_, path)| path.clone());
        found.with_context(|| format!("cargo built no binary `{name}`"))
    };
    Ok(Binaries { sheave: find("sheave")?, lab_client: find("lab-client")? })
}

/// Builds a suite of tests.
pub(crate) fn suite(name: &str) -> Result<PathBuf> {
    let mut command = cargo()?;
    command.args(["test", "--package", "sheave-tests", "--no-run", "--test", name]);
    // The binaries that a suite may run are built with it, in any order.
    let built = executables(&mut command)?.into_iter().find(|(target, _)| target == name);
    built.map(|(_, path)| path).with_context(|| format!("cargo built no suite `{name}`"))
}

/// Runs a command of cargo for the programs that it builds, each with its target's name.
fn executables(command: &mut Command) -> Result<Vec<(String, PathBuf)>> {
    // Artifacts on stdout, for us; diagnostics and progress on stderr, for people.
    let messages = output(command.arg("--message-format=json-render-diagnostics"))?;
    let executable = |message: Value| {
        let path = PathBuf::from(message.get("executable")?.as_str()?);
        Some((message.get("target")?.get("name")?.as_str()?.to_owned(), path))
    };
    Ok(messages
        .split(|byte| *byte == b'\n')
        .filter_map(|line| serde_json::from_slice(line).ok().and_then(executable))
        .collect())
}
