//! Objects from the Kubernetes API: Services, EndpointSlices and the own Node, by list and watch.
//!
//! A list counts when it is complete and not before; errors change nothing (Q7). Objects become slim types while they
//! are read off the wire: nothing of the API's own is kept.

mod checked;
#[cfg(test)]
mod tests;

use std::path::PathBuf;
use std::pin::pin;
use std::time::{Duration, Instant};

use ::kube::config::{Config, InClusterError, KubeConfigOptions, Kubeconfig, KubeconfigError};
use ::kube::runtime::utils::Backoff;
use ::kube::runtime::watcher::{self, DefaultBackoff, Event};
use ::kube::{Api, Client};
use futures::StreamExt;
use tokio::sync::mpsc::UnboundedSender;
use tracing::{debug, info, warn};

use self::checked::{Checked, Slim};
use crate::object::{Batch, Change, Delta, Node, Read, Service, Slice};

/// How to reach the API server. Names as kube-proxy's flags.
#[derive(Clone, Debug, Default)]
pub struct KubeOptions {
    /// `--kubeconfig`. Without one, and without `master`, the agent takes what a pod is given.
    pub kubeconfig: Option<PathBuf>,
    /// `--master`: the server's URL; overrides the one in the kubeconfig.
    pub master: Option<String>,
    /// Which context of the kubeconfig; its current one if absent.
    pub context: Option<String>,
}

/// Why there is no client.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The kubeconfig cannot be used.
    #[error("cannot use the kubeconfig {path}")]
    Kubeconfig {
        /// The file.
        path: PathBuf,
        /// What is wrong.
        source: Box<KubeconfigError>,
    },
    /// Neither a kubeconfig nor a pod's surroundings.
    #[error("no kubeconfig given, and this is no pod with a service account")]
    InCluster(#[source] Box<InClusterError>),
    /// `--master` is no URL.
    #[error("the API server's URL {url:?} (--master) cannot be used")]
    Master {
        /// As given.
        url: String,
        /// What is wrong.
        source: Box<dyn std::error::Error + Send + Sync>,
    },
    /// TLS or credentials.
    #[error("cannot set up the connection to the API server {url}")]
    Client {
        /// The server.
        url: String,
        /// What is wrong.
        source: Box<::kube::Error>,
    },
}

/// Makes a client. Nothing is sent yet.
pub async fn client(options: &KubeOptions) -> Result<Client, Error> {
    let master = match &options.master {
        None => None,
        Some(url) => Some(
            url.parse()
                .map_err(|source| Error::Master { url: url.clone(), source: Box::<_>::from(source) })?,
        ),
    };
    let config = match (&options.kubeconfig, master) {
        (Some(path), master) => {
            let failed = |source| Error::Kubeconfig { path: path.clone(), source: Box::new(source) };
            let file = Kubeconfig::read_from(path).map_err(failed)?;
            let context = KubeConfigOptions { context: options.context.clone(), cluster: None, user: None };
            let mut config = Config::from_custom_kubeconfig(file, &context).await.map_err(failed)?;
            if let Some(url) = master {
                config.cluster_url = url;
            }
            config
        }
        (None, Some(url)) => Config::new(url),
        (None, None) => Config::incluster().map_err(|source| Error::InCluster(Box::new(source)))?,
    };
    let url = config.cluster_url.to_string();
    Client::try_from(config).map_err(|source| Error::Client { url, source: Box::new(source) })
}

/// Sends complete lists, then changes, until `tx` is closed. Errors are logged and tried again for ever.
pub async fn run(client: Client, node_name: String, tx: UnboundedSender<Batch>) {
    // S3.
    let services = watcher::Config::default()
        .labels("!service.kubernetes.io/service-proxy-name")
        .fields("spec.clusterIP!=None");
    let slices = watcher::Config::default().labels("!service.kubernetes.io/headless");
    let nodes = watcher::Config::default().fields(&format!("metadata.name={node_name}"));

    let services =
        follow::<Service>(&client, services, |delta| tx.send(vec![Change::Service(delta)]).is_ok());
    let slices = follow::<Slice>(&client, slices, |delta| tx.send(vec![Change::Slice(delta)]).is_ok());
    let nodes = async {
        if node_name.is_empty() {
            // Its lists must be complete, too.
            let _ = tx.send(vec![Change::Node(Delta::List(Vec::new()))]);
            return;
        }
        let mut last = None;
        follow::<Node>(&client, nodes, |delta| {
            let present = present_node(&delta);
            // Nodes change every few minutes in what nobody here reads.
            if last.as_ref() == Some(&present) && present.is_some() {
                return !tx.is_closed();
            }
            last = Some(present);
            tx.send(vec![Change::Node(delta)]).is_ok()
        })
        .await;
    };
    tokio::select! {
        () = tx.closed() => {}
        _ = futures::future::join3(services, slices, nodes) => {}
    }
}

