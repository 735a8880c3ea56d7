//! `attach --check`, `attach --closed`, `status` and `plan --attach`.

use std::io::{BufRead, BufReader};
use std::process::{Child, Output, Stdio};
use std::time::Duration;

use lab::launcher::{binary, errors_of, run};
use lab::{Context, Lab, Peer, Pod, Reach, Result, WEB, variables};

use crate::support::{Sidecar, WORKS, application, check, get, require_closed, sidecar_runs, wait_until_up};

/// Returns the standard output of a process that has succeeded.
fn printed(output: Output) -> Result<String> {
    lab::ensure!(output.status.success(), "{}", errors_of(&output));
    Ok(String::from_utf8(output.stdout)?)
}

#[test]
fn the_check_tells_an_open_a_closed_and_a_working_pod_apart() {
    lab::test(Peer::Ours, |lab| {
        let pod = Pod::start(lab)?;
        assert_eq!(check(&pod)?, ("open".into(), Some(4)));
        let file = lab.wg_quick_file(Reach::Ipv4)?;
        let closed = sidecar_runs(&pod, &["attach", file.to_str().context("a path")?, "--closed"])?;
        assert_eq!(closed.status.code(), Some(0), "{}", errors_of(&closed));
        assert_eq!(check(&pod)?, ("closed".into(), Some(3)));
        let mut app = application(&pod)?;
        lab.capture.forget()?;
        for address in WEB.both() {
            app.fail(&get(address))?;
        }
        require_closed(lab, &[])?;

        let sidecar = Sidecar::start(&pod, &file, &[])?;
        wait_until_up(&pod)?;
        assert_eq!(check(&pod)?, ("up".into(), Some(0)));
        let quiet = sidecar_runs(&pod, &["attach", "--check", "-q"])?;
        assert!(quiet.status.success() && quiet.stdout.is_empty());
        // Another program changes the rules, or removes the rule that leads into the tunnel.
        let nft = |words: &str| run(pod.sidecar(["nft", words]));
        assert!(nft("add rule inet vpn-exec output accept")?.status.success());
        assert_eq!(check(&pod)?, ("damaged".into(), Some(3)));
        drop(sidecar);
        let _again = Sidecar::start(&pod, &file, &[])?;
        wait_until_up(&pod)?;
        assert!(run(pod.sidecar(["ip", "rule", "del", "priority", "30431"]))?.status.success());
        assert_eq!(check(&pod)?, ("damaged".into(), Some(3)));
        app.finish_well().map(drop)
    });
}

#[test]
fn the_check_needs_the_capability() {
    lab::test(Peer::Ours, |lab| {
        let pod = Pod::start(lab)?;
        let output = run(pod.application([binary().to_str().context("a path")?, "attach", "--check"]))?;
        assert_eq!(output.status.code(), Some(125));
        assert!(errors_of(&output).contains("capabilities: {add: [NET_ADMIN]}"), "{}", errors_of(&output));
        Ok(())
    });
}

#[test]
fn status_shows_the_attached_tunnel() {
    lab::test(Peer::Ours, |lab| {
        let pod = Pod::start(lab)?;
        let _sidecar = Sidecar::start(&pod, &lab.wg_quick_file(Reach::Ipv4)?, &["--name", "mullvad"])?;
        wait_until_up(&pod)?;
        let text = printed(sidecar_runs(&pod, &["status"])?)?;
        assert!(text.starts_with("mullvad: up (attached to this network namespace"), "{text}");
        let json = printed(sidecar_runs(&pod, &["status", "mullvad", "--json"])?)?;
        assert!(json.contains("\"state\": \"up\"") && !json.contains("PrivateKey"), "{json}");
        let host = printed(run(lab::vpn_exec(["status"]))?)?;
        assert_eq!(host.trim(), "no tunnel is up");
        Ok(())
    });
}

