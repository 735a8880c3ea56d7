//! A web page that reports how a browser reaches it, and the STUN server that the page asks for the browser's address.

use std::io::{self, BufRead, BufReader, Read, Write};
use std::net::{IpAddr, Ipv6Addr, SocketAddr, TcpListener, TcpStream, UdpSocket};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use anyhow::{Context, Result};
use vpn_exec::linux::namespace::NetworkNamespace;

use crate::shared::addresses::WEB;

/// The port of the page.
pub const PAGE_PORT: u16 = 8080;

/// The port of STUN servers (RFC 8489 section 18.6).
const STUN_PORT: u16 = 3478;

/// The time that a browser may take for its next request.
const PATIENCE: Duration = Duration::from_secs(30);

/// The longest report, in bytes.
const MAX_REPORT: usize = 1 << 16;

/// The addresses that a browser has shown.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Report {
    /// The address from which the report came.
    pub client: IpAddr,
    /// The candidates of WebRTC, one per line: `candidate:…` (RFC 8839 section 5.1).
    pub candidates: Vec<String>,
}

impl Report {
    /// Returns the addresses of the candidates of a type: `host`, `srflx` (those that the STUN server saw), or all.
    pub fn addresses(&self, kind: Option<&str>) -> Vec<String> {
        let words = self.candidates.iter().map(|line| line.split_whitespace().collect::<Vec<_>>());
        let matching = words.filter(|words| kind.is_none_or(|kind| words.get(7) == Some(&kind)));
        matching
            .flat_map(|words| {
                let related = words.iter().position(|word| *word == "raddr").and_then(|at| words.get(at + 1));
                let related = related.filter(|_| kind.is_none());
                words.get(4).into_iter().chain(related).map(ToString::to_string).collect::<Vec<_>>()
            })
            .collect()
    }
}

/// The page and the STUN server, on threads that run until their world ends.
#[derive(Debug)]
pub struct BrowsedSite {
    reports: Arc<Mutex<Vec<Report>>>,
}

impl BrowsedSite {
    /// Serves the page on [`PAGE_PORT`], and STUN, on all addresses of a namespace.
    ///
    /// # Errors
    /// If a port is taken.
    pub fn start(site: &NetworkNamespace) -> Result<Self> {
        let (listener, socket) = site
            .run(|| {
                let at = |port| SocketAddr::from((Ipv6Addr::UNSPECIFIED, port));
                Ok((TcpListener::bind(at(PAGE_PORT))?, UdpSocket::bind(at(STUN_PORT))?))
            })
            .context("cannot serve the page")?;
        let reports = Arc::new(Mutex::new(Vec::new()));
        let written = Arc::clone(&reports);
        std::thread::Builder::new().name("page".into()).spawn(move || {
            for stream in listener.incoming().flatten() {
                let reports = Arc::clone(&written);
                // On a thread, as browsers open connections that they do not use.
                std::thread::spawn(move || serve(stream, &reports));
            }
        })?;
        std::thread::Builder::new().name("stun".into()).spawn(move || {
            let mut message = [0; 1500];
            while let Ok((length, client)) = socket.recv_from(&mut message) {
                if let Some(answer) = stun_answer(&message[..length], client) {
                    // The client may be gone by now.
                    let _ = socket.send_to(&answer, client);
                }
            }
        })?;
        Ok(Self { reports })
    }

    /// Returns the reports so far, in order.
    pub fn reports(&self) -> Vec<Report> {
        self.reports.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }
}

/// Returns the page, which gathers WebRTC's candidates and sends them back.
fn page() -> String {
    let servers = format!("\"stun:{}:{STUN_PORT}\", \"stun:[{}]:{STUN_PORT}\"", WEB.ipv4, WEB.ipv6);
    format!(
        "<!DOCTYPE html><title>page</title><script>\n\
         const candidates = [];\n\
         const peer = new RTCPeerConnection({{iceServers: [{{urls: [{servers}]}}]}});\n\
         peer.createDataChannel('x');\n\
         peer.onicecandidate = event => {{\n\
         if (!event.candidate) fetch('/report', {{method: 'POST', body: candidates.join('\\n')}});\n\
         else if (event.candidate.candidate) candidates.push(event.candidate.candidate);\n\
         }};\n\
         peer.createOffer().then(offer => peer.setLocalDescription(offer));\n\
         </script>\n"
    )
}

