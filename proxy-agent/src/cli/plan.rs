use std::process::ExitCode;

use anyhow::{Context, Result};
use clap::Args;

use super::options::{ControlArgs, KubeArgs, ManifestArgs, NodeArgs, PolicyArgs};
use super::{Output, WrongCommandLine, block_on, print};
use crate::control::{self, Rendered, Request};
use crate::model::{Model, OwnAddresses};
use crate::object::Change;
use crate::source::files;
use crate::source::kube::{self, Connection};
use crate::view;

#[derive(Args, Debug)]
pub(super) struct PlanArgs {
    #[command(flatten)]
    pub(super) offline: OfflineArgs,
    /// Form of the answer.
    #[arg(short, long, value_enum, default_value = "json")]
    output: Output,
}

/// A question is answered from files or from what the API server says now, without root and without a kernel; else by the
/// agent.
#[derive(Args, Debug)]
pub(super) struct OfflineArgs {
    #[command(flatten)]
    manifests: ManifestArgs,
    #[command(flatten)]
    kube: KubeArgs,
    /// Ask the API server as the service account of this pod.
    #[arg(long, conflicts_with_all = ["manifests", "kubeconfig"])]
    in_cluster: bool,
    #[command(flatten)]
    node: NodeArgs,
    #[command(flatten)]
    policy: PolicyArgs,
    #[command(flatten)]
    control: ControlArgs,
}

impl OfflineArgs {
    /// The model of the manifests or of the cluster; `None`: ask the agent.
    pub(super) fn model(&self) -> Result<Option<Model>> {
        let ask_cluster = self.in_cluster || self.kube.kubeconfig.is_some() || self.kube.master.is_some();
        if self.manifests.manifests.is_none() && !ask_cluster {
            self.nothing_for_the_agent()?;
            return Ok(None);
        }
        let node = self.node.name().map_err(WrongCommandLine)?;
        let policy = self.policy.policy().map_err(WrongCommandLine)?;
        let changes = match &self.manifests.manifests {
            Some(directory) => files::load(directory).context("read the manifests")?,
            None => block_on(self.list(&node))??,
        };
        let mut model = Model::new(node, policy, OwnAddresses::FromNode);
        for change in changes {
            model.apply(change);
        }
        Ok(Some(model))
    }

    /// The agent that is asked has options of its own: what is said here would be ignored.
    fn nothing_for_the_agent(&self) -> Result<()> {
        let node = self.node.is_given().then_some("--node-name");
        let given: Vec<&str> = self.policy.given().into_iter().chain(node).collect();
        if given.is_empty() {
            return Ok(());
        }
        let error = anyhow::anyhow!(
            "{}: the agent that is asked has its own; these are for --manifests, --kubeconfig, --master and --in-cluster",
            given.join(", ")
        );
        Err(WrongCommandLine(error).into())
    }

    async fn list(&self, node: &str) -> Result<Vec<Change>> {
        let Connection { client, url } =
            kube::connect(&self.kube.options()).await.context("find the API server")?;
        kube::load(&client, node).await.with_context(|| format!("read the cluster at {url}"))
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

#[cfg(test)]
mod tests {
    use super::*;
    use clap::Parser;

    #[derive(Parser, Debug)]
    struct Line {
        #[command(flatten)]
        offline: OfflineArgs,
    }

    fn parse(arguments: &[&str]) -> OfflineArgs {
        Line::try_parse_from(["plan"].iter().chain(arguments)).unwrap().offline
    }

    #[test]
    fn options_that_would_be_ignored_are_a_wrong_command_line() {
        assert!(parse(&[]).model().unwrap().is_none());
        // The default, said aloud, is not ignored.
        assert!(parse(&["--nodeport-addresses=primary"]).model().unwrap().is_none());
        for (argument, flag) in [
            ("--nodeport-addresses=10.0.0.0/8", "--nodeport-addresses"),
            ("--cluster-cidr=10.0.0.0/8", "--cluster-cidr"),
            ("--service-cidr=10.0.0.0/8", "--service-cidr"),
            ("--masquerade-all", "--masquerade-all"),
            ("--detect-local-mode=NodeCIDR", "--detect-local-mode"),
            ("--pod-bridge-interface=br0", "--pod-bridge-interface"),
            ("--pod-interface-name-prefix=veth", "--pod-interface-name-prefix"),
            ("--bind-address=10.0.0.1", "--bind-address"),
            ("--feature-gates=A=true", "--feature-gates"),
            ("--exclude-frontends=10.0.0.1", "--exclude-frontends"),
            ("--node-name=n1", "--node-name"),
        ] {
            let error = parse(&[argument]).model().unwrap_err();
            assert!(error.is::<WrongCommandLine>() && error.to_string().starts_with(flag), "{error}");
        }
        let error = parse(&["--masquerade-all", "--node-name=n1"]).model().unwrap_err();
        assert!(error.to_string().starts_with("--masquerade-all, --node-name: "), "{error}");
    }

    #[test]
    fn one_source_at_a_time() {
        for pair in [
            ["--manifests=d", "--kubeconfig=f"],
            ["--manifests=d", "--in-cluster"],
            ["--kubeconfig=f", "--in-cluster"],
        ] {
            assert!(Line::try_parse_from(["plan"].iter().chain(&pair)).is_err(), "{pair:?}");
        }
        let error = parse(&["--kubeconfig=/nowhere/conf", "--node-name=n1"]).model().unwrap_err();
        assert_eq!(format!("{error:#}").split(": ").nth(1), Some("cannot use the kubeconfig /nowhere/conf"));
    }
}
