//! The demonstration: `cargo run --release --example demo`.
//!
//! Runs the real `vpn-exec` in a pretended Internet of namespaces, without root, a VPN account, an Internet connection
//! or any effect on the machine. Each printed line is a check that passed; the first one that fails ends the
//! demonstration with an error. A capture of the host's packets shows what leaves the host.

use std::ffi::OsStr;
use std::fs::File;
use std::io::{BufRead, BufReader, Write, stdin};
use std::net::{IpAddr, Ipv4Addr, TcpListener};
use std::os::unix::process::ExitStatusExt;
use std::path::Path;
use std::process::{Child, ChildStdin, ChildStdout, Command, ExitCode, Stdio};
use std::time::{Duration, Instant};

use lab::dns::DnsServer;
use lab::http::{self, Page, WebServer};
use lab::stand_in::{Protocol, StandIn};
use lab::{Context, HOST, Lab, Launcher, PROVIDER, Peer, Reach, Result, Snapshot, WEB, bail, ensure, world};
use vpn_exec::linux::netlink::Netlink;
use vpn_exec::linux::tun;

/// The time that the program inside waits for an answer, and for one that must not come.
const PATIENCE: Duration = Duration::from_secs(3);
const BRIEFLY: Duration = Duration::from_secs(1);

/// The argument with which this executable is the program inside the tunnel.
const PROGRAM: &str = "--program";

fn main() -> ExitCode {
    let outcome = if std::env::args().nth(1).as_deref() == Some(PROGRAM) {
        program().map(|()| ExitCode::SUCCESS)
    } else if world::is_inside() {
        world::furnish().and_then(|()| demonstrate()).map(|()| ExitCode::SUCCESS)
    } else {
        prepare()
    };
    match outcome {
        Ok(status) => status,
        Err(error) => {
            eprintln!("demo: {error:#}");
            ExitCode::FAILURE
        }
    }
}

/// Checks the requirements of the demonstration, and runs it in a world of its own.
fn prepare() -> Result<ExitCode> {
    if let Err(error) = File::options().read(true).write(true).open(tun::DEVICE) {
        bail!(
            "{} cannot be used: {error}\n  the embedded WireGuard needs it; distributions let every user open it. To do the same here:\n  \
             sudo modprobe tun; sudo chmod 0666 {}",
            tun::DEVICE,
            tun::DEVICE
        );
    }
    build()?;
    let status = world::enter(Command::new(std::env::current_exe()?))?.wait()?;
    match (status.code(), status.signal()) {
        (Some(0), _) => Ok(ExitCode::SUCCESS),
        (_, Some(signal)) => bail!("it took too long, or was killed, by signal {signal}"),
        // The process inside has reported the error.
        _ => Ok(ExitCode::FAILURE),
    }
}

/// Lets cargo bring the real binary up to date, which `cargo run --example` does not.
fn build() -> Result<()> {
    if let Some(cargo) = std::env::var_os("CARGO") {
        let mut command = Command::new(cargo);
        command.args(["build", "--quiet", "--bin", "vpn-exec"]);
        if !cfg!(debug_assertions) {
            command.arg("--release");
        }
        ensure!(command.status()?.success(), "cannot build vpn-exec");
    }
    Ok(())
}