/// Answers the one request of a connection.
fn serve(mut stream: TcpStream, reports: &Mutex<Vec<Report>>) -> io::Result<()> {
    stream.set_read_timeout(Some(crate::patience(PATIENCE)))?;
    let client = stream.peer_addr()?.ip().to_canonical();
    let mut reader = BufReader::new(stream.try_clone()?);
    let mut request = String::new();
    reader.read_line(&mut request)?;
    let mut length = 0;
    loop {
        let mut line = String::new();
        if reader.read_line(&mut line)? == 0 || line.trim().is_empty() {
            break;
        }
        if let Some(value) = line.to_ascii_lowercase().strip_prefix("content-length:") {
            length = value.trim().parse().unwrap_or(0);
        }
    }
    let body = if request.starts_with("GET / ") { page() } else { String::new() };
    if request.starts_with("POST /report ") {
        let mut report = vec![0; length.min(MAX_REPORT)];
        reader.read_exact(&mut report)?;
        let candidates = String::from_utf8_lossy(&report).lines().map(str::to_owned).collect();
        reports.lock().unwrap_or_else(PoisonError::into_inner).push(Report { client, candidates });
    }
    let length = body.len();
    write!(
        stream,
        "HTTP/1.1 200 OK\r\nContent-Type: text/html\r\nContent-Length: {length}\r\nConnection: close\r\n\r\n{body}"
    )
}

/// Returns the answer to a binding request: the client's address in XOR-MAPPED-ADDRESS (RFC 8489 sections 5 and 14.2).
fn stun_answer(request: &[u8], client: SocketAddr) -> Option<Vec<u8>> {
    const COOKIE: [u8; 4] = 0x2112_A442_u32.to_be_bytes();

    // The type, the length, the cookie and the transaction ID.
    let header = request.get(..20).filter(|header| header[..2] == [0, 1] && header[4..8] == COOKIE)?;
    let (family, address) = match client.ip().to_canonical() {
        IpAddr::V4(address) => (1, address.octets().to_vec()),
        IpAddr::V6(address) => (2, address.octets().to_vec()),
    };
    let hidden = |bytes: &[u8]| bytes.iter().zip(&header[4..]).map(|(byte, mask)| byte ^ mask).collect::<Vec<u8>>();
    let value = [&[0, family][..], &hidden(&client.port().to_be_bytes()), &hidden(&address)].concat();
    let value_length = u8::try_from(value.len()).ok()?;
    let attribute = [&[0x00, 0x20, 0, value_length][..], &value].concat();
    Some([&[0x01, 0x01, 0, value_length + 4][..], &header[4..], &attribute].concat())
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The examples of RFC 5769, sections 2.2 and 2.3, without their other attributes.
    #[test]
    fn the_address_is_that_of_the_standards_examples() {
        let transaction: [u8; 12] = [0xb7, 0xe7, 0xa7, 0x01, 0xbc, 0x34, 0xd6, 0x86, 0xfa, 0x87, 0xdf, 0xae];
        let request = [&[0, 1, 0, 0, 0x21, 0x12, 0xa4, 0x42][..], &transaction].concat();
        let answer = stun_answer(&request, "192.0.2.1:32853".parse().expect("valid")).expect("an answer");
        assert_eq!(answer[..4], [1, 1, 0, 12]);
        assert_eq!(answer[20..], [0, 0x20, 0, 8, 0, 1, 0xa1, 0x47, 0xe1, 0x12, 0xa6, 0x43]);
        let client = "[2001:db8:1234:5678:11:2233:4455:6677]:32853".parse().expect("valid");
        let answer = stun_answer(&request, client).expect("an answer");
        assert_eq!(answer[20..28], [0, 0x20, 0, 20, 0, 2, 0xa1, 0x47]);
        assert_eq!(answer[28..36], [0x01, 0x13, 0xa9, 0xfa, 0xa5, 0xd3, 0xf1, 0x79]);
        assert_eq!(stun_answer(&request[..19], client), None);
        assert_eq!(stun_answer(&[0; 20], client), None);
    }
}
