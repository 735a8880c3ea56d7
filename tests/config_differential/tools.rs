//! Runs wireguard-tools on a file and returns their result.

use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::io::{BufRead, BufReader, Read, Write};
use std::os::unix::net::UnixListener;
use std::path::Path;
use std::process::{Command, Stdio};
use std::sync::mpsc;
use std::time::Duration;

use nix::mount::{MsFlags, mount};
use vpn_exec::keys::PrivateKey;

/// The address of all host names here. `wg setconf` resolves names while it reads a file.
pub(crate) const NAMED_HOST: &str = "192.0.2.99";

/// The configuration of a device in canonical form, after the kernel has applied it.
#[derive(Debug, Default, PartialEq, Eq)]
pub(crate) struct Canonical {
    pub(crate) private_key: String,
    pub(crate) listen_port: u16,
    pub(crate) fwmark: u32,
    pub(crate) peers: BTreeMap<String, CanonicalPeer>,
}

#[derive(Debug, Default, PartialEq, Eq)]
pub(crate) struct CanonicalPeer {
    pub(crate) preshared_key: String,
    pub(crate) endpoint: String,
    pub(crate) keepalive: u16,
    pub(crate) allowed: Vec<String>,
}

/// The settings that wg-quick reads itself.
#[derive(Debug, Default, PartialEq, Eq)]
pub(crate) struct Quick {
    pub(crate) addresses: Vec<String>,
    pub(crate) dns: Vec<String>,
    pub(crate) search: Vec<String>,
    pub(crate) mtu: String,
    pub(crate) table: String,
    pub(crate) save: bool,
    pub(crate) hooks: Vec<Vec<String>>,
}

const ZERO: &str = "0000000000000000000000000000000000000000000000000000000000000000";

/// Applies the lines of the protocol to a model of the kernel's device.
fn apply(conversation: &str) -> Canonical {
    let mut device = Canonical::default();
    let mut own = None;
    let mut current: Option<String> = None;
    let hex = |value: &str| if value == ZERO { String::new() } else { value.to_owned() };
    for line in conversation.lines().filter(|line| !line.is_empty()) {
        let (key, value) = line.split_once('=').expect("a line of the protocol");
        match key {
            "set" | "replace_peers" => {}
            "private_key" => {
                device.private_key = hex(value);
                let bytes: Vec<u8> =
                    (0..32).map(|i| u8::from_str_radix(&value[2 * i..2 * i + 2], 16).expect("hexadecimal")).collect();
                let private = PrivateKey::from(<[u8; 32]>::try_from(bytes).expect("32 bytes"));
                own = (value != ZERO).then(|| to_hex(private.public_key().as_bytes()));
            }
            "listen_port" => device.listen_port = value.parse().expect("a port"),
            "fwmark" => device.fwmark = value.parse().expect("a mark"),
            "public_key" => {
                // The kernel ignores a peer that is the device itself.
                current = (own.as_deref() != Some(value)).then(|| value.to_owned());
                if let Some(name) = &current {
                    device.peers.entry(name.clone()).or_default();
                }
            }
            _ => {
                let Some(name) = &current else { continue };
                if key == "allowed_ip" {
                    let network: ipnet::IpNet = value.parse().expect("a network");
                    let network = network.trunc().to_string();
                    for peer in device.peers.values_mut() {
                        peer.allowed.retain(|other| *other != network);
                    }
                    device.peers.get_mut(name).expect("a peer").allowed.push(network);
                    continue;
                }
                let peer = device.peers.get_mut(name).expect("a peer");
                match key {
                    "preshared_key" => peer.preshared_key = hex(value),
                    "endpoint" => peer.endpoint = value.to_owned(),
                    "persistent_keepalive_interval" => peer.keepalive = value.parse().expect("seconds"),
                    "replace_allowed_ips" => peer.allowed.clear(),
                    _ => panic!("unknown line of the protocol: {line}"),
                }
            }
        }
    }
    for peer in device.peers.values_mut() {
        peer.allowed.sort();
    }
    device
}

pub(crate) fn to_hex(bytes: &[u8]) -> String {
    bytes.iter().fold(String::new(), |mut hex, byte| {
        let _ = write!(hex, "{byte:02x}");
        hex
    })
}

/// Running wireguard-tools, in namespaces of their own.
pub(crate) struct Tools {
    pub(crate) directory: tempfile::TempDir,
    conversations: mpsc::Receiver<String>,
    reader: std::process::Child,
    answers: BufReader<std::process::ChildStdout>,
}

/// The result of the tools for a file; `None` if they refuse it.
pub(crate) type Verdict = Option<(Canonical, Quick)>;

