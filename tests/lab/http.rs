//! A web server that logs its callers, and a client: as much of HTTP/1.1 (RFC 9112) as two of a kind need.

use std::io::{self, BufRead, BufReader, Read, Write};
use std::net::{IpAddr, Ipv6Addr, SocketAddr, TcpListener, TcpStream, ToSocketAddrs};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use anyhow::{Context, Result};
use vpn_exec::linux::namespace::NetworkNamespace;

/// How long a client may take to say what it wants.
const PATIENCE: Duration = Duration::from_secs(10);

/// What a server answers with.
#[derive(Clone, Copy, Debug)]
pub enum Page {
    /// The address that the caller has, and the end of the line.
    CallersAddress,
    /// Always the same text.
    Text(&'static str),
}

/// A web server on a thread, until its world ends.
#[derive(Debug)]
pub struct WebServer {
    callers: Arc<Mutex<Vec<IpAddr>>>,
}

impl WebServer {
    /// Serves `page` on a port of every address, IPv4 and IPv6, that a namespace has.
    pub fn start(site: &NetworkNamespace, port: u16, page: Page) -> Result<Self> {
        let listener = site
            .run(|| TcpListener::bind((Ipv6Addr::UNSPECIFIED, port)))
            .with_context(|| format!("cannot listen on port {port}"))?;
        let callers = Arc::new(Mutex::new(Vec::new()));
        let log = Arc::clone(&callers);
        std::thread::Builder::new().name("web server".into()).spawn(move || {
            for stream in listener.incoming().flatten() {
                let Ok(caller) = stream.peer_addr().map(|address| address.ip().to_canonical()) else { continue };
                log.lock().unwrap_or_else(PoisonError::into_inner).push(caller);
                // A caller that hangs up early or never speaks keeps nobody else waiting, and is no concern of the server.
                std::thread::spawn(move || answer(stream, caller, page));
            }
        })?;
        Ok(Self { callers })
    }

    /// The addresses of those who called so far, in order.
    pub fn callers(&self) -> Vec<IpAddr> {
        self.callers.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }
}

fn answer(mut stream: TcpStream, caller: IpAddr, page: Page) -> io::Result<()> {
    stream.set_read_timeout(Some(crate::patience(PATIENCE)))?;
    for line in BufReader::new(&stream).lines() {
        if line?.is_empty() {
            break;
        }
    }
    let body = match page {
        Page::CallersAddress => format!("{caller}\n"),
        Page::Text(text) => text.to_owned(),
    };
    let length = body.len();
    write!(stream, "HTTP/1.1 200 OK\r\nContent-Length: {length}\r\nConnection: close\r\n\r\n{body}")
}

/// What a server answers, asked from the calling thread's network namespace. Each address of a name is tried, each for as
/// long as `timeout` says; names are looked up as the system does it.
///
/// # Errors
/// Those of the last address that was tried.
pub fn get(url: &str, timeout: Duration) -> io::Result<String> {
    let invalid = || io::Error::new(io::ErrorKind::InvalidInput, format!("{url:?} is no http URL"));
    let (authority, path) = url.strip_prefix("http://").ok_or_else(invalid)?.split_once('/').ok_or_else(invalid)?;
    let has_port = authority.rsplit_once(':').is_some_and(|(_, port)| port.parse::<u16>().is_ok());
    let authority = if has_port { authority.to_owned() } else { format!("{authority}:80") };
    let mut last = io::Error::from(io::ErrorKind::NotFound);
    for address in authority.to_socket_addrs()? {
        match get_from(address, &authority, path, timeout) {
            Ok(body) => return Ok(body),
            Err(error) => last = error,
        }
    }
    Err(last)
}

fn get_from(address: SocketAddr, authority: &str, path: &str, timeout: Duration) -> io::Result<String> {
    let mut stream = TcpStream::connect_timeout(&address, timeout)?;
    stream.set_read_timeout(Some(timeout))?;
    write!(stream, "GET /{path} HTTP/1.1\r\nHost: {authority}\r\nConnection: close\r\n\r\n")?;
    let mut answer = String::new();
    stream.read_to_string(&mut answer)?;
    match answer.split_once("\r\n\r\n") {
        Some((head, body)) if head.starts_with("HTTP/1.1 200 ") => Ok(body.to_owned()),
        _ => Err(io::Error::new(io::ErrorKind::InvalidData, format!("{authority} answered {answer:?}"))),
    }
}