#[test]
fn the_plan_is_what_the_kernel_gets() {
    lab::test(Peer::Ours, |lab| {
        let pod = Pod::start(lab)?;
        let file = lab.wg_quick_file(Reach::Ipv4)?;
        let file = file.to_str().context("a path")?;
        let plan = || -> Result<String> { printed(sidecar_runs(&pod, &["plan", "--attach", file])?) };
        let before = plan()?;
        assert!(before.contains("ip daddr 198.51.100.2") && before.contains("lookup 30309"), "{before}");
        assert_eq!(check(&pod)?.0, "open", "planning changes nothing");
        let _sidecar = Sidecar::start(&pod, lab.file(&std::fs::read_to_string(file)?)?.as_path(), &[])?;
        wait_until_up(&pod)?;
        assert_eq!(plan()?, before, "the plan of an attached tunnel is the same again");
        Ok(())
    });
}

/// Any process of the namespace may take the address of the status. One of another PID namespace is not believed.
#[test]
fn a_stranger_at_the_status_socket_is_not_believed() {
    lab::test(Peer::Ours, |lab| {
        let pod = Pod::start(lab)?;
        let _sidecar = Sidecar::start(&pod, &lab.wg_quick_file(Reach::Ipv4)?, &["--name", "mullvad"])?;
        wait_until_up(&pod)?;
        let program = binary().to_str().context("a path")?;
        let apart = ["unshare", "--pid", "--fork", program, "status"];
        let text = printed(run(pod.container("+all", apart))?)?;
        assert_eq!(text.trim(), "no tunnel is up");
        Ok(())
    });
}

/// A sidecar in a container of its own, which has a PID namespace of its own as well. It ends with this value: this is
/// the process that has made the namespace.
struct Container(Child);

/// The rights of the sidecar's container.
const RIGHTS: [&str; 3] = ["setpriv", "--bounding-set=-all,+net_admin", "--inh-caps=-all"];

impl Container {
    /// Starts the container, and waits until its tunnel is up.
    fn start(lab: &Lab, pod: &Pod) -> Result<Self> {
        let file = lab.wg_quick_file(Reach::Ipv4)?;
        let (program, file) = (binary().to_str().context("a path")?, file.to_str().context("a path")?);
        let apart = ["unshare", "--pid", "--fork", "--kill-child"];
        let attach = [program, "attach", file, "--backend", "userspace", "--name", "mullvad"];
        let mut command = pod.container("+all", apart.into_iter().chain(RIGHTS).chain(attach));
        let container = Self(command.stdin(Stdio::null()).stderr(Stdio::null()).spawn()?);
        lab::wait_until(lab::patience(WORKS), "the tunnel is not up", || {
            Ok(container.runs(pod, &["attach", "--check"]).is_ok_and(|check| check.status.success()))
        })?;
        Ok(container)
    }

    /// Runs vpn-exec in the container, as a probe does.
    fn runs(&self, pod: &Pod, arguments: &[&str]) -> Result<Output> {
        let children = std::fs::read_to_string(format!("/proc/{0}/task/{0}/children", self.0.id()))?;
        let first = children.split_whitespace().next().context("the first process of the container")?;
        let namespace = format!("--pid=/proc/{first}/ns/pid");
        let words = ["nsenter", &namespace].into_iter().chain(RIGHTS);
        let program = [binary().to_str().context("a path")?];
        run(pod.container("+all", words.chain(program).chain(arguments.iter().copied())))
    }
}