impl Tools {
    /// Prepares the namespaces, which the caller has created.
    pub(crate) fn new() -> Self {
        let directory = tempfile::tempdir().expect("a directory");
        mount(Some("tmpfs"), "/run", Some("tmpfs"), MsFlags::empty(), None::<&str>).expect("a /run of our own");
        std::fs::create_dir("/run/wireguard").expect("the sockets' directory");
        let hosts = directory.path().join("hosts");
        std::fs::write(&hosts, "").expect("a file");
        mount(Some(&hosts), "/etc/hosts", None::<&str>, MsFlags::MS_BIND, None::<&str>)
            .expect("an /etc/hosts of our own");
        let listener = UnixListener::bind("/run/wireguard/peer.sock").expect("the device's socket");
        let (sender, conversations) = mpsc::channel();
        std::thread::spawn(move || {
            for stream in listener.incoming() {
                let mut stream = stream.expect("a connection");
                let mut text = Vec::new();
                let mut buffer = [0; 65536];
                while !text.ends_with(b"\n\n") {
                    match stream.read(&mut buffer) {
                        Ok(0) | Err(_) => break,
                        Ok(length) => text.extend_from_slice(&buffer[..length]),
                    }
                }
                // wg first connects to check whether the device exists.
                if text.is_empty() {
                    continue;
                }
                let _ = stream.write_all(b"errno=0\n\n");
                sender.send(String::from_utf8(text).expect("UTF-8")).expect("a listener");
            }
        });
        // The functions of wg-quick without the commands at its end. In an empty directory, `*` matches nothing.
        let empty = directory.path().join("empty");
        std::fs::create_dir(&empty).expect("a directory");
        let script = r#"
            source <(sed '/function override insertion point/,$d' "$(type -P wg-quick)")
            set +e
            ask() {
                parse_options "$1" 2>/dev/null
                printf '%s\0' "$WG_CONFIG" "$MTU" "$TABLE" "$SAVE_CONFIG"
                local -n list
                for list in ADDRESSES DNS DNS_SEARCH PRE_UP POST_UP PRE_DOWN POST_DOWN; do
                    printf '%s\0' "${#list[@]}"
                    [[ ${#list[@]} -eq 0 ]] || printf '%s\0' "${list[@]}"
                done
            }
            while IFS= read -r file; do
                ( ask "$file" ) > "$file.answer" && echo yes || echo no
            done
        "#;
        let mut reader = Command::new("bash")
            .args(["-c", script])
            .current_dir(&empty)
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::null())
            .spawn()
            .expect("bash");
        let answers = BufReader::new(reader.stdout.take().expect("its output"));
        Self { directory, conversations, reader, answers }
    }

    /// Makes these hosts resolvable, and no others. Ignores those that are not names.
    pub(crate) fn name_hosts(&self, hosts: &[String]) {
        let is_name = |host: &&String| {
            !host.is_empty() && host.bytes().all(|byte| byte.is_ascii_alphanumeric() || b".-_".contains(&byte))
        };
        let lines: String = hosts.iter().filter(is_name).map(|name| format!("{NAMED_HOST} {name}\n")).collect();
        std::fs::write(self.directory.path().join("hosts"), lines).expect("written");
    }

    /// Runs `wg setconf` on a file.
    pub(crate) fn setconf(&self, file: &Path) -> Option<Canonical> {
        let status = Command::new("wg")
            .args(["setconf", "peer"])
            .arg(file)
            .env("WG_ENDPOINT_RESOLUTION_RETRIES", "0")
            .stderr(Stdio::null())
            .status()
            .expect("wg");
        let conversation =
            self.conversations.recv_timeout(Duration::from_millis(if status.success() { 5000 } else { 0 }));
        match conversation {
            Ok(conversation) if status.success() => Some(apply(&conversation)),
            Err(_) if !status.success() => None,
            other => panic!("wg exited with {status} after {other:?}"),
        }
    }

    /// Runs wg-quick and then wg on a file, as `wg-quick up` does.
    pub(crate) fn read(&mut self, text: &[u8]) -> Verdict {
        let file = self.directory.path().join("peer.conf");
        std::fs::write(&file, text).expect("written");
        let line = format!("{}\n", file.display());
        self.reader.stdin.as_mut().expect("its input").write_all(line.as_bytes()).expect("written");
        let mut answer = String::new();
        self.answers.read_line(&mut answer).expect("an answer");
        if answer != "yes\n" {
            return None;
        }
        let answer = std::fs::read(self.directory.path().join("peer.conf.answer")).expect("the answer");
        let mut fields = answer.split(|byte| *byte == 0);
        let mut next = || fields.next().expect("a field").to_vec();
        let (stripped, mtu, table, save) = (next(), next(), next(), next());
        let mut lists = (0..7).map(|_| {
            let count: usize = String::from_utf8(next()).expect("a number").parse().expect("a number");
            (0..count).map(|_| String::from_utf8_lossy(&next()).into_owned()).collect::<Vec<_>>()
        });
        let mut list = || lists.next().expect("a list");
        let quick = Quick {
            addresses: list(),
            dns: list(),
            search: list(),
            mtu: String::from_utf8_lossy(&mtu).into_owned(),
            table: String::from_utf8_lossy(&table).into_owned(),
            save: save == b"1",
            hooks: lists.map(|hooks| hooks.into_iter().filter(|hook| !hook.is_empty()).collect()).collect(),
        };
        let stripped_file = self.directory.path().join("stripped");
        std::fs::write(&stripped_file, [&stripped[..], b"\n"].concat()).expect("written");
        Some((self.setconf(&stripped_file)?, quick))
    }
}

impl Drop for Tools {
    fn drop(&mut self) {
        drop(self.reader.stdin.take());
        let _ = self.reader.wait();
    }
}