fn demonstrate() -> Result<()> {
    let begun = Instant::now();
    let lab = Lab::start(Peer::Ours)?;
    let _page = WebServer::start(&lab.host, 8080, Page::Text("a page on the host\n"))?;
    let web = WEB
        .both()
        .map(|address| if address.is_ipv6() { format!("http://[{address}]/") } else { format!("http://{address}/") });

    say("the stage", "host, router, VPN provider and web server, in namespaces of this process alone");
    for (url, address) in web.iter().zip(HOST.both()) {
        ensure_same("without vpn-exec, the server", http::get(url, PATIENCE)?.trim(), &address.to_string())?;
    }
    say("without vpn-exec", format_args!("the server sees the host:      {} and {}", HOST.ipv4, HOST.ipv6));
    let resolvers = HostsResolvers::start(&lab)?;
    http::get("http://web.example/", PATIENCE)?;
    ensure!(resolvers.questions() > 0, "no resolver has logged the host's own lookup of web.example");

    lab.capture.forget()?;
    let config = lab.wg_quick_file(Reach::Name)?;
    let before = Snapshot::take()?;
    let mut program = Inside::start(&config)?;
    for (url, address) in web.iter().zip(PROVIDER.both()) {
        ensure_same("with vpn-exec, the server", &program.get(url)??, &address.to_string())?;
    }
    say("with vpn-exec", format_args!("the server sees the provider:  {} and {}", PROVIDER.ipv4, PROVIDER.ipv6));

    let told = resolvers.questions();
    program.get("http://web.example/")??;
    let answered = lab.tunnel_resolver.questions().iter().any(|question| question.name == "web.example");
    ensure!(answered, "the provider's resolver was not asked for web.example");
    ensure!(resolvers.questions() == told, "the program's question for web.example went to a resolver of the host's");
    say("", "web.example is looked up by the provider's resolver, and seen by none of the host's");
    say("", format_args!("(which are {RESOLVERS})"));

    let page = program.get("http://host.internal:8080/")??;
    say("the local network", format_args!("the program reads http://host.internal:8080/:  {page}"));
    program.tell("serve 8000")??;
    let url = format!("http://{}:8000/", inner_address()?);
    let page = http::get(&url, PATIENCE).with_context(|| format!("the host cannot reach {url}, inside"))?;
    say("", format_args!("the host reads {url}:  {}", page.trim()));
    ensure_no_leaks(&lab)?;

    lab.capture.forget()?;
    lab.provider.stop()?;
    let mut errors = Vec::new();
    for url in &web {
        match program.tell(&format!("try {url}"))? {
            Ok(answer) => bail!("the provider is stopped, and the program still gets {answer:?} from {url}"),
            Err(error) => errors.push(error.to_string()),
        }
    }
    ensure_no_leaks(&lab)?;
    let encrypted = lab.capture.uplink()?.iter().filter(|packet| packet.is_encrypted()).count();
    ensure!(encrypted > 0, "the tunnel did not even try to reach the provider");
    say("a dead provider", format_args!("the program gets errors:       {}", errors.join(", ")));
    say("", format_args!("the uplink carried {encrypted} encrypted packets for the provider, nothing in the clear"));

    program.end()?;
    let left = before.changes_within(Duration::from_secs(2))?;
    ensure!(left.is_empty(), "something is left on the host:\n  {}", left.join("\n  "));
    say("afterwards", "addresses, routes, rules, links, mounts, sysctls, nftables, /run, programs: as before");
    say("", format_args!("all of it took {:.1} seconds", begun.elapsed().as_secs_f32()));
    Ok(())
}

/// The resolvers that the host's programs use, or could.
struct HostsResolvers<'a> {
    /// The resolver in the host's /etc/resolv.conf.
    routers: &'a DnsServer,
    /// A resolver on all addresses of the host.
    own: DnsServer,
    daemons: Vec<StandIn>,
}

/// Their names, for the output.
const RESOLVERS: &str = "nscd, systemd-resolved by varlink and by D-Bus, Avahi, a server on the host, the router's";

impl<'a> HostsResolvers<'a> {
    fn start(lab: &'a Lab) -> Result<Self> {
        let daemons = [
            ("/run/nscd/socket", Protocol::None),
            ("/run/systemd/resolve/io.systemd.Resolve", Protocol::Varlink),
            ("/run/dbus/system_bus_socket", Protocol::Dbus),
            ("/run/avahi-daemon/socket", Protocol::Avahi),
        ];
        let daemons = daemons.into_iter().map(|(path, tongue)| StandIn::listen(path, tongue)).collect::<Result<_>>()?;
        Ok(Self { routers: &lab.resolver, own: DnsServer::start_everywhere(&lab.host, &[53])?, daemons })
    }

    /// Returns the number of questions and connections to all of them.
    fn questions(&self) -> usize {
        let questions: usize = [self.routers, &self.own].map(|server| server.questions().len()).iter().sum();
        questions + self.daemons.iter().map(StandIn::clients).sum::<usize>()
    }
}

fn say(subject: &str, what: impl std::fmt::Display) {
    println!("{subject:<18} {what}");
}

fn ensure_same(who: &str, seen: &str, expected: &str) -> Result<()> {
    ensure!(seen == expected, "{who} should see {expected} and sees {seen}");
    Ok(())
}

