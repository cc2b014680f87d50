//! The way to the API server: which one, as whom.

use std::io;
use std::path::PathBuf;

use ::kube::Client;
use ::kube::config::{Config, InClusterError, KubeConfigOptions, Kubeconfig, KubeconfigError};

/// How to reach the API server. Names as kube-proxy's flags.
#[derive(Clone, Debug, Default)]
pub struct KubeOptions {
    /// `--kubeconfig`. Without one, and without `master`, the agent takes what a pod is given.
    pub kubeconfig: Option<PathBuf>,
    /// `--master`: the server's URL; overrides the host of the kubeconfig or of the pod's surroundings, and nothing else.
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
    /// A pod's service account is there and cannot be used.
    #[error("cannot use the service account of this pod")]
    Account(#[source] Box<InClusterError>),
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

/// A client, and of which server.
#[derive(Clone)]
pub struct Connection {
    /// The client.
    pub client: Client,
    /// The server's URL.
    pub url: String,
}

/// Makes a client. Nothing is sent yet.
///
/// A pod's own surroundings are the files of its service account and KUBERNETES_SERVICE_HOST and _PORT. Those two are
/// normally the VIP of `kubernetes.default`, which works only behind a proxy that works; they may be set to the API
/// server's own address, or `master` names it. Token files are read again when they rotate (the client does, within a
/// minute; the token before is good for longer than that).
///
/// # Errors
/// If what is given cannot be used; it says which part of it.
pub async fn connect(options: &KubeOptions) -> Result<Connection, Error> {
    let config = config(options).await?;
    let url = config.cluster_url.to_string();
    match Client::try_from(config) {
        Ok(client) => Ok(Connection { client, url }),
        Err(source) => Err(Error::Client { url, source: Box::new(source) }),
    }
}

async fn config(options: &KubeOptions) -> Result<Config, Error> {
    let master = options.master.as_deref().filter(|url| !url.is_empty()).map(url).transpose()?;
    let mut config = match (&options.kubeconfig, &master) {
        (Some(path), _) => {
            let failed = |source| Error::Kubeconfig { path: path.clone(), source: Box::new(source) };
            let file = Kubeconfig::read_from(path).map_err(failed)?;
            let context = KubeConfigOptions { context: options.context.clone(), cluster: None, user: None };
            Config::from_custom_kubeconfig(file, &context).await.map_err(failed)?
        }
        // By files alone: the environment's address is not used, so it need not be there.
        (None, Some(url)) => match Config::incluster_dns() {
            Ok(config) => config,
            Err(error) if no_account(&error) => Config::new(url.clone()),
            Err(error) => return Err(Error::Account(Box::new(error))),
        },
        (None, None) => Config::incluster().map_err(|source| Error::InCluster(Box::new(source)))?,
    };
    if let Some(url) = master {
        config.cluster_url = url;
    }
    Ok(config)
}

fn url(text: &str) -> Result<http::Uri, Error> {
    let wrong = |source| Error::Master { url: text.to_owned(), source };
    let url: http::Uri = text.parse().map_err(|error| wrong(Box::<_>::from(error)))?;
    match url.scheme_str() {
        Some("http" | "https") => Ok(url),
        Some(_) | None => Err(wrong("it does not begin with https:// or http://".into())),
    }
}

/// Whether the files of a service account are simply not there.
fn no_account(error: &InClusterError) -> bool {
    match error {
        InClusterError::ReadDefaultNamespace(error) | InClusterError::ReadCertificateBundle(error) => {
            error.kind() == io::ErrorKind::NotFound
        }
        InClusterError::ReadEnvironmentVariable(_)
        | InClusterError::ParseClusterPort(_)
        | InClusterError::ParseClusterUrl(_)
        | InClusterError::ParseCertificates(_) => false,
    }
}
