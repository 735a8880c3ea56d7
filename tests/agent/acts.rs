//! Acts: a test names one on a line of standard input, and gets a line with its result or its error.

use std::fs;
use std::io::{self, BufRead, BufReader, Write};
use std::net::{IpAddr, Ipv6Addr, SocketAddr, TcpListener, ToSocketAddrs, UdpSocket};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use vpn_exec::linux::netlink::Netlink;

use crate::shared::http_client::{digest, get};
use crate::shared::patience::patience;
use crate::shared::protocol::{ANSWER, BEGUN, PATIENTLY};
use crate::shared::sending::unspecified;
use crate::vectors::Vectors;
use crate::{dns_client, trespass};

/// Whether the act that is performed must succeed.
static MUST_SUCCEED: AtomicBool = AtomicBool::new(false);

/// The time in which a packet comes that must come.
const MUST_COME: Duration = Duration::from_secs(20);

/// The time for which an act waits for a packet that may never come.
const MAY_COME: Duration = Duration::from_millis(700);

/// Returns the time for which an act waits for a packet: `usual`, or longer if the act must succeed, since the machine
/// may be busy.
pub(crate) fn reply_time(usual: Duration) -> Duration {
    patience(if MUST_SUCCEED.load(Ordering::Relaxed) { MUST_COME.max(usual) } else { usual })
}

/// Performs acts until standard input ends.
pub(crate) fn serve() -> io::Result<()> {
    let vectors = Vectors::start()?;
    let mut out = io::stdout();
    let mut say = |text: &str| writeln!(out, "{ANSWER}{text}").and_then(|()| out.flush());
    say(BEGUN)?;
    for line in io::stdin().lines() {
        let line = line?;
        let mut words: Vec<&str> = line.split(' ').collect();
        let must_succeed = words.first() == Some(&PATIENTLY);
        MUST_SUCCEED.store(must_succeed, Ordering::Relaxed);
        words.drain(..usize::from(must_succeed));
        say(&match perform(&words, &vectors) {
            Ok(text) => format!("ok {}", text.escape_default()),
            Err(error) => format!("error {}", name_of(&error)),
        })?;
    }
    Ok(())
}

/// Returns the kernel's name of an error, where it has one.
fn name_of(error: &io::Error) -> String {
    match error.raw_os_error() {
        Some(number) => format!("{:?}", nix::Error::from_raw(number)),
        None => format!("{:?}: {error}", error.kind()),
    }
}

fn perform(words: &[&str], vectors: &Vectors) -> io::Result<String> {
    match words {
        ["get", url] => Ok(get(url, reply_time(MAY_COME))?.trim_end().to_owned()),
        ["digest", url] => Ok(digest(&get(url, reply_time(10 * MAY_COME))?)),
        ["lookup", server, name] => {
            Ok(format!("{:?}", dns_client::lookup(parsed(server)?, name, reply_time(MAY_COME))?))
        }
        ["resolve", name] => resolve(name),
        ["echo", to, size] => echo(parsed(to)?, parsed(size)?),
        ["links"] => links(),
        ["addresses"] => addresses(),
        ["routes"] => routes(),
        ["read", path] => fs::read_to_string(path),
        ["tree", path] => tree(Path::new(path)),
        ["pid"] => Ok(std::process::id().to_string()),
        ["serve", port, text] => serve_page(parsed(port)?, text),
        ["begin-stage" | "complete-stage" | "enter" | "try-vector", ..] => vectors.perform(words),
        _ => trespass::perform(words),
    }
}

/// Parses a word of an act.
pub(crate) fn parsed<T: std::str::FromStr>(word: &str) -> io::Result<T> {
    word.parse().map_err(|_| io::Error::new(io::ErrorKind::InvalidInput, format!("invalid word {word:?}")))
}

/// Resolves a host name by the C library.
fn resolve(name: &str) -> io::Result<String> {
    let mut found: Vec<IpAddr> = (name, 0).to_socket_addrs()?.map(|address| address.ip()).collect();
    found.sort_unstable();
    found.dedup();
    Ok(found.iter().map(IpAddr::to_string).collect::<Vec<_>>().join(" "))
}

