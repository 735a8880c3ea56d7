//! The tunnels of containers that an engine makes: `oci-hook`, `cdi` and `cni`. A process in a network namespace of its
//! own plays the container (`lab::Pod`); `tests/containers` runs real engines.

use std::fs;
use std::io::Write;
use std::net::IpAddr;
use std::path::{Path, PathBuf};
use std::process::{Child, Output, Stdio};
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use hickory_proto::rr::RecordType;
use lab::dns::DnsServer;
use lab::http::{Page, WebServer};
use lab::launcher::text_of;
use lab::{
    CLUSTER_RESOLVER, CLUSTER_SERVICE, Lab, POD, POD_GATEWAY, PROVIDER, Peer, Pod, Reach, TUNNEL_CLIENT, WEB, pod,
    vpn_exec,
};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use serde_json::{Value, json};
use vpn_exec::fault;
use vpn_exec::linux::namespace::{NamespaceId, bind_name, remove_name};
use vpn_exec::linux::netlink::{Netlink, NetlinkRequest};
use vpn_exec::linux::nftables::Nftables;
use vpn_exec::registry;

/// The profile that the tests use.
const NAME: &str = "pods";

/// The time after which something is taken for hanging.
const PATIENCE: Duration = Duration::from_secs(20);

/// How long a page is waited for that must not come.
const BRIEFLY: Duration = Duration::from_millis(700);

/// Gives the world an `/etc` of its own with profiles for the provider. Nothing of the machine's changes.
fn furnish(lab: &Lab) -> Result<()> {
    let own = Path::new("/run/lab/etc");
    fs::create_dir(own)?;
    let copied = std::process::Command::new("cp").args(["-a", "/etc/.", "/run/lab/etc"]).status()?;
    ensure!(copied.success(), "cannot copy /etc");
    for directory in ["vpn-exec", "wireguard"] {
        let _ = fs::remove_dir_all(own.join(directory));
        fs::create_dir(own.join(directory))?;
    }
    fs::write(own.join("wireguard/host.conf"), lab.wg_quick_text(Reach::Ipv4))?;
    vpn_exec::linux::mounts::bind(own, Path::new("/etc"))?;
    fs::create_dir("/run/lab/bundle")?;
    fs::write("/run/lab/bundle/config.json", r#"{"ociVersion": "1.0.2", "linux": {}}"#)?;
    let file = lab.wg_quick_file(Reach::Ipv4)?;
    let text = format!("wireguard = \"{}\"\nbackend = \"{}\"\n", file.display(), lab::backend());
    Ok(fs::write(format!("/etc/vpn-exec/{NAME}.toml"), text)?)
}

/// Runs a test with a lab, a pod and a profile.
fn test(body: impl FnOnce(&Lab, &Pod) -> Result<()>) {
    lab::test(Peer::Ours, |lab| {
        furnish(lab)?;
        body(lab, &Pod::start(lab)?)
    });
}

/// A container: a process in the namespace of a pod.
struct Container {
    id: &'static str,
    init: Child,
}

impl Container {
    fn start(pod: &Pod, id: &'static str) -> Result<Self> {
        let mut command = pod.application(["sleep", "1000"]);
        let init = command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null()).spawn()?;
        let inside = pod.namespace.id()?;
        let pid = init.id().cast_signed();
        lab::wait_until(lab::patience(PATIENCE), "the container did not start", || {
            Ok(NamespaceId::of_process(pid).is_ok_and(|of| of == inside))
        })?;
        Ok(Self { id, init })
    }

    /// The state that a runtime passes to hooks.
    fn state(&self, tunnel: Option<&str>) -> Value {
        let annotations = tunnel.map(|name| json!({"vpn-exec.tunnel": name})).unwrap_or_else(|| json!({}));
        json!({"ociVersion": "1.0.2", "id": self.id, "status": "creating", "pid": self.init.id(),
               "bundle": "/run/lab/bundle", "annotations": annotations})
    }

    fn create(&self, tunnel: &str) -> Result<Output> {
        hook(&["createRuntime"], &self.state(Some(tunnel)), &[])
    }

    fn poststop(&self) -> Result<Output> {
        let state = json!({"ociVersion": "1.0.2", "id": self.id, "status": "stopped", "pid": 0, "bundle": "/gone"});
        hook(&["poststop"], &state, &[])
    }

    fn is_running(&mut self) -> Result<bool> {
        Ok(self.init.try_wait()?.is_none())
    }

    fn end(mut self) -> Result<()> {
        self.init.kill()?;
        self.init.wait()?;
        Ok(())
    }
}

