//! The VPN provider: a WireGuard peer of one of three implementations, in a namespace that forwards and masquerades.

use std::fs::{self, File};
use std::io::{self, Read, Write};
use std::net::Shutdown;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use base64::Engine;
use base64::engine::general_purpose::STANDARD;
use ipnet::IpNet;
use vpn_exec::keys::{PresharedKey, PrivateKey, PublicKey};
use vpn_exec::linux::namespace::NetworkNamespace;
use vpn_exec::linux::netlink::link::TargetNamespace;
use vpn_exec::linux::netlink::{Netlink, NetlinkRequest};
use vpn_exec::linux::tun;
use vpn_exec::names::InterfaceName;
use vpn_exec::wireguard::userspace::{Sockets, UserspaceDevice};
use vpn_exec::wireguard::{DeviceConfig, PeerConfig};

use crate::shared::addresses::TUNNEL_CLIENT;
use crate::shared::variables;
use crate::skip::Skip;
use crate::world;

/// The UDP port of the provider's WireGuard.
pub const PROVIDER_PORT: u16 = 51820;

/// The provider's interface and its MTU in bytes, wg-quick's default.
const INTERFACE: &str = "provider0";
const MTU: u32 = 1420;

/// The control socket of wireguard-go (<https://www.wireguard.com/xplatform/>).
const CONTROL: &str = "/var/run/wireguard/provider0.sock";

/// The time in which wireguard-go starts.
const PATIENCE: Duration = Duration::from_secs(10);

/// The WireGuard implementation of the provider.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Peer {
    /// The embedded one of vpn-exec.
    Ours,
    /// wireguard-go, which shares no code with ours.
    WireguardGo,
    /// The wireguard-go that the variable [`variables::WIREGUARD_GO`] names.
    NewestWireguardGo,
    /// The kernel's, configured with wg(8).
    Kernel,
}

impl Peer {
    /// Requires that this machine can run it.
    ///
    /// # Errors
    /// [`Skip`] if the TUN device or the program is missing.
    pub fn check(self) -> Result<()> {
        if let Err(error) = File::options().read(true).write(true).open(tun::DEVICE) {
            let reason = format!("cannot open {}: {error}", tun::DEVICE);
            return Err(Skip::error(reason, variables::REQUIRE_TUN));
        }
        let program = match self {
            Peer::Ours => return Ok(()),
            Peer::WireguardGo | Peer::NewestWireguardGo => self.wireguard_go()?,
            Peer::Kernel => "wg".into(),
        };
        match Command::new(&program).arg("--version").stdin(Stdio::null()).output() {
            Ok(_) => Ok(()),
            Err(error) => {
                let reason = format!("cannot run {}: {error}", program.display());
                Err(Skip::error(reason, variables::REQUIRE_PEERS))
            }
        }
    }

    /// Returns the wireguard-go that this peer is.
    fn wireguard_go(self) -> Result<PathBuf> {
        let named = std::env::var_os(variables::WIREGUARD_GO).filter(|path| !path.is_empty());
        match (self, named) {
            (Peer::NewestWireguardGo, None) => Err(Skip::error(
                "VPN_EXEC_WIREGUARD_GO is not set: see tests/containers/setup",
                variables::WIREGUARD_GO,
            )),
            (Peer::NewestWireguardGo, Some(path)) => Ok(path.into()),
            _ => Ok("wireguard-go".into()),
        }
    }

    /// Returns the implementation to use: the environment may replace [`Peer::Ours`].
    fn chosen(self) -> Result<Self> {
        match (self, std::env::var(variables::PEER).as_deref()) {
            (Peer::Ours, Ok("wireguard-go")) => Ok(Peer::WireguardGo),
            (Peer::Ours, Ok("kernel")) => Ok(Peer::Kernel),
            (Peer::Ours, Ok(other)) if !other.is_empty() => bail!("invalid {} {other:?}", variables::PEER),
            _ => Ok(self),
        }
    }
}

/// The keys in the customer's file, as text.
#[derive(Clone)]
pub(crate) struct CustomersKeys {
    pub(crate) private: String,
    pub(crate) provider_public: String,
    pub(crate) preshared: String,
}

/// The provider. Stopping and restarting it drops its sessions, like a reboot of a server.
#[derive(Debug)]
pub struct Provider(Arc<Inner>);

struct Inner {
    peer: Peer,
    site: NetworkNamespace,
    private: PrivateKey,
    preshared: PresharedKey,
    customer: PrivateKey,
    running: Mutex<Option<Running>>,
}