/// Sends a datagram of `size` bytes, which must not be fragmented, and waits for its echo.
fn echo(to: SocketAddr, size: usize) -> io::Result<String> {
    use rustix::net::sockopt::{self, Ipv4PathMtuDiscovery, Ipv6PathMtuDiscovery};

    let socket = UdpSocket::bind((unspecified(to), 0))?;
    match to {
        SocketAddr::V4(_) => sockopt::set_ip_mtu_discover(&socket, Ipv4PathMtuDiscovery::DO)?,
        SocketAddr::V6(_) => sockopt::set_ipv6_mtu_discover(&socket, Ipv6PathMtuDiscovery::DO)?,
    }
    socket.set_read_timeout(Some(reply_time(MAY_COME)))?;
    socket.connect(to)?;
    let sent: Vec<u8> = (0..size).map(|at| (at % 251) as u8).collect();
    socket.send(&sent)?;
    let mut buffer = [0; 65536];
    let length = socket.recv(&mut buffer)?;
    Ok(if buffer[..length] == sent { "the same".into() } else { format!("{length} other bytes") })
}

fn links() -> io::Result<String> {
    let links = Netlink::open()?.links()?;
    Ok(links.iter().map(|link| format!("{} {}", link.name, link.mtu)).collect::<Vec<_>>().join(", "))
}

fn addresses() -> io::Result<String> {
    let mut netlink = Netlink::open()?;
    let links = netlink.links()?;
    let name = |index| links.iter().find(|link| link.index == index).map_or("?", |link| &link.name);
    let addresses = netlink.addresses()?;
    Ok(addresses.iter().map(|(index, net)| format!("{} {net}", name(*index))).collect::<Vec<_>>().join(", "))
}

/// Returns the routes of the main table: interface and destination.
fn routes() -> io::Result<String> {
    let mut netlink = Netlink::open()?;
    let links = netlink.links()?;
    let name = |index| links.iter().find(|link| Some(link.index) == index).map_or("?", |link| &link.name);
    let routes = netlink.routes()?.into_iter().filter(|route| route.table == u32::from(libc::RT_TABLE_MAIN));
    Ok(routes.map(|route| format!("{} {}", name(route.interface), route.destination)).collect::<Vec<_>>().join(", "))
}

/// Serves a page on a port of all addresses, on a thread.
fn serve_page(port: u16, text: &str) -> io::Result<String> {
    let listener = TcpListener::bind((Ipv6Addr::UNSPECIFIED, port))?;
    let text = text.to_owned();
    std::thread::spawn(move || {
        for mut stream in listener.incoming().flatten() {
            let mut lines = BufReader::new(&stream).lines();
            while lines.next().is_some_and(|line| line.is_ok_and(|line| !line.is_empty())) {}
            let _ = write!(stream, "HTTP/1.1 200 OK\r\nContent-Length: {}\r\n\r\n{text}", text.len());
        }
    });
    Ok("serving".into())
}

/// Files that change by themselves, or that differ between two tunnels of the same name: random properties of a veth,
/// and the mark.
const CHANGING: [&str; 7] = [
    "statistics",
    "carrier_changes",
    "carrier_up_count",
    "carrier_down_count",
    "nf_conntrack_count",
    "iflink",
    "ifalias",
];

/// Returns a line with the content of each file below a directory. Does not follow links.
fn tree(directory: &Path) -> io::Result<String> {
    let mut entries: Vec<PathBuf> = fs::read_dir(directory)?.flatten().map(|entry| entry.path()).collect();
    entries.sort_unstable();
    let mut lines = String::new();
    for path in entries {
        let is_changing = |name: &str| CHANGING.contains(&name) || (name == "address" && directory.ends_with("host0"));
        if path.file_name().and_then(|name| name.to_str()).is_some_and(is_changing) {
            continue;
        }
        let kind = fs::symlink_metadata(&path)?.file_type();
        if kind.is_dir() {
            lines.push_str(&tree(&path)?);
        } else if kind.is_symlink() {
            lines.push_str(&format!("{} -> {}\n", path.display(), fs::read_link(&path)?.display()));
        } else {
            let content = match fs::read_to_string(&path) {
                Ok(text) => text.trim_end().lines().collect::<Vec<_>>().join(" | "),
                Err(error) => error.to_string(),
            };
            lines.push_str(&format!("{} {content}\n", path.display()));
        }
    }
    Ok(lines)
}
