//! A QMP client, for the subcommands that are one.

use std::{path::Path, time::Duration};

use anyhow::{Context as _, bail};
use qemu_rdma_helper::qmp::{Execute, ITEM_MAX, QmpError, envelope::FromQemu};
use serde_json::{Value, json};
use tokio::{
    io::{AsyncBufReadExt as _, AsyncReadExt as _, AsyncWriteExt as _, BufReader},
    net::{
        UnixStream,
        unix::{OwnedReadHalf, OwnedWriteHalf},
    },
    time::timeout,
};

/// How long a server may take to send its greeting.
const GREETING: Duration = Duration::from_secs(5);

/// A connection to a QMP server.
pub struct Client {
    lines: BufReader<OwnedReadHalf>,
    commands: OwnedWriteHalf,
    /// PID of QEMU, or of the helper that serves the socket.
    pub pid: u32,
}

impl Client {
    /// Connect and negotiate.
    pub async fn connect(path: &Path) -> anyhow::Result<Self> {
        let failed = || format!("Cannot connect to the QMP socket {}", path.display());
        let stream = UnixStream::connect(path).await.with_context(failed)?;
        let pid = qemu_rdma_helper::qemu::peer_pid(&stream).with_context(failed)?;
        let (read, commands) = stream.into_split();
        let mut client = Self { lines: BufReader::new(read), commands, pid };
        // A QMP server serves one client, and leaves the next one waiting without a reply.
        let greeting = match timeout(GREETING, client.line()).await {
            Ok(greeting) => greeting.with_context(failed)?,
            Err(_) => bail!("{} does not answer; end its other client first", path.display()),
        };
        match FromQemu::read(&greeting) {
            Some(FromQemu::Other(greeting)) if greeting.get("QMP").is_some() => {}
            _ => bail!("{} is no QMP socket", path.display()),
        }
        client.execute("qmp_capabilities", Value::Null).await.with_context(failed)?;
        Ok(client)
    }

    /// Read the next line, or the beginning of one that is too long; empty at the end.
    async fn line(&mut self) -> std::io::Result<Vec<u8>> {
        let (mut line, mut rest) = (Vec::new(), Vec::new());
        let mut last = self.piece(&mut line).await?;
        while last == ITEM_MAX && !line.ends_with(b"\n") && !rest.ends_with(b"\n") {
            rest.clear();
            last = self.piece(&mut rest).await?;
        }
        Ok(line)
    }

    async fn piece(&mut self, piece: &mut Vec<u8>) -> std::io::Result<usize> {
        (&mut self.lines).take(ITEM_MAX as u64).read_until(b'\n', piece).await
    }

    async fn send(&mut self, command: &str, arguments: Value) -> std::io::Result<()> {
        let mut request = json!({ "execute": command });
        if !arguments.is_null() {
            request["arguments"] = arguments;
        }
        self.commands.write_all(format!("{request}\r\n").as_bytes()).await
    }

    /// Read the next reply; `None` at the end.
    async fn reply(&mut self) -> std::io::Result<Option<Result<Value, QmpError>>> {
        loop {
            let line = self.line().await?;
            if line.is_empty() {
                return Ok(None);
            }
            match FromQemu::read(&line) {
                Some(FromQemu::Reply { result }) => return Ok(Some(result)),
                Some(_) => {}
                // It is the reply nevertheless: no other follows.
                None => {
                    let error = QmpError::generic("The reply is no JSON, or too long");
                    return Ok(Some(Err(error)));
                }
            }
        }
    }
}

impl Execute for Client {
    async fn execute(&mut self, command: &str, arguments: Value) -> Result<Value, QmpError> {
        let lost = |_| QmpError::connection_lost();
        self.send(command, arguments).await.map_err(lost)?;
        self.reply().await.map_err(lost)?.ok_or_else(QmpError::connection_lost)?
    }
}