enum Running {
    Ours(UserspaceDevice),
    WireguardGo(Child),
    Kernel,
}

impl std::fmt::Debug for Inner {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Provider").field("peer", &self.peer).finish_non_exhaustive()
    }
}

impl Provider {
    pub(crate) fn start(peer: Peer, site: NetworkNamespace) -> Result<Self> {
        let peer = peer.chosen()?;
        peer.check()?;
        let inner = Inner {
            peer,
            site,
            private: random()?.into(),
            preshared: random()?.into(),
            customer: random()?.into(),
            running: Mutex::new(None),
        };
        let provider = Self(Arc::new(inner));
        provider.restart()?;
        Ok(provider)
    }

    /// Returns the namespace of the provider's WireGuard, its forwarding and its resolver.
    pub fn site(&self) -> &NetworkNamespace {
        &self.0.site
    }

    /// Returns the provider's public key.
    pub fn public_key(&self) -> PublicKey {
        self.0.private.public_key()
    }

    pub(crate) fn customer(&self) -> CustomersKeys {
        CustomersKeys {
            private: STANDARD.encode(self.0.customer.as_bytes()),
            provider_public: self.public_key().to_string(),
            preshared: STANDARD.encode(self.0.preshared.as_bytes()),
        }
    }

    /// Returns the customer's device configuration without an endpoint, for a tunnel that a test makes by hand.
    pub fn customers_device(&self) -> DeviceConfig {
        self.0.device(&self.0.customer, self.public_key(), everything(), 0)
    }

    /// Stops the provider's WireGuard, which then does not answer.
    ///
    /// # Errors
    /// If it cannot be stopped.
    pub fn stop(&self) -> Result<()> {
        self.0.stop()
    }

    /// Starts or restarts the provider's WireGuard with the same keys.
    ///
    /// # Errors
    /// If it cannot be started.
    pub fn restart(&self) -> Result<()> {
        self.0.start()
    }

    /// Restarts the provider's WireGuard after a delay. Returns at once.
    pub fn restart_after(&self, delay: Duration) {
        let inner = Arc::clone(&self.0);
        std::thread::spawn(move || {
            std::thread::sleep(delay);
            if let Err(error) = inner.start() {
                eprintln!("cannot restart the provider: {error:?}");
            }
        });
    }
}

impl Inner {
    fn start(&self) -> Result<()> {
        self.stop()?;
        let running = match self.peer {
            Peer::Ours => Running::Ours(self.start_ours()?),
            Peer::WireguardGo | Peer::NewestWireguardGo => Running::WireguardGo(self.start_wireguard_go()?),
            Peer::Kernel => {
                self.start_kernel()?;
                Running::Kernel
            }
        };
        *self.running.lock().unwrap_or_else(PoisonError::into_inner) = Some(running);
        self.site.run(|| {
            let mut netlink = Netlink::open()?;
            let index = netlink.link_index(&interface())?;
            let mut requests =
                vec![NetlinkRequest::set_mtu(index, INTERFACE, MTU), NetlinkRequest::set_up(index, INTERFACE)];
            requests.extend(customers_addresses().map(|to| NetlinkRequest::add_route(index, INTERFACE, to, None)));
            Ok(netlink.execute(requests)?)
        })?;
        Ok(())
    }

    fn stop(&self) -> Result<()> {
        match self.running.lock().unwrap_or_else(PoisonError::into_inner).take() {
            Some(Running::Ours(device)) => drop(device),
            Some(Running::WireguardGo(mut child)) => {
                child.kill()?;
                child.wait()?;
                fs::remove_file(CONTROL)?;
            }
            Some(Running::Kernel) => self.site.run(|| {
                let mut netlink = Netlink::open()?;
                let index = netlink.link_index(&interface())?;
                Ok(netlink.execute_one(NetlinkRequest::delete_link(index, INTERFACE))?)
            })?,
            None => {}
        }
        Ok(())
    }

    fn device(&self, own: &PrivateKey, peer: PublicKey, allowed_ips: Vec<IpNet>, listen_port: u16) -> DeviceConfig {
        let peer = PeerConfig {
            public_key: peer,
            preshared_key: Some(self.preshared.clone()),
            allowed_ips,
            persistent_keepalive: None,
            endpoint: None,
        };
        DeviceConfig { private_key: own.clone(), listen_port, fwmark: 0, mtu: MTU, peers: vec![peer] }
    }