fn ensure_no_leaks(lab: &Lab) -> Result<()> {
    let leaks = lab.capture.leaks()?;
    ensure!(leaks.is_empty(), "something leaked from the host: {leaks:#?}");
    Ok(())
}

/// Returns the program's address on the veth: the other address of the host's /31.
fn inner_address() -> Result<IpAddr> {
    let mut netlink = Netlink::open()?;
    let link = netlink.links()?.into_iter().find(|link| link.name.starts_with("ve-"));
    let link = link.context("the host has no interface ve-... to the program")?;
    let addresses = netlink.addresses()?;
    let host_end = addresses.iter().find_map(|(index, address)| match address.addr() {
        IpAddr::V4(address) if *index == link.index => Some(address),
        _ => None,
    });
    let host_end = host_end.with_context(|| format!("{} has no IPv4 address", link.name))?;
    Ok(Ipv4Addr::from(u32::from(host_end) ^ 1).into())
}

/// `vpn-exec` with the program in the tunnel, which performs orders line by line.
struct Inside {
    process: Child,
    orders: ChildStdin,
    answers: BufReader<ChildStdout>,
}

impl Inside {
    fn start(config: &Path) -> Result<Self> {
        let own = std::env::current_exe()?;
        let launcher = Launcher::with_backend(config, "userspace").program([own.as_os_str(), OsStr::new(PROGRAM)]);
        let mut command = launcher.command();
        let process = command.stdin(Stdio::piped()).stdout(Stdio::piped()).spawn();
        let mut process = process.context("cannot start vpn-exec")?;
        let (orders, answers) = (process.stdin.take(), process.stdout.take());
        let (orders, answers) = orders.zip(answers).context("vpn-exec has no standard input and output")?;
        Ok(Self { process, orders, answers: BufReader::new(answers) })
    }

    /// Sends an order to the program. The inner error is the program's.
    fn tell(&mut self, order: &str) -> Result<Result<String>> {
        writeln!(self.orders, "{order}").context("the program inside is gone")?;
        let mut line = String::new();
        self.answers.read_line(&mut line)?;
        Ok(match line.trim_end().split_once(' ') {
            Some(("ok", answer)) => Ok(answer.to_owned()),
            Some(("error", error)) => Err(lab::Error::msg(error.to_owned())),
            _ => bail!("the program inside is gone; vpn-exec says: {}", self.process.wait()?),
        })
    }

    fn get(&mut self, url: &str) -> Result<Result<String>> {
        let answer = self.tell(&format!("get {url}"))?;
        Ok(answer.with_context(|| format!("the program inside cannot get {url}")))
    }

    fn end(mut self) -> Result<()> {
        drop(self.orders);
        let status = self.process.wait()?;
        ensure!(status.success(), "vpn-exec ended with {status}");
        Ok(())
    }
}

/// Runs the program inside, which knows nothing of VPNs: reads orders from standard input, one a line, and answers
/// each.
fn program() -> Result<()> {
    for line in stdin().lines() {
        let outcome = match line?.split_once(' ') {
            Some(("get", url)) => http::get(url, PATIENCE),
            Some(("try", url)) => http::get(url, BRIEFLY),
            Some(("serve", port)) => serve(port.parse()?),
            order => bail!("what is {order:?}?"),
        };
        match outcome {
            Ok(answer) => println!("ok {}", answer.trim_end()),
            Err(error) => println!("error {error}"),
        }
    }
    Ok(())
}

fn serve(port: u16) -> std::io::Result<String> {
    let listener = TcpListener::bind((Ipv4Addr::UNSPECIFIED, port))?;
    std::thread::spawn(move || {
        for mut stream in listener.incoming().flatten() {
            // There is only one page, so the request does not matter.
            let mut reader = BufReader::new(&stream);
            let mut line = String::new();
            while reader.read_line(&mut line).is_ok_and(|_| !line.trim_end().is_empty()) {
                line.clear();
            }
            let page = "a page inside the tunnel\n";
            let _ = write!(stream, "HTTP/1.1 200 OK\r\nContent-Length: {}\r\n\r\n{page}", page.len());
        }
    });
    Ok("serving".to_owned())
}
