//! Objects from the Kubernetes API: Services, EndpointSlices and the own Node, by list and watch.
//!
//! A list counts when it is complete and not before; errors change nothing (Q7). Objects become slim types while they
//! are read off the wire: nothing of the API's own is kept.

mod checked;
mod connect;
mod list;
#[cfg(test)]
mod tests;
mod trouble;

use std::pin::pin;

use ::kube::runtime::watcher::{self, Event};
use ::kube::{Api, Client};
use futures::StreamExt;
use tokio::sync::mpsc::UnboundedSender;
use tracing::debug;

use self::checked::{Checked, Slim};
pub use self::connect::{Connection, Error, KubeOptions, connect};
pub use self::list::{ListError, load};
use self::trouble::{Next, Trouble};
use crate::object::{Batch, Change, Delta, Node, Read, Service, Slice};

/// S3. What is not selected does not exist for us: a label that comes or goes looks like a delete or an add.
fn services() -> watcher::Config {
    let config = watcher::Config::default().labels("!service.kubernetes.io/service-proxy-name");
    config.fields("spec.clusterIP!=None")
}

/// S3.
fn slices() -> watcher::Config {
    watcher::Config::default().labels("!service.kubernetes.io/headless")
}

/// O6: the own Node alone.
fn nodes(node_name: &str) -> watcher::Config {
    watcher::Config::default().fields(&format!("metadata.name={node_name}"))
}

/// Sends complete lists, then changes, until `tx` is closed. Errors are logged and tried again for ever.
pub async fn run(client: Client, node_name: String, tx: UnboundedSender<Batch>) {
    let services = follow::<Service>(&client, services(), &tx, |delta| Some(Change::Service(delta)));
    let slices = follow::<Slice>(&client, slices(), &tx, |delta| Some(Change::Slice(delta)));
    let mut last = None;
    let nodes = follow::<Node>(&client, nodes(&node_name), &tx, |delta| {
        let present = present_node(&delta);
        // Nodes change every few minutes in what nobody here reads.
        if last.as_ref() == Some(&present) && present.is_some() {
            return None;
        }
        last = Some(present);
        Some(Change::Node(delta))
    });
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

/// Follows one kind until nobody listens. What `change` makes nothing of is not sent.
async fn follow<T: Slim>(
    client: &Client,
    config: watcher::Config,
    tx: &UnboundedSender<Batch>,
    mut change: impl FnMut(Delta<T>) -> Option<Change>,
) {
    let mut trouble = Trouble::new::<T>();
    let following = |trouble| Change::Following { resource: T::plural(), trouble };
    loop {
        let api = Api::<Checked<T>>::all(client.clone());
        let mut events = pin!(watcher::watcher(api, config.clone()));
        let mut list = Vec::new();
        loop {
            let quiet = async {
                match trouble.over_after() {
                    Some(after) => tokio::time::sleep(after).await,
                    None => std::future::pending().await,
                }
            };
            let event = tokio::select! {
                event = events.next() => event,
                () = quiet => {
                    if trouble.over() && tx.send(vec![following(None)]).is_err() {
                        return;
                    }
                    continue;
                }
            };
            let Some(event) = event else { break };
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
                    let Next { wait, again, news } = trouble.on(&error);
                    if news.is_some() && tx.send(vec![following(news)]).is_err() {
                        return;
                    }
                    tokio::time::sleep(wait).await;
                    if again {
                        break;
                    }
                    continue;
                }
            };
            let over = if let Delta::List(_) = delta { trouble.listed() } else { trouble.over() };
            let mut batch: Batch = over.then(|| following(None)).into_iter().collect();
            batch.extend(change(delta));
            if !batch.is_empty() && tx.send(batch).is_err() {
                return;
            }
        }
        debug!(resource = T::plural(), "listing again");
    }
}