    fn start_ours(&self) -> Result<UserspaceDevice> {
        let (tun, sockets) = self.site.run(|| Ok((passing_tun(&interface())?, Sockets::bind(PROVIDER_PORT, 0)?)))?;
        let allowed_ips = customers_addresses().collect();
        let config = self.device(&self.private, self.customer.public_key(), allowed_ips, PROVIDER_PORT);
        Ok(UserspaceDevice::start(&config, tun, sockets, || Ok(()))?)
    }

    fn start_wireguard_go(&self) -> Result<Child> {
        let mut command = Command::new(self.peer.wireguard_go()?);
        command.args(["-f", INTERFACE]).env("LOG_LEVEL", "error").stdin(Stdio::null());
        let child = self.site.run(|| command.spawn()).context("cannot start wireguard-go")?;
        let configured = self.configure_wireguard_go();
        if configured.is_err() {
            let mut child = child;
            child.kill()?;
            child.wait()?;
            return configured.map(|()| child);
        }
        Ok(child)
    }

    fn start_kernel(&self) -> Result<()> {
        let file = Path::new(world::FILES).join("provider.wg");
        let peers = customers_addresses().map(|net| net.to_string()).collect::<Vec<_>>().join(", ");
        let text = format!(
            "[Interface]\nPrivateKey = {}\nListenPort = {PROVIDER_PORT}\n[Peer]\nPublicKey = {}\nPresharedKey = {}\nAllowedIPs = {peers}\n",
            STANDARD.encode(self.private.as_bytes()),
            self.customer.public_key(),
            STANDARD.encode(self.preshared.as_bytes()),
        );
        fs::write(&file, text)?;
        self.site.run(|| {
            Netlink::open()?.execute_one(NetlinkRequest::add_wireguard(&interface(), TargetNamespace::Current))?;
            let status = Command::new("wg").args(["setconf", INTERFACE]).arg(&file).status()?;
            if status.success() { Ok(()) } else { Err(io::Error::other("wg setconf failed")) }
        })?;
        fs::remove_file(&file)?;
        Ok(())
    }

    /// Configures wireguard-go by the protocol of <https://www.wireguard.com/xplatform/>.
    fn configure_wireguard_go(&self) -> Result<()> {
        let deadline = Instant::now() + crate::patience(PATIENCE);
        let mut socket = loop {
            match UnixStream::connect(Path::new(CONTROL)) {
                Ok(socket) => break socket,
                Err(error) if Instant::now() > deadline => {
                    return Err(error).context("wireguard-go has not created its socket");
                }
                Err(_) => std::thread::sleep(Duration::from_millis(2)),
            }
        };
        let mut request = format!(
            "set=1\nprivate_key={}\nlisten_port={PROVIDER_PORT}\npublic_key={}\npreshared_key={}\n",
            hex(self.private.as_bytes()),
            hex(self.customer.public_key().as_bytes()),
            hex(self.preshared.as_bytes()),
        );
        for address in customers_addresses() {
            request.push_str(&format!("allowed_ip={address}\n"));
        }
        request.push('\n');
        socket.write_all(request.as_bytes())?;
        socket.shutdown(Shutdown::Write)?;
        let mut answer = String::new();
        socket.read_to_string(&mut answer)?;
        if answer.trim() != "errno=0" {
            bail!("wireguard-go refused its configuration: {answer:?}");
        }
        Ok(())
    }
}

impl Drop for Inner {
    fn drop(&mut self) {
        // The end of the world ends it in any case.
        let _ = self.stop();
    }
}

fn interface() -> InterfaceName {
    INTERFACE.parse().expect("the provider's interface name is valid")
}

fn customers_addresses() -> impl Iterator<Item = IpNet> {
    TUNNEL_CLIENT.both().into_iter().map(IpNet::from)
}

fn everything() -> Vec<IpNet> {
    vec![ipnet::Ipv4Net::default().into(), ipnet::Ipv6Net::default().into()]
}

fn random() -> io::Result<[u8; 32]> {
    let mut bytes = [0; 32];
    File::open("/dev/urandom")?.read_exact(&mut bytes)?;
    Ok(bytes)
}

fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

/// Creates a TUN interface that vanishes with its descriptor.
///
/// # Errors
/// The kernel's.
pub fn passing_tun(name: &InterfaceName) -> std::io::Result<std::os::fd::OwnedFd> {
    let tun = tun::create(name)?;
    tun::set_persistent(&tun, false)?;
    Ok(tun)
}