/// Runs the hook as a runtime does: with an empty environment and the state on standard input.
fn hook(arguments: &[&str], state: &Value, environment: &[(&str, &str)]) -> Result<Output> {
    let mut command = vpn_exec(["oci-hook"]);
    command.args(arguments).env_clear().envs(environment.iter().copied()).current_dir("/");
    run_with_input(command, &state.to_string())
}

fn run_with_input(mut command: std::process::Command, input: &str) -> Result<Output> {
    let mut child = command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn()?;
    child.stdin.take().context("a pipe")?.write_all(input.as_bytes())?;
    Ok(child.wait_with_output()?)
}

fn succeed(output: Output) -> Result<String> {
    ensure!(output.status.success(), "{}", text_of(&output));
    Ok(String::from_utf8(output.stdout)?)
}

/// Fails unless a command has failed with a text in its messages.
fn refused(output: &Output, text: &str) -> Result<()> {
    ensure!(!output.status.success() && text_of(output).contains(text), "{text:?} expected: {}", text_of(output));
    Ok(())
}

fn status() -> Result<Value> {
    Ok(serde_json::from_str(&succeed(vpn_exec(["status", NAME, "--json"]).output()?)?)?)
}

/// Returns the address under which the web server sees a process of the container.
fn seen_from(pod: &Pod, patience: Duration) -> Result<String, String> {
    let page = pod.namespace.run(|| lab::http::get(&format!("http://{}/", WEB.ipv4), patience));
    page.map(|page| page.trim().to_owned()).map_err(|error| error.to_string())
}

fn require_tunnel(pod: &Pod) -> Result<()> {
    let seen = seen_from(pod, lab::patience(PATIENCE));
    ensure!(seen.as_deref() == Ok(&PROVIDER.ipv4.to_string()), "the server saw {seen:?}");
    Ok(())
}

fn require_closed(lab: &Lab, pod: &Pod) -> Result<()> {
    let seen = seen_from(pod, BRIEFLY);
    ensure!(seen.is_err(), "the server saw {seen:?}");
    require_no_leaks(lab)
}

fn require_no_leaks(lab: &Lab) -> Result<()> {
    let leaks = lab.capture.leaks()?;
    ensure!(leaks.is_empty(), "leaks: {leaks:?}");
    Ok(())
}

fn require_nothing_left() -> Result<()> {
    lab::wait_until(lab::patience(PATIENCE), "something is left of the tunnel", || {
        Ok(!Path::new("/run/vpn-exec").exists() && !Path::new("/run/netns").join(NAME).exists())
    })
}

#[test]
fn a_container_has_the_tunnel_of_its_annotation_as_long_as_it_runs() {
    test(|lab, pod| {
        let container = Container::start(pod, "c1")?;
        succeed(container.create(NAME)?)?;
        require_tunnel(pod)?;
        let status = status()?;
        ensure!(status["container"]["id"] == "c1" && status["container"]["pid"] == container.init.id(), "{status}");
        ensure!(status["link"].is_null() && status["standing"] == true, "{status}");
        let listed = succeed(vpn_exec(["list"]).output()?)?;
        ensure!(listed.contains("CONTAINER") && listed.contains("c1"), "{listed}");
        let addresses = pod.namespace.run(|| Netlink::open()?.addresses())?;
        ensure!(addresses.iter().any(|(_, net)| net.addr() == TUNNEL_CLIENT.ipv6), "{addresses:?}");

        let first = container.poststop()?;
        succeed(first)?;
        require_nothing_left()?;
        succeed(container.poststop()?)?;
        require_closed(lab, pod)?;
        container.end()
    });
}

