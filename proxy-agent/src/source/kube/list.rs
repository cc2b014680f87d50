//! All objects as they are now, once: for `sheave plan` and `sheave explain`.

use std::time::Duration;

use ::kube::api::ListParams;
use ::kube::runtime::watcher;
use ::kube::{Api, Client};

use super::checked::{Checked, Slim};
use super::trouble;
use crate::object::{Change, Delta, Node, Read, Service, Slice};

/// Objects in one answer, as the watcher asks for them.
const PAGE: u32 = 500;
/// A page takes milliseconds; whoever takes this long does not answer.
const ANSWERS_WITHIN: Duration = Duration::from_secs(15);
/// A list that took so long that its rest is gone (410) is begun again; so often at most.
const TRIES: u32 = 3;

/// Why there is no complete list.
#[derive(Debug, thiserror::Error)]
pub enum ListError {
    /// The server says no, or cannot be reached.
    #[error("{reason}")]
    Refused {
        /// Verb, resource and why, in the server's words where there are any.
        reason: String,
    },
    /// The server does not answer.
    #[error("list {resource}: no answer within {} s", ANSWERS_WITHIN.as_secs())]
    Silent {
        /// Plural.
        resource: String,
    },
}

/// Complete lists of Nodes, Services and EndpointSlices, with the selectors of [`super::run`].
///
/// # Errors
/// At the first kind that cannot be listed: half an answer would be a wrong one.
pub async fn load(client: &Client, node_name: &str) -> Result<Vec<Change>, ListError> {
    let nodes = list::<Node>(client, super::nodes(node_name));
    let services = list::<Service>(client, super::services());
    let slices = list::<Slice>(client, super::slices());
    let (nodes, services, slices) = futures::future::try_join3(nodes, services, slices).await?;
    Ok(vec![
        Change::Node(Delta::List(nodes)),
        Change::Service(Delta::List(services)),
        Change::Slice(Delta::List(slices)),
    ])
}

async fn list<T: Slim>(client: &Client, selection: watcher::Config) -> Result<Vec<Read<T>>, ListError> {
    let api = Api::<Checked<T>>::all(client.clone());
    let first = ListParams {
        label_selector: selection.label_selector,
        field_selector: selection.field_selector,
        limit: Some(PAGE),
        ..ListParams::default()
    };
    let mut tries = 1;
    let (mut all, mut page) = (Vec::new(), first.clone());
    loop {
        let answer = tokio::time::timeout(ANSWERS_WITHIN, api.list(&page)).await;
        match answer.map_err(|_| ListError::Silent { resource: T::plural() })? {
            Ok(objects) => {
                all.extend(objects.items.into_iter().map(Checked::read));
                match objects.metadata.continue_.filter(|token| !token.is_empty()) {
                    Some(token) => page.continue_token = Some(token),
                    None => return Ok(all),
                }
            }
            Err(::kube::Error::Api(status)) if status.code == 410 && tries < TRIES => {
                tries += 1;
                all.clear();
                page = first.clone();
            }
            Err(error) => {
                return Err(ListError::Refused { reason: trouble::reason("list", &T::plural(), &error) });
            }
        }
    }
}
