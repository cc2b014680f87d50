use std::process::ExitCode;

use anyhow::{Context, Result};
use clap::Args;

use super::options::{ControlArgs, ManifestArgs, NodeArgs, PolicyArgs};
use super::{Output, WrongCommandLine, block_on, print};
use crate::control::{self, Rendered, Request};
use crate::model::{Model, OwnAddresses};
use crate::source::files;
use crate::view;

#[derive(Args, Debug)]
pub(super) struct PlanArgs {
    #[command(flatten)]
    pub(super) offline: OfflineArgs,
    /// Form of the answer.
    #[arg(short, long, value_enum, default_value = "json")]
    output: Output,
}

/// With `--manifests` a question is answered from files alone, without root and without a kernel; else by the agent.
#[derive(Args, Debug)]
pub(super) struct OfflineArgs {
    #[command(flatten)]
    manifests: ManifestArgs,
    #[command(flatten)]
    node: NodeArgs,
    #[command(flatten)]
    policy: PolicyArgs,
    #[command(flatten)]
    control: ControlArgs,
}

impl OfflineArgs {
    /// The model of the manifests; `None`: ask the agent.
    pub(super) fn model(&self) -> Result<Option<Model>> {
        let Some(directory) = &self.manifests.manifests else { return Ok(None) };
        let node = self.node.name().map_err(WrongCommandLine)?;
        let policy = self.policy.policy().map_err(WrongCommandLine)?;
        let mut model = Model::new(node, policy, OwnAddresses::FromNode);
        for change in files::load(directory).context("read the manifests")? {
            model.apply(change);
        }
        Ok(Some(model))
    }

    pub(super) fn ask(&self, request: &Request) -> Result<Rendered> {
        let answer = block_on(control::ask(&self.control.control_socket, request))??;
        serde_json::from_value(answer).context("understand the agent's answer")
    }
}

impl PlanArgs {
    pub(super) fn run(&self) -> Result<ExitCode> {
        if let Some(model) = self.offline.model()? {
            let plan = view::plan::plan(&model);
            return print(&plan, &plan, self.output);
        }
        let Rendered { document, text, .. } = self.offline.ask(&Request::Plan)?;
        print(&document, text, self.output)
    }
}