#[test]
fn a_tunnel_ends_with_its_container_also_if_the_runtime_crashes() {
    test(|lab, pod| {
        let container = Container::start(pod, "c1")?;
        succeed(container.create(NAME)?)?;
        require_tunnel(pod)?;
        container.end()?;
        require_nothing_left()?;
        require_closed(lab, pod)?;
        // The next container in the same namespace gets the tunnel again.
        let next = Container::start(pod, "c2")?;
        succeed(next.create(NAME)?)?;
        require_tunnel(pod)?;
        next.end()?;
        require_nothing_left()?;
        require_no_leaks(lab)
    });
}

#[test]
fn a_tunnel_serves_one_container_and_nothing_else() {
    test(|lab, pod| {
        let (mut container, second) = (Container::start(pod, "c1")?, Container::start(pod, "c2")?);
        succeed(container.create(NAME)?)?;
        refused(&second.create(NAME)?, "the tunnel pods serves the container c1")?;
        refused(&vpn_exec([NAME, "--", "true"]).output()?, "serves the container c1")?;
        refused(&vpn_exec(["up", NAME]).output()?, "serves the container c1")?;
        refused(&vpn_exec(["down", NAME]).output()?, "the container c1 is running in the tunnel pods")?;
        require_tunnel(pod)?;
        succeed(second.poststop()?)?;
        require_tunnel(pod)?;
        succeed(vpn_exec(["down", NAME, "--force"]).output()?)?;
        require_nothing_left()?;
        ensure!(container.is_running()?, "the keeper must not kill a container's processes");
        require_closed(lab, pod)?;
        // A tunnel of this machine's own programs has the key as well.
        succeed(vpn_exec(["up", NAME]).output()?)?;
        refused(&second.create(NAME)?, "is up for programs of this machine")?;
        succeed(vpn_exec(["down", NAME]).output()?)?;
        container.end()?;
        second.end()
    });
}

#[test]
fn a_killed_keeper_leaves_the_container_closed_until_another_takes_over() {
    test(|lab, pod| {
        let mut container = Container::start(pod, "c1")?;
        succeed(container.create(NAME)?)?;
        require_tunnel(pod)?;
        let keeper = registry::read(&NAME.parse()?)?.context("a state")?.keeper.cast_signed();
        kill(Pid::from_raw(keeper), Signal::SIGKILL)?;
        require_closed(lab, pod)?;
        ensure!(status()?["container"]["id"] == "c1", "the container is known without a keeper");
        refused(&vpn_exec(["down", NAME]).output()?, "the container c1 is running in the tunnel pods")?;
        succeed(vpn_exec(["up", NAME]).output()?)?;
        require_tunnel(pod)?;
        ensure!(container.is_running()?, "a successor leaves the container alone");
        succeed(vpn_exec(["reload", NAME]).output()?)?;
        require_tunnel(pod)?;

        // Killed again, and the container ends before anything else happens.
        let keeper = registry::read(&NAME.parse()?)?.context("a state")?.keeper.cast_signed();
        kill(Pid::from_raw(keeper), Signal::SIGKILL)?;
        let id = container.id;
        container.end()?;
        let next = Container { id, ..Container::start(pod, "c2")? };
        succeed(next.create(NAME)?)?;
        require_tunnel(pod)?;
        // Killed once more: poststop removes what is left.
        let keeper = registry::read(&NAME.parse()?)?.context("a state")?.keeper.cast_signed();
        kill(Pid::from_raw(keeper), Signal::SIGKILL)?;
        succeed(next.poststop()?)?;
        require_nothing_left()?;
        require_closed(lab, pod)?;
        next.end()
    });
}

