//! A web server that logs its clients, and a client: as much of HTTP/1.1 (RFC 9112) as the two need.

use std::io::{self, BufRead, BufReader, Write};
use std::net::{IpAddr, Ipv6Addr, TcpListener, TcpStream};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use anyhow::{Context, Result};
use vpn_exec::linux::namespace::NetworkNamespace;

pub use crate::shared::http_client::{digest, get};

/// The time that a client may take for its request.
const PATIENCE: Duration = Duration::from_secs(10);

/// The page that a server serves.
#[derive(Clone, Copy, Debug)]
pub enum Page {
    /// The address of the client, and a newline.
    ClientAddress,
    /// A fixed text.
    Text(&'static str),
}

/// A web server on a thread, which runs until its world ends.
#[derive(Debug)]
pub struct WebServer {
    clients: Arc<Mutex<Vec<IpAddr>>>,
}

impl WebServer {
    /// Serves `page` on a port of all IPv4 and IPv6 addresses of a namespace.
    ///
    /// # Errors
    /// If the port is taken.
    pub fn start(site: &NetworkNamespace, port: u16, page: Page) -> Result<Self> {
        let listener = site
            .run(|| TcpListener::bind((Ipv6Addr::UNSPECIFIED, port)))
            .with_context(|| format!("cannot listen on TCP port {port}"))?;
        let clients = Arc::new(Mutex::new(Vec::new()));
        let log = Arc::clone(&clients);
        std::thread::Builder::new().name("web server".into()).spawn(move || {
            for stream in listener.incoming().flatten() {
                let Ok(client) = stream.peer_addr().map(|address| address.ip().to_canonical()) else { continue };
                log.lock().unwrap_or_else(PoisonError::into_inner).push(client);
                // On a thread, so that a silent client does not delay the others. Its errors are not the server's.
                std::thread::spawn(move || answer(stream, client, page));
            }
        })?;
        Ok(Self { clients })
    }

    /// Returns the addresses of the clients so far, in order.
    pub fn clients(&self) -> Vec<IpAddr> {
        self.clients.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }
}

fn answer(mut stream: TcpStream, client: IpAddr, page: Page) -> io::Result<()> {
    stream.set_read_timeout(Some(crate::patience(PATIENCE)))?;
    for line in BufReader::new(&stream).lines() {
        if line?.is_empty() {
            break;
        }
    }
    let body = match page {
        Page::ClientAddress => format!("{client}\n"),
        Page::Text(text) => text.to_owned(),
    };
    let length = body.len();
    write!(stream, "HTTP/1.1 200 OK\r\nContent-Length: {length}\r\nConnection: close\r\n\r\n{body}")
}
