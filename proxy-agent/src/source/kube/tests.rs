use std::collections::{BTreeMap, VecDeque};
use std::path::PathBuf;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use ::kube::client::Body;
use http::{Request, Response};
use serde_json::{Value, json};
use tokio::sync::mpsc;

use super::trouble::chain;
use super::*;
use crate::object::ObjectKey;

/// What the server answers next to requests for one kind.
enum Answer {
    /// A whole response.
    Status(u16, Value),
    /// A list, with its version.
    List(u32, Vec<Value>),
    /// A watch that ends after these.
    Watch(Vec<Value>),
    /// The connection breaks.
    Broken,
}

/// An API server that follows a script. When that is at its end, requests wait for ever.
#[derive(Default)]
struct Server {
    script: BTreeMap<&'static str, VecDeque<Answer>>,
    seen: Vec<String>,
}

type Shared = Arc<Mutex<Server>>;

fn server(script: impl IntoIterator<Item = (&'static str, Vec<Answer>)>) -> (Shared, Client) {
    let script = script.into_iter().map(|(kind, answers)| (kind, answers.into())).collect();
    let shared = Arc::new(Mutex::new(Server { script, seen: vec![] }));
    let server = shared.clone();
    let service = tower::service_fn(move |request: Request<Body>| {
        let server = server.clone();
        async move {
            let path = request.uri().path().to_owned();
            let kind = path.rsplit('/').next().unwrap().to_owned();
            let answer = {
                let mut server = server.lock().unwrap();
                server.seen.push(request.uri().to_string());
                server.script.get_mut(kind.as_str()).and_then(VecDeque::pop_front)
            };
            let (status, body) = match answer {
                None => std::future::pending().await,
                Some(Answer::Broken) => return Err(std::io::Error::other("connection reset")),
                Some(Answer::Status(status, body)) => (status, body.to_string()),
                Some(Answer::List(version, items)) => (
                    200,
                    json!({"kind": "List", "apiVersion": "v1", "metadata": {"resourceVersion": version.to_string()}, "items": items})
                        .to_string(),
                ),
                Some(Answer::Watch(events)) => (200, events.iter().map(|e| format!("{e}\n")).collect()),
            };
            Ok(Response::builder().status(status).body(Body::from(body.into_bytes())).unwrap())
        }
    });
    (shared, Client::new(service, "default"))
}

fn status(code: u16, reason: &str) -> Value {
    json!({"kind": "Status", "apiVersion": "v1", "metadata": {}, "status": "Failure", "message": reason, "reason": reason, "code": code})
}

fn svc(name: &str, version: u32) -> Value {
    json!({
        "metadata": {"namespace": "ns", "name": name, "resourceVersion": version.to_string()},
        "spec": {"clusterIP": "10.0.0.1", "clusterIPs": ["10.0.0.1"], "ipFamilies": ["IPv4"], "ports": [{"port": 80}]},
    })
}

fn event(kind: &str, object: Value) -> Value {
    json!({"type": kind, "object": object})
}

struct Run {
    server: Shared,
    rx: mpsc::UnboundedReceiver<Batch>,
    /// What was said of each resource: why it is not followed, or `-` when it is again.
    said: Vec<(String, String)>,
}

impl Run {
    fn start(script: impl IntoIterator<Item = (&'static str, Vec<Answer>)>) -> Self {
        let (server, client) = server(script);
        let (tx, rx) = mpsc::unbounded_channel();
        tokio::spawn(run(client, "n1".into(), tx));
        Self { server, rx, said: vec![] }
    }

    /// The next change; `None` if none comes within an hour (of paused time).
    async fn next(&mut self) -> Option<Change> {
        loop {
            let batch =
                tokio::time::timeout(Duration::from_secs(3600), self.rx.recv()).await.ok().flatten()?;
            let mut changes = Vec::new();
            for change in batch {
                if let Change::Following { resource, trouble } = change {
                    self.said.push((resource, trouble.unwrap_or("-".into())));
                } else {
                    changes.push(change);
                }
            }
            // A watch event is a batch of one.
            if let [change] = changes.as_slice() {
                return Some(change.clone());
            }
            assert!(changes.is_empty(), "{changes:?}");
        }
    }

    async fn next_service(&mut self) -> String {
        match self.next().await {
            Some(Change::Service(Delta::List(list))) => {
                let names: Vec<_> = list.iter().map(name).collect();
                format!("list {}", names.join(" "))
            }
            Some(Change::Service(Delta::Apply(read))) => format!("apply {}", name(&read)),
            Some(Change::Service(Delta::Delete(key))) => format!("delete {key}"),
            Some(other) => panic!("{other:?}"),
            None => "nothing".into(),
        }
    }
}

fn name(read: &Read<Service>) -> String {
    match read {
        Ok(service) => service.key.to_string(),
        Err(e) => format!("!{}|{}|{}", e.problem.object, e.problem.field, e.problem.message),
    }
}

#[tokio::test(start_paused = true)]
async fn a_list_counts_when_complete_and_events_follow() {
    let mut run = Run::start([(
        "services",
        vec![
            Answer::Status(
                200,
                json!({"metadata": {"resourceVersion": "5", "continue": "more"}, "items": [svc("a", 1)]}),
            ),
            Answer::List(5, vec![svc("b", 2)]),
            Answer::Watch(vec![
                event("MODIFIED", svc("a", 6)),
                event("ADDED", svc("c", 7)),
                event(
                    "BOOKMARK",
                    json!({"kind": "Service", "apiVersion": "v1", "metadata": {"resourceVersion": "8"}}),
                ),
                event("DELETED", svc("b", 9)),
            ]),
        ],
    )]);
    for want in ["list ns/a ns/b", "apply ns/a", "apply ns/c", "delete ns/b", "nothing"] {
        assert_eq!(run.next_service().await, want);
    }
    let seen = &run.server.lock().unwrap().seen;
    assert!(seen.iter().any(|uri| uri.contains("resourceVersion=9")), "{seen:?}");
}

/// S3: the selectors; O6: nothing else is asked for.
#[tokio::test(start_paused = true)]
async fn s3_o6_only_what_is_read_is_asked_for() {
    let mut run = Run::start([]);
    assert!(run.next().await.is_none());
    let mut seen = run.server.lock().unwrap().seen.clone();
    seen.sort();
    let plain: Vec<_> = seen
        .iter()
        .map(|uri| uri.replace("%21", "!").replace("%3D", "=").replace("%2F", "/").replace("&limit=500", ""))
        .collect();
    assert_eq!(
        plain,
        [
            "/api/v1/nodes?&fieldSelector=metadata.name=n1",
            "/api/v1/services?&fieldSelector=spec.clusterIP!=None&labelSelector=!service.kubernetes.io/service-proxy-name",
            "/apis/discovery.k8s.io/v1/endpointslices?&labelSelector=!service.kubernetes.io/headless",
        ]
    );
}

#[tokio::test(start_paused = true)]
async fn a_410_lists_again_and_what_is_gone_is_absent() {
    let mut run = Run::start([(
        "services",
        vec![
            Answer::List(5, vec![svc("a", 1), svc("b", 2)]),
            Answer::Watch(vec![event("ERROR", status(410, "Expired"))]),
            Answer::List(20, vec![svc("b", 2)]),
            // Here the watch is refused outright.
            Answer::Status(410, status(410, "Expired")),
            Answer::List(30, vec![]),
        ],
    )]);
    for want in ["list ns/a ns/b", "list ns/b", "list ", "nothing"] {
        assert_eq!(run.next_service().await, want);
    }
}

/// After a restore of etcd the version that the agent knows may be one that has not been yet.
#[tokio::test(start_paused = true)]
async fn a_version_that_is_never_served_is_given_up() {
    let large = || Answer::Status(504, status(504, "Timeout: Too large resource version"));
    let mut run = Run::start([(
        "services",
        vec![
            Answer::List(500, vec![svc("a", 1)]),
            large(),
            large(),
            large(),
            Answer::List(7, vec![svc("b", 2)]),
        ],
    )]);
    for want in ["list ns/a", "list ns/b", "nothing"] {
        assert_eq!(run.next_service().await, want);
    }
}

/// Q7.
#[tokio::test(start_paused = true)]
async fn q7_errors_change_nothing() {
    let mut run = Run::start([(
        "services",
        vec![
            Answer::Broken,
            Answer::Status(403, status(403, "Forbidden")),
            Answer::Status(500, json!("not a status")),
            Answer::Status(200, json!("not a list")),
            // A list that breaks after its first page is no list.
            Answer::Status(
                200,
                json!({"metadata": {"resourceVersion": "5", "continue": "more"}, "items": [svc("a", 1)]}),
            ),
            Answer::Broken,
            Answer::List(5, vec![svc("b", 2)]),
            Answer::Broken,
            Answer::Status(503, status(503, "ServiceUnavailable")),
            Answer::Watch(vec![json!("junk"), event("ERROR", status(500, "InternalError"))]),
            Answer::Watch(vec![event("ADDED", svc("c", 9))]),
        ],
    )]);
    for want in ["list ns/b", "apply ns/c", "nothing"] {
        assert_eq!(run.next_service().await, want);
    }
}

#[tokio::test(start_paused = true)]
async fn one_broken_object_does_not_stop_the_others() {
    let mut bad = svc("bad", 2);
    bad["spec"]["ports"][0]["port"] = json!("http");
    let said = "!Service ns/bad|spec.ports[0].port|invalid type: string \"http\", expected i32; the last good state stays in force";
    let mut run = Run::start([(
        "services",
        vec![
            Answer::List(5, vec![svc("a", 1), bad.clone(), json!(7), svc("b", 3)]),
            Answer::Watch(vec![
                event("MODIFIED", {
                    bad["metadata"]["resourceVersion"] = json!("6");
                    bad.clone()
                }),
                event("MODIFIED", svc("bad", 7)),
                event("DELETED", bad),
            ]),
        ],
    )]);
    match run.next().await {
        Some(Change::Service(Delta::List(list))) => {
            assert_eq!(name(&list[0]), "ns/a");
            assert_eq!(name(&list[1]), said);
            assert_eq!(list[1].as_ref().unwrap_err().key, Some(ObjectKey::new("ns", "bad")));
            assert_eq!(list[2].as_ref().unwrap_err().key, None);
            assert_eq!(name(&list[3]), "ns/b");
        }
        other => panic!("{other:?}"),
    }
    for want in [&format!("apply {said}"), "apply ns/bad", "delete ns/bad", "nothing"] {
        assert_eq!(run.next_service().await, want);
    }
}

/// P9: other changes of the own Node cause nothing.
#[tokio::test(start_paused = true)]
async fn p9_only_what_is_read_of_the_node_is_reported() {
    let node = |zone: &str, version: u32, beat: &str| {
        json!({"metadata": {"name": "n1", "resourceVersion": version.to_string(), "labels": {"topology.kubernetes.io/zone": zone}},
               "status": {"conditions": [{"type": "Ready", "status": "True", "lastHeartbeatTime": beat}]}})
    };
    let mut run = Run::start([(
        "nodes",
        vec![
            Answer::List(5, vec![node("a", 1, "2026-01-01T00:00:00Z")]),
            Answer::Watch(vec![
                event("MODIFIED", node("a", 6, "2026-01-01T00:05:00Z")),
                event("MODIFIED", node("b", 7, "2026-01-01T00:10:00Z")),
                event("DELETED", node("b", 8, "2026-01-01T00:10:00Z")),
                event("ADDED", node("b", 9, "2026-01-01T00:10:00Z")),
            ]),
        ],
    )]);
    let mut zones = vec![];
    while let Some(change) = run.next().await {
        match change {
            Change::Node(Delta::List(list)) => zones.push(list[0].as_ref().unwrap().zone.clone().unwrap()),
            Change::Node(Delta::Apply(node)) => zones.push(node.unwrap().zone.clone().unwrap()),
            Change::Node(Delta::Delete(key)) => zones.push(format!("-{key}")),
            other @ (Change::Service(_)
            | Change::Slice(_)
            | Change::OwnAddresses(_)
            | Change::Mended(_)
            | Change::Following { .. }) => panic!("{other:?}"),
        }
    }
    assert_eq!(zones, ["a", "b", "-n1", "b"]);
}

/// O4: a Node that is not there is reported as a complete list without it.
#[tokio::test(start_paused = true)]
async fn o4_no_own_node() {
    let mut run = Run::start([("nodes", vec![Answer::List(5, vec![])])]);
    assert_eq!(run.next().await, Some(Change::Node(Delta::List(vec![]))));
}

#[tokio::test(start_paused = true)]
async fn the_source_ends_when_nobody_listens() {
    let (_, client) = server([]);
    let (tx, rx) = mpsc::unbounded_channel();
    let task = tokio::spawn(run(client, "n1".into(), tx));
    tokio::task::yield_now().await;
    drop(rx);
    task.await.unwrap();
}

/// O6, Q7: a missing right is named with what its loss costs, once, until it is there again.
#[tokio::test(start_paused = true)]
async fn o6_a_missing_right_is_named_once() {
    let message = "nodes is forbidden: User \"sheave\" cannot list resource \"nodes\" in API group \"\" at the cluster scope";
    let forbidden = || {
        let mut body = status(403, message);
        body["reason"] = json!("Forbidden");
        Answer::Status(403, body)
    };
    let mut run = Run::start([(
        "nodes",
        vec![forbidden(), forbidden(), Answer::Broken, forbidden(), Answer::List(5, vec![]), forbidden()],
    )]);
    assert_eq!(run.next().await, Some(Change::Node(Delta::List(vec![]))));
    assert!(run.next().await.is_none());
    let [first, broken, again, over, watch, allowed] = run.said.as_slice() else { panic!("{:?}", run.said) };
    assert!(run.said.iter().all(|(resource, _)| resource == "nodes"));
    assert!(
        first.1.starts_with(&format!("list nodes: {message} (403 Forbidden); without the own Node")),
        "{}",
        first.1
    );
    assert!(broken.1.starts_with("list nodes: ") && broken.1.contains("connection reset"), "{}", broken.1);
    assert_eq!((again, over.1.as_str()), (first, "-"));
    assert!(watch.1.starts_with("watch nodes: "), "{}", watch.1);
    assert_eq!(allowed.1, "-", "the next one was not refused");
}

/// A list that is allowed is no sign that a watch is: what is missing is said once, and the lists go on.
#[tokio::test(start_paused = true)]
async fn o6_a_watch_that_is_not_allowed_is_named_once() {
    let forbidden = || Answer::Status(403, status(403, "cannot watch"));
    let list = |version| Answer::List(version, vec![svc("a", version)]);
    let mut answers = vec![];
    for round in 0..4 {
        answers.extend([list(round + 1), forbidden(), forbidden(), forbidden()]);
    }
    answers.extend([list(9), Answer::Watch(vec![event("ADDED", svc("b", 10))])]);
    let mut run = Run::start([("services", answers)]);
    for _ in 0..5 {
        assert_eq!(run.next_service().await, "list ns/a");
    }
    assert_eq!(run.next_service().await, "apply ns/b");
    let said: Vec<&str> = run.said.iter().map(|(_, what)| what.split(';').next().unwrap()).collect();
    assert_eq!(said, ["watch services: cannot watch (403 cannot watch)", "-"]);

    // Nothing comes from the watch that is allowed at last: that it stays is enough.
    let mut run = Run::start([("services", vec![list(1), forbidden()])]);
    assert_eq!(run.next_service().await, "list ns/a");
    assert_eq!(run.next_service().await, "nothing");
    assert_eq!(run.said.last().unwrap().1, "-");
}

/// S3, O6: one list of each kind with the selectors of `run`, page after page.
#[tokio::test(start_paused = true)]
async fn everything_is_listed_once() {
    let first_page =
        json!({"metadata": {"resourceVersion": "5", "continue": "more"}, "items": [svc("a", 1)]});
    let (server, client) = server([
        ("nodes", vec![Answer::List(5, vec![])]),
        (
            "services",
            vec![
                Answer::Status(200, first_page.clone()),
                Answer::Status(410, status(410, "Expired")),
                Answer::Status(200, first_page),
                Answer::List(5, vec![svc("b", 2)]),
            ],
        ),
        ("endpointslices", vec![Answer::List(5, vec![])]),
    ]);
    let changes = load(&client, "n1").await.unwrap();
    let [Change::Node(_), Change::Service(Delta::List(services)), Change::Slice(_)] = changes.as_slice()
    else {
        panic!("{changes:?}")
    };
    assert_eq!(services.iter().map(name).collect::<Vec<_>>(), ["ns/a", "ns/b"]);
    let seen = server.lock().unwrap().seen.join(" ");
    for selector in
        ["service-proxy-name", "clusterIP", "headless", "metadata.name%3Dn1", "continue=more", "limit=500"]
    {
        assert!(seen.contains(selector), "{selector}: {seen}");
    }
}

#[tokio::test(start_paused = true)]
async fn what_cannot_be_listed_is_named() {
    let empty = || vec![Answer::List(5, vec![])];
    for (answers, expected) in [
        (
            vec![Answer::Status(403, status(403, "User \"u\" cannot list resource"))],
            "list endpointslices: User \"u\" cannot",
        ),
        (vec![Answer::Broken], "list endpointslices: ServiceError: connection reset"),
        (vec![], "list endpointslices: no answer within 15 s"),
    ] {
        let (_, client) = server([("nodes", empty()), ("services", empty()), ("endpointslices", answers)]);
        let error = load(&client, "n1").await.unwrap_err().to_string();
        assert!(error.starts_with(expected), "{error}");
    }
}

#[tokio::test]
async fn what_is_wrong_with_the_options_is_said() {
    let options = |kubeconfig: Option<&str>, master: Option<&str>| KubeOptions {
        kubeconfig: kubeconfig.map(PathBuf::from),
        master: master.map(str::to_owned),
        context: None,
    };
    let error = connect(&options(Some("/nowhere/conf"), None)).await.err().unwrap();
    assert_eq!(error.to_string(), "cannot use the kubeconfig /nowhere/conf");
    let error = connect(&options(None, Some("http://[x"))).await.err().unwrap();
    assert_eq!(error.to_string(), "the API server's URL \"http://[x\" (--master) cannot be used");
    let error = connect(&options(None, None)).await.err().unwrap();
    assert!(matches!(error, Error::InCluster(_)), "{error}");
    let error = connect(&options(None, Some("127.0.0.1:6443"))).await.err().unwrap();
    assert!(chain(&error).ends_with("it does not begin with https:// or http://"), "{error}");
    // Without a service account to add, as nobody.
    let connection = connect(&options(None, Some("http://127.0.0.1:1"))).await.unwrap();
    assert_eq!(connection.url, "http://127.0.0.1:1/");
}