/// Docker runs createRuntime before the container has an interface, with IPv6 switched off.
#[test]
fn a_container_whose_network_comes_later_has_the_tunnel_from_its_first_packet() {
    test(|lab, pod| {
        let index = pod.namespace.run(|| {
            vpn_exec::linux::sysctl::set("net/ipv6/conf/all/disable_ipv6", "1")?;
            vpn_exec::linux::sysctl::set("net/ipv6/conf/default/disable_ipv6", "1")?;
            let mut netlink = Netlink::open()?;
            let index = netlink.link("eth0")?.map_or(0, |link| link.index);
            netlink.execute_one(NetlinkRequest::delete_address(index, "eth0", address(POD.ipv4)))?;
            Ok(index)
        })?;
        let container = Container::start(pod, "c1")?;
        succeed(container.create(NAME)?)?;
        pod.namespace.run(|| {
            let router = Some(POD_GATEWAY.ipv4.into());
            let everywhere = "0.0.0.0/0".parse().map_err(std::io::Error::other)?;
            let requests = vec![
                NetlinkRequest::add_address(index, "eth0", address(POD.ipv4)),
                NetlinkRequest::add_route(index, "eth0", everywhere, router).or_exists(),
            ];
            Ok(Netlink::open()?.execute(requests)?)
        })?;
        require_tunnel(pod)?;
        let page = pod.namespace.run(|| lab::http::get(&format!("http://[{}]/", WEB.ipv6), lab::patience(PATIENCE)))?;
        ensure!(page.trim() == PROVIDER.ipv6.to_string(), "IPv6 works in the tunnel: {page}");
        require_no_leaks(lab)?;

        // Replies to inbound connections leave as they came in. Their packets are no leaks.
        let _service = WebServer::start(&pod.namespace, 80, Page::ClientAddress)?;
        let url = format!("http://{}/", POD.ipv4);
        let seen = lab.web_site.run(|| lab::http::get(&url, lab::patience(PATIENCE)))?;
        ensure!(seen.trim() == WEB.ipv4.to_string(), "the container saw {seen:?}");
        container.end()
    });
}

fn address(ipv4: std::net::Ipv4Addr) -> ipnet::IpNet {
    ipnet::Ipv4Net::new_assert(ipv4, 24).into()
}

/// The guilty twins: without the packet rules, packets from the container's own address leave by its interface.
#[test]
fn without_its_protections_a_container_leaks() {
    test(|lab, pod| {
        for (broken, is_guilty) in [("", false), ("routes", false), ("rules", true), ("rules,routes", true)] {
            let container = Container::start(pod, "c1")?;
            let environment = [("VPN_EXEC_TEST_BREAK", broken)];
            let output = hook(&["createRuntime"], &container.state(Some(NAME)), &environment)?;
            succeed(output)?;
            lab.capture.forget()?;
            pod.namespace.run(|| {
                let socket = std::net::UdpSocket::bind((POD.ipv4, 0))?;
                // The rules refuse the packet with an error.
                let _ = socket.send_to(b"leak", (WEB.ipv4, 9));
                Ok(())
            })?;
            let leaks = lab.capture.leaks()?;
            ensure!(leaks.is_empty() != is_guilty, "broken: {broken:?}: {leaks:?}");
            container.end()?;
            require_nothing_left()?;
            // The rules of the last container stay, so the twin needs them gone.
            if !broken.contains("rules") {
                pod.namespace.run(|| Nftables::open()?.delete("vpn-exec"))?;
            }
        }
        Ok(())
    });
}