impl Drop for Container {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// A process of another container, whose user is the same. It ends with this value.
struct OtherContainer(Child);

impl OtherContainer {
    /// Runs a Python program, and waits until it has printed a line.
    fn run(pod: &Pod, program: &str) -> Result<Self> {
        let mut command = pod.application(["/usr/bin/python3", "-I", "-S", "-c", program]);
        let mut other = Self(command.stdin(Stdio::null()).stdout(Stdio::piped()).spawn()?);
        let output = other.0.stdout.as_mut().context("its output")?;
        let mut line = String::new();
        lab::ensure!(BufReader::new(output).read_line(&mut line)? > 0, "the other container's process has ended");
        Ok(other)
    }
}

impl Drop for OtherContainer {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// Listens at names that look like the sidecar's, at some of them with a full backlog.
const LISTENER: &str = "import socket, time
def listen(name):
    s = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    s.bind(name)
    s.listen(0)
    return s
def connect(name):
    s = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    s.setblocking(False)
    try:
        s.connect(name)
    except BlockingIOError:
        pass
    return s
names = ['\\0vpn-exec'] + ['\\0vpn-exec-%016x' % number for number in range(100)]
listeners = [listen(name) for name in names]
clients = [connect(name) for name in names[1::2] for _ in range(3)]
print('begun', flush=True)
time.sleep(1000)
";

#[test]
fn another_containers_listeners_keep_no_check_from_the_sidecar() {
    lab::test(Peer::Ours, |lab| {
        let pod = Pod::start(lab)?;
        let first = Container::start(lab, &pod)?;
        drop(first);
        // It takes the names while the sidecar restarts, and does not stand in for it.
        let _other = OtherContainer::run(&pod, LISTENER)?;
        let second = Container::start(lab, &pod)?;
        for _ in 0..10 {
            let check = second.runs(&pod, &["attach", "--check"])?;
            assert!(check.status.success(), "{}", errors_of(&check));
        }
        let text = printed(second.runs(&pod, &["status"])?)?;
        assert!(text.starts_with("mullvad: up"), "{text}");
        drop(second);
        assert_eq!(check(&pod)?, ("closed".into(), Some(3)));
        Ok(())
    });
}

/// Keeps as many connections to the sidecar open as it gets, by four threads.
const CLIENTS: &str = "import socket, threading
names = {line.split()[-1] for line in open('/proc/net/unix') if '@vpn-exec' in line}
def flood():
    clients = []
    while True:
        for name in names:
            s = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
            try:
                s.connect('\\0' + name[1:])
                clients = clients[-60:] + [s]
            except OSError:
                pass
            if len(clients) == 60 and not begun.is_set():
                print('begun', flush=True)
                begun.set()
begun = threading.Event()
for _ in range(4):
    threading.Thread(target=flood).start()
";

#[test]
fn another_containers_connections_keep_no_check_waiting() {
    lab::test(Peer::Ours, |lab| {
        let pod = Pod::start(lab)?;
        let sidecar = Container::start(lab, &pod)?;
        let _other = OtherContainer::run(&pod, CLIENTS)?;
        for _ in 0..10 {
            // A probe that fails once is repeated by its engine.
            lab::wait_until(lab::patience(WORKS), "no check succeeds", || {
                Ok(sidecar.runs(&pod, &["attach", "--check"])?.status.success())
            })?;
        }
        Ok(())
    });
}

/// The age of a stale handshake in the tests. The embedded device makes no two handshakes within 5 s.
const STALE: Duration = Duration::from_secs(6);

/// WireGuard makes no handshakes while a tunnel is idle. A check has it make one.
#[test]
fn an_idle_tunnel_is_up_as_long_as_its_provider_answers() {
    lab::test(Peer::Ours, |lab| {
        let pod = Pod::start(lab)?;
        let age = STALE.as_secs().to_string();
        let file = lab.wg_quick_file(Reach::Ipv4)?;
        assert!(!std::fs::read_to_string(&file)?.contains("PersistentKeepalive"));
        let _sidecar = Sidecar::start_with(&pod, &file, &[], (variables::STALE, &age))?;
        wait_until_up(&pod)?;
        for _ in 0..2 {
            std::thread::sleep(STALE + Duration::from_secs(1));
            // On a busy machine, the handshake may take longer than a check waits.
            lab::wait_until(lab::patience(WORKS), "the idle tunnel is not up", || {
                Ok(check(&pod)? == ("up".into(), Some(0)))
            })?;
        }
        lab.provider.stop()?;
        std::thread::sleep(STALE + Duration::from_secs(1));
        for _ in 0..2 {
            assert_eq!(check(&pod)?, ("stale".into(), Some(3)));
        }
        lab.provider.restart()?;
        wait_until_up(&pod)
    });
}
