//! The agent's control socket: one JSON request a line, one JSON reply a line. Read commands ask here; nothing can be
//! changed through it.

use std::fmt::Display;
use std::fs;
use std::io;
use std::net::IpAddr;
use std::os::unix::fs::{FileTypeExt, PermissionsExt};
use std::path::{Path, PathBuf};

use proxy_common::abi::ServiceId;
use serde::{Deserialize, Serialize};
use serde_json::Value;
use tokio::io::{AsyncBufReadExt, AsyncReadExt, AsyncWriteExt, BufReader};
use tokio::net::{UnixListener, UnixStream};
use tokio::sync::{mpsc, oneshot};

/// Bytes of the longest request.
const MAX_REQUEST: u64 = 4096;

/// What can be asked.
#[derive(Serialize, Deserialize, Debug)]
#[serde(rename_all = "snake_case")]
pub enum Request {
    /// `sheave status`.
    Status,
    /// `sheave plan`.
    Plan,
    /// `sheave explain`.
    Explain {
        /// Client.
        from: IpAddr,
        /// `ADDRESS:PORT/PROTOCOL`.
        to: String,
    },
    /// Which service port has which record.
    Names,
}

/// The answer.
#[derive(Serialize, Deserialize, Debug)]
#[serde(rename_all = "snake_case")]
pub enum Reply {
    /// A document.
    Ok(Value),
    /// Why there is none.
    Error(String),
}

impl Reply {
    /// Of a document in both its forms.
    pub fn rendered(document: &(impl Serialize + Display), service_id: Option<ServiceId>) -> Self {
        match serde_json::to_value(document) {
            Ok(value) => Self::of(&Rendered { document: value, text: document.to_string(), service_id }),
            Err(error) => Self::Error(error.to_string()),
        }
    }

    /// Of a document.
    pub fn of(document: &impl Serialize) -> Self {
        serde_json::to_value(document).map_or_else(|error| Self::Error(error.to_string()), Self::Ok)
    }
}

/// A document in both its forms, made by the agent: whoever asked need not know its shape.
#[derive(Serialize, Deserialize, Debug)]
pub struct Rendered {
    /// For programs.
    pub document: Value,
    /// For people.
    pub text: String,
    /// For an explanation: the record in `SERVICES`, if programmed.
    pub service_id: Option<ServiceId>,
}

/// A request with the way back.
#[derive(Debug)]
pub struct Question {
    /// What is asked.
    pub request: Request,
    /// Where the answer goes.
    pub reply: oneshot::Sender<Reply>,
}

/// What can go wrong on either side.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The agent's side.
    #[error("listen on control socket {path}")]
    Listen {
        /// The socket.
        path: PathBuf,
        /// The kernel's answer.
        source: io::Error,
    },
    /// Left over from an agent that ended.
    #[error("remove control socket {path}")]
    Remove {
        /// The socket.
        path: PathBuf,
        /// The kernel's answer.
        source: io::Error,
    },
    /// Another agent answers there.
    #[error("another agent runs: it answers on control socket {path}")]
    InUse {
        /// The socket.
        path: PathBuf,
    },
    /// The asking side.
    #[error("no agent answers on control socket {path}: is `sheave run` running?")]
    Ask {
        /// The socket.
        path: PathBuf,
        /// The kernel's answer.
        source: io::Error,
    },
    /// The asking side may not ask.
    #[error("asking the agent on control socket {path} needs root")]
    Forbidden {
        /// The socket.
        path: PathBuf,
        /// The kernel's answer.
        source: io::Error,
    },
    /// The agent says no.
    #[error("{0}")]
    Refused(String),
}

/// Opens the socket. A file that nobody listens on is left over from a former run and is replaced.
///
/// # Errors
/// If another agent listens there, or the socket cannot be made.
pub async fn listen(path: &Path) -> Result<UnixListener, Error> {
    let error = |source| Error::Listen { path: path.to_owned(), source };
    if UnixStream::connect(path).await.is_ok() {
        return Err(Error::InUse { path: path.to_owned() });
    }
    match fs::remove_file(path) {
        Err(source) if source.kind() != io::ErrorKind::NotFound => return Err(error(source)),
        Ok(()) | Err(_) => {}
    }
    if let Some(directory) = path.parent() {
        fs::create_dir_all(directory).map_err(error)?;
    }
    let listener = UnixListener::bind(path).map_err(error)?;
    fs::set_permissions(path, fs::Permissions::from_mode(0o600)).map_err(error)?;
    Ok(listener)
}

/// Removes a socket that nobody listens on. What is no socket is not ours, and stays.
///
/// # Errors
/// If it cannot be removed.
pub async fn remove_abandoned(path: &Path) -> Result<(), Error> {
    let is_socket = fs::symlink_metadata(path).is_ok_and(|metadata| metadata.file_type().is_socket());
    if !is_socket || UnixStream::connect(path).await.is_ok() {
        return Ok(());
    }
    fs::remove_file(path).map_err(|source| Error::Remove { path: path.to_owned(), source })
}

/// Serves the socket for ever.
pub async fn serve(listener: UnixListener, questions: mpsc::Sender<Question>) {
    loop {
        match listener.accept().await {
            Ok((stream, _)) => {
                let questions = questions.clone();
                tokio::spawn(async move {
                    if let Err(error) = converse(stream, questions).await {
                        tracing::debug!(%error, "control connection");
                    }
                });
            }
            Err(error) => {
                tracing::warn!(%error, "accept on the control socket");
                tokio::time::sleep(std::time::Duration::from_millis(100)).await;
            }
        }
    }
}

async fn converse(stream: UnixStream, questions: mpsc::Sender<Question>) -> io::Result<()> {
    let (read, mut write) = stream.into_split();
    let mut line = String::new();
    BufReader::new(read.take(MAX_REQUEST)).read_line(&mut line).await?;
    let reply = match serde_json::from_str::<Request>(&line) {
        Ok(request) => {
            let (sender, receiver) = oneshot::channel();
            let sent = questions.send(Question { request, reply: sender }).await.is_ok();
            let answer = if sent { receiver.await.ok() } else { None };
            answer.unwrap_or_else(|| Reply::Error("the agent is going".to_owned()))
        }
        Err(error) => Reply::Error(format!("not a request: {error}")),
    };
    let mut bytes = serde_json::to_vec(&reply)?;
    bytes.push(b'\n');
    write.write_all(&bytes).await
}

/// Asks a running agent.
///
/// # Errors
/// If none answers, or it refuses.
pub async fn ask(path: &Path, request: &Request) -> Result<Value, Error> {
    let error = |source| Error::Ask { path: path.to_owned(), source };
    let mut stream = UnixStream::connect(path).await.map_err(|source| {
        if source.kind() == io::ErrorKind::PermissionDenied {
            Error::Forbidden { path: path.to_owned(), source }
        } else {
            error(source)
        }
    })?;
    let mut bytes = serde_json::to_vec(request).map_err(|source| error(source.into()))?;
    bytes.push(b'\n');
    stream.write_all(&bytes).await.map_err(error)?;
    let mut reply = Vec::new();
    stream.read_to_end(&mut reply).await.map_err(error)?;
    match serde_json::from_slice(&reply).map_err(|source| error(source.into()))? {
        Reply::Ok(value) => Ok(value),
        Reply::Error(message) => Err(Error::Refused(message)),
    }
}