#[test]
fn only_profiles_of_the_machine_can_be_named() {
    test(|lab, pod| {
        let container = Container::start(pod, "c1")?;
        let annotated = |name| container.create(name);
        refused(&annotated("other")?, "there is no profile 'other'")?;
        refused(&annotated("../etc/passwd")?, "does not name a tunnel")?;
        refused(&annotated("/run/lab/wg0.conf")?, "does not name a tunnel")?;
        refused(&annotated("")?, "does not name a tunnel")?;
        succeed(hook(&["poststop"], &container.state(Some("../x")), &[])?)?;
        // A file of the machine's own tunnel, which only the administrator may give to a container.
        refused(&annotated("host")?, "there is no profile 'host'")?;
        succeed(hook(&["createRuntime"], &container.state(None), &[])?)?;
        ensure!(!Path::new("/run/vpn-exec").exists(), "a container without the annotation gets nothing");
        let shared = json!({"id": "c3", "pid": std::process::id(), "annotations": {"vpn-exec.tunnel": NAME}});
        refused(&hook(&["createRuntime"], &shared, &[])?, "shares the host's network")?;
        let early = json!({"id": "c4", "pid": 0, "annotations": {"vpn-exec.tunnel": NAME}});
        refused(&hook(&["createRuntime"], &early, &[])?, "has no process ID")?;
        // Docker 20.10 passes no annotations in the state.
        fs::write("/run/lab/bundle/config.json", r#"{"annotations": {"vpn-exec.tunnel": "other"}}"#)?;
        refused(&hook(&["createRuntime"], &container.state(None), &[])?, "there is no profile 'other'")?;
        require_nothing_left()?;
        succeed(hook(&["createRuntime", "host"], &container.state(None), &[])?)?;
        require_tunnel(pod)?;
        container.end()?;
        require_no_leaks(lab)
    });
}

#[test]
fn nothing_is_left_after_a_failure_or_a_kill_at_any_step() {
    lab::test_within(Duration::from_secs(300), Peer::Ours, |lab| {
        furnish(lab)?;
        let pod = Pod::start(lab)?;
        for point in fault::SET_UP {
            for fault in [point.to_owned(), format!("kill:{point}")] {
                let container = Container::start(&pod, "c1")?;
                let environment = [("VPN_EXEC_TEST_FAIL", fault.as_str())];
                let output = hook(&["createRuntime"], &container.state(Some(NAME)), &environment)?;
                ensure!(!output.status.success(), "{fault}: the container would start");
                require_nothing_left().context(fault.clone())?;
                // Its name is free, also for the same namespace.
                succeed(container.create(NAME)?).context(fault.clone())?;
                require_tunnel(&pod).context(fault)?;
                container.end()?;
                require_nothing_left()?;
            }
        }
        require_no_leaks(lab)
    });
}

#[test]
fn poststop_completes_the_end_that_a_killed_keeper_has_begun() {
    test(|lab, pod| {
        for point in fault::TAKE_DOWN {
            let container = Container::start(pod, "c1")?;
            let fault = format!("kill:{point}");
            let environment = [("VPN_EXEC_TEST_FAIL", fault.as_str())];
            succeed(hook(&["createRuntime"], &container.state(Some(NAME)), &environment)?)?;
            require_tunnel(pod)?;
            succeed(container.poststop()?).context(fault.clone())?;
            require_nothing_left().context(fault)?;
            container.end()?;
        }
        require_closed(lab, pod)
    });
}

/// A dead provider must not keep the engine waiting: its patience with hooks is limited.
#[test]
fn a_container_starts_closed_if_the_provider_does_not_answer() {
    test(|lab, pod| {
        lab.provider.stop()?;
        let container = Container::start(pod, "c1")?;
        succeed(container.create(NAME)?)?;
        ensure!(status()?["state"] == "connecting");
        require_closed(lab, pod)?;
        container.end()?;
        require_nothing_left()
    });
}

#[test]
fn a_container_resolves_the_names_of_its_cluster_and_all_others_through_the_tunnel() {
    test(|lab, pod| {
        let profile = format!("/etc/vpn-exec/{NAME}.toml");
        let text = fs::read_to_string(&profile)?;
        let networks = pod::CLUSTER_NETWORKS.map(|net| format!("\"{net}\"")).join(", ");
        fs::write(
            &profile,
            format!(
                "{text}[dns]\nfor = {{ \"cluster.local\" = [\"{}\"] }}\n[local]\nnetworks = [{networks}]\n",
                CLUSTER_RESOLVER.ipv4
            ),
        )?;
        let container = Container::start(pod, "c1")?;
        succeed(container.create(NAME)?)?;
        require_tunnel(pod)?;
        let lookup = |server: IpAddr, name: &str| {
            let found = pod.namespace.run(|| lab::dns::lookup(server, name, RecordType::A, BRIEFLY * 3));
            found.map_err(|error| anyhow::anyhow!("{name}: {error}"))
        };
        let forwarder = vpn_exec::plan::FORWARDER_ADDRESSES[0];
        ensure!(lookup(forwarder, pod::SERVICE_NAME)? == [IpAddr::from(CLUSTER_SERVICE.ipv4)]);
        ensure!(lookup(forwarder, "web.example")? == [IpAddr::from(WEB.ipv4)]);
        let asked = |server: &DnsServer| server.questions().iter().map(|question| question.name.clone()).collect();
        let (cluster, tunnel): (Vec<String>, Vec<String>) = (asked(&pod.cluster_resolver), asked(&lab.tunnel_resolver));
        ensure!(cluster.iter().all(|name| name.starts_with("service.")) && !cluster.is_empty(), "{cluster:?}");
        ensure!(tunnel.iter().all(|name| name.starts_with("web.")) && !tunnel.is_empty(), "{tunnel:?}");
        for server in [CLUSTER_RESOLVER, POD_GATEWAY] {
            ensure!(lookup(server.ipv4.into(), "web.example").is_err(), "a DNS leak to {server:?}");
        }
        let page = pod
            .namespace
            .run(|| lab::http::get(&format!("http://{}/", CLUSTER_SERVICE.ipv4), lab::patience(PATIENCE)))?;
        ensure!(page.contains("cluster"), "{page}");
        container.end()?;
        require_no_leaks(lab)
    });
}

/// Returns the engine's path of a pod's network namespace.
fn pod_path(id: &str) -> PathBuf {
    format!("/run/lab/cni-{id}").into()
}

/// Runs the network plugin as a runtime does. Returns its answer if it succeeds.
fn cni(command: &str, id: &str, pod: &Pod, more: Value) -> Result<Result<String, Value>> {
    let mut configuration = json!({
        "cniVersion": "1.1.0", "name": "cluster", "type": "vpn-exec-cni",
        "prevResult": {"cniVersion": "1.1.0", "ips": [{"address": "10.42.0.2/24"}]},
    });
    for (key, value) in more.as_object().context("an object")? {
        configuration[key] = value.clone();
    }
    let mut plugin = vpn_exec(["cni"]);
    plugin.env_clear().env("CNI_COMMAND", command).env("CNI_CONTAINERID", id).env("CNI_IFNAME", "eth0");
    if command == "ADD" || command == "CHECK" {
        let path = pod_path(id);
        plugin.env("CNI_NETNS", &path);
        if !path.exists() {
            bind_name(&pod.namespace, &path, "")?;
        }
    }
    let output = run_with_input(plugin, &configuration.to_string())?;
    let answer = String::from_utf8(output.stdout.clone())?;
    match output.status.success() {
        true => Ok(Ok(answer)),
        false => Ok(Err(serde_json::from_str(&answer).with_context(|| text_of(&output))?)),
    }
}

fn annotated(name: &str) -> Value {
    json!({"runtimeConfig": {"io.kubernetes.cri.pod-annotations": {"vpn-exec.tunnel": name}}})
}

#[test]
fn a_pod_has_the_tunnel_of_its_annotation_until_its_network_is_removed() {
    test(|lab, pod| {
        let previous = json!({"cniVersion": "1.1.0", "ips": [{"address": "10.42.0.2/24"}]});
        let done = |answer: Result<String, Value>| answer.map_err(|error| anyhow::anyhow!("{error}"));
        let without = done(cni("ADD", "pod0", pod, json!({}))?)?;
        ensure!(serde_json::from_str::<Value>(&without)? == previous && !Path::new("/run/vpn-exec").exists());

        for _ in 0..2 {
            let added = done(cni("ADD", "pod1", pod, annotated(NAME))?)?;
            ensure!(serde_json::from_str::<Value>(&added)? == previous, "{added}");
        }
        require_tunnel(pod)?;
        ensure!(done(cni("CHECK", "pod1", pod, annotated(NAME))?)?.is_empty());
        let status = status()?;
        ensure!(status["container"]["id"] == "pod1" && status["container"]["network"] == "cluster", "{status}");
        let error = cni("ADD", "pod2", pod, annotated(NAME))?.expect_err("a second pod");
        ensure!(error["code"] == 100 && error["msg"].to_string().contains("serves the pod pod1"), "{error}");
        refused(&vpn_exec(["down", NAME]).output()?, "the pod pod1 is running in the tunnel pods")?;
        ensure!(done(cni("DEL", "pod2", pod, annotated(NAME))?)?.is_empty());
        require_tunnel(pod)?;

        for _ in 0..2 {
            ensure!(done(cni("DEL", "pod1", pod, annotated("../x"))?)?.is_empty());
            require_nothing_left()?;
        }
        require_closed(lab, pod)?;
        let error = cni("CHECK", "pod1", pod, annotated(NAME))?.expect_err("removed");
        ensure!(error["code"] == 100, "{error}");
        let error = cni("ADD", "pod1", pod, annotated("other"))?.expect_err("no such profile");
        ensure!(error["msg"].to_string().contains("there is no profile 'other'"), "{error}");
        require_no_leaks(lab)
    });
}

#[test]
fn the_tunnel_of_a_pod_that_is_gone_does_not_stay() {
    test(|lab, pod| {
        let done = |answer: Result<String, Value>| answer.map_err(|error| anyhow::anyhow!("{error}"));
        done(cni("ADD", "pod1", pod, annotated(NAME))?)?;
        // The engine removes the pod, and crashes before DEL. The next pod need not wait for the keeper.
        remove_name(&pod_path("pod1"))?;
        done(cni("ADD", "pod2", pod, annotated(NAME))?)?;
        require_tunnel(pod)?;
        ensure!(status()?["container"]["id"] == "pod2");
        remove_name(&pod_path("pod2"))?;
        require_nothing_left()?;
        require_closed(lab, pod)
    });
}

#[test]
fn garbage_collection_removes_the_tunnels_of_unknown_attachments() {
    test(|lab, pod| {
        let done = |answer: Result<String, Value>| answer.map_err(|error| anyhow::anyhow!("{error}"));
        let valid = |id: &str| json!({"cni.dev/valid-attachments": [{"containerID": id, "ifname": "eth0"}]});
        done(cni("ADD", "pod1", pod, annotated(NAME))?)?;
        done(cni("GC", "", pod, valid("pod1"))?)?;
        let mut other = valid("pod7");
        other["name"] = json!("another network");
        done(cni("GC", "", pod, other)?)?;
        require_tunnel(pod)?;
        done(cni("GC", "", pod, valid("pod7"))?)?;
        require_nothing_left()?;
        done(cni("STATUS", "", pod, json!({"tunnel": NAME}))?)?;
        let error = cni("STATUS", "", pod, json!({"tunnel": "other"}))?.expect_err("no such profile");
        ensure!(error["code"] == 50, "{error}");
        let versions = done(cni("VERSION", "", pod, json!({}))?)?;
        ensure!(versions.contains("\"1.1.0\"") && versions.contains("\"1.0.0\""), "{versions}");
        require_no_leaks(lab)
    });
}

#[test]
fn the_hooks_of_the_cdi_file_make_the_tunnel() {
    test(|lab, pod| {
        fs::write("/etc/vpn-exec/broken.toml", "wireguard = \"/nonexistent\"\n")?;
        let mut command = vpn_exec(["cdi", "--resolv-conf-dir", "/run/lab/cdi"]);
        let text = succeed(command.output()?)?;
        let file: Value = serde_json::from_str(&text)?;
        ensure!(file["kind"] == "vpn-exec.io/tunnel" && file["devices"].as_array().map(Vec::len) == Some(1), "{text}");
        let edits = &file["devices"][0]["containerEdits"];
        let resolv_conf = fs::read_to_string(edits["mounts"][0]["hostPath"].as_str().context("a path")?)?;
        ensure!(resolv_conf.contains("nameserver 10.64.0.1"), "{resolv_conf}");
        let container = Container::start(pod, "c1")?;
        let create = &edits["hooks"][0];
        ensure!(create["path"].as_str().is_some_and(|path| path.starts_with('/')), "{create}");
        let arguments: Vec<&str> =
            create["args"].as_array().context("arguments")?.iter().skip(2).filter_map(Value::as_str).collect();
        succeed(hook(&arguments, &container.state(None), &[])?)?;
        require_tunnel(pod)?;
        refused(&vpn_exec(["cdi", "broken"]).output()?, "/nonexistent")?;
        container.end()?;
        require_no_leaks(lab)
    });
}