/// The Node that a change leaves behind.
fn present_node(delta: &Delta<Node>) -> Option<Read<Node>> {
    match delta {
        Delta::List(list) => list.first().cloned(),
        Delta::Apply(node) => Some(node.clone()),
        Delta::Delete(_) => None,
    }
}

/// Follows one kind until `send` returns false.
async fn follow<T: Slim>(client: &Client, config: watcher::Config, mut send: impl FnMut(Delta<T>) -> bool) {
    let mut trouble = Trouble::new(T::KIND);
    loop {
        let api = Api::<Checked<T>>::all(client.clone());
        let mut events = pin!(watcher::watcher(api, config.clone()));
        let mut list = Vec::new();
        while let Some(event) = events.next().await {
            let delta = match event {
                Ok(Event::Init) => {
                    // Said before anything is asked, so no sign that the server is back.
                    list.clear();
                    continue;
                }
                Ok(Event::InitApply(object)) => {
                    list.push(object.read());
                    continue;
                }
                Ok(Event::InitDone) => Delta::List(std::mem::take(&mut list)),
                Ok(Event::Apply(object)) => Delta::Apply(object.read()),
                Ok(Event::Delete(object)) => Delta::Delete(object.key()),
                Err(error) => {
                    let (wait, again) = trouble.on(&error);
                    tokio::time::sleep(wait).await;
                    if again {
                        break;
                    }
                    continue;
                }
            };
            trouble.over();
            if !send(delta) {
                return;
            }
        }
        debug!(kind = T::KIND, "listing again");
    }
}

/// The errors since the last answer.
struct Trouble {
    kind: &'static str,
    backoff: DefaultBackoff,
    /// What was logged last, and when: once is enough.
    logged: Option<(String, Instant)>,
    refused_watches: u32,
}

impl Trouble {
    /// A reason that goes on for this long is logged again.
    const LOG_AGAIN: Duration = Duration::from_secs(300);
    /// So many watches in a row refused: the version that they start from is not one that the server can serve.
    const REFUSED_WATCHES: u32 = 3;

    fn new(kind: &'static str) -> Self {
        Self { kind, backoff: DefaultBackoff::default(), logged: None, refused_watches: 0 }
    }

    /// Notes an error; returns how long to wait, and whether to list again.
    fn on(&mut self, error: &watcher::Error) -> (Duration, bool) {
        let reason = chain(error);
        let known = self
            .logged
            .as_ref()
            .is_some_and(|(last, when)| *last == reason && when.elapsed() < Self::LOG_AGAIN);
        if known {
            debug!(kind = self.kind, reason, "the API server still cannot be followed");
        } else {
            warn!(kind = self.kind, reason, "cannot follow the API server; the last state stays in force");
            self.logged = Some((reason, Instant::now()));
        }
        // The watcher lists again by itself when a running watch says 410. When a watch cannot even start it asks for
        // the same version for ever: one that is too old, or, after a restore of etcd, too new.
        let again = match error {
            watcher::Error::WatchStartFailed(::kube::Error::Api(status)) => match status.code {
                410 => true,
                // Busy or out of order; a list would be more work for it, and no better. But 504 is "too new".
                429 | 500..=503 => false,
                _ => {
                    self.refused_watches += 1;
                    self.refused_watches >= Self::REFUSED_WATCHES
                }
            },
            watcher::Error::WatchStartFailed(_)
            | watcher::Error::InitialListFailed(_)
            | watcher::Error::WatchError(_)
            | watcher::Error::WatchFailed(_)
            | watcher::Error::NoResourceVersion => false,
        };
        if again {
            self.refused_watches = 0;
        }
        (self.backoff.next().unwrap_or(Duration::from_secs(30)), again)
    }

    /// The server answers.
    fn over(&mut self) {
        if self.logged.take().is_some() {
            info!(kind = self.kind, "the API server answers again");
            self.backoff.reset();
        }
        self.refused_watches = 0;
    }
}

/// An error with its causes.
fn chain(error: &dyn std::error::Error) -> String {
    let mut out = error.to_string();
    let mut cause = error.source();
    while let Some(error) = cause {
        let text = error.to_string();
        // Many errors repeat their cause.
        if !out.contains(&text) {
            out.push_str(": ");
            out.push_str(&text);
        }
        cause = error.source();
    }
    out
}
