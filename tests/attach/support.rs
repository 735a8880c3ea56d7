//! The pod of a test, its sidecar, and the packets on the pod's cable.

use std::net::{IpAddr, SocketAddr};
use std::path::Path;
use std::process::{Child, Output, Stdio};
use std::time::Duration;

use lab::agent::Agent;
use lab::launcher::{binary, errors_of, output_of, run};
use lab::pod::CLUSTER_NETWORKS;
use lab::{Context, Lab, PROVIDER, Packet, Pod, Result, ensure, variables};
use vpn_exec::linux::netlink::Netlink;

/// The time in which an action succeeds that works at all.
pub(crate) const WORKS: Duration = Duration::from_secs(30);

/// A process of `vpn-exec attach` that stays, and ends with this value.
pub(crate) struct Sidecar(pub(crate) Option<Child>);

impl Sidecar {
    /// Starts the sidecar without waiting for it.
    pub(crate) fn start(pod: &Pod, file: &Path, options: &[&str]) -> Result<Self> {
        Self::start_with(pod, file, options, (variables::BREAK, ""))
    }

    /// Starts the sidecar without protections ([`vpn_exec::fault::PROTECTIONS`]).
    pub(crate) fn broken(pod: &Pod, file: &Path, protections: &str) -> Result<Self> {
        Self::start_with(pod, file, &[], (variables::BREAK, protections))
    }

    /// Starts the sidecar with a variable of [`vpn_exec::fault`].
    pub(crate) fn start_with(
        pod: &Pod,
        file: &Path,
        options: &[&str],
        (variable, value): (&str, &str),
    ) -> Result<Self> {
        let file = file.to_str().context("a path")?;
        let words = [binary().to_str().context("a path")?, "attach", file, "--backend", lab::backend()];
        let mut command = pod.sidecar(words.iter().chain(options));
        command.env(variable, value);
        let child = command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::piped()).spawn()?;
        Ok(Self(Some(child)))
    }

    /// Returns the process ID of vpn-exec, which the set-up of the container has become.
    pub(crate) fn pid(&self) -> i32 {
        self.0.as_ref().map_or(0, |child| child.id().cast_signed())
    }

    /// Sends a signal, waits for the end, and returns the exit status and the messages.
    pub(crate) fn end_by(self, signal: nix::sys::signal::Signal) -> Result<(Option<i32>, String)> {
        nix::sys::signal::kill(nix::unistd::Pid::from_raw(self.pid()), signal)?;
        self.end()
    }

    /// Waits for the end, and returns the exit status and the messages.
    pub(crate) fn end(mut self) -> Result<(Option<i32>, String)> {
        let output = output_of(self.0.take().context("a process")?)?;
        Ok((output.status.code(), errors_of(&output)))
    }
}

impl Drop for Sidecar {
    fn drop(&mut self) {
        if let Some(mut child) = self.0.take() {
            let _ = child.kill();
            let _ = child.wait();
        }
    }
}

/// Runs vpn-exec as a process of the sidecar until it ends.
pub(crate) fn sidecar_runs(pod: &Pod, arguments: &[&str]) -> Result<Output> {
    run(pod.sidecar([binary().to_str().context("a path")?].iter().chain(arguments)))
}

/// Returns the word and the exit status of `attach --check`.
pub(crate) fn check(pod: &Pod) -> Result<(String, Option<i32>)> {
    let output = sidecar_runs(pod, &["attach", "--check"])?;
    Ok((String::from_utf8_lossy(&output.stdout).trim().to_owned(), output.status.code()))
}

/// Waits until `attach --check` succeeds.
pub(crate) fn wait_until_up(pod: &Pod) -> Result<()> {
    lab::wait_until(lab::patience(WORKS), "the tunnel is not up", || Ok(check(pod)?.1 == Some(0)))
}

/// Starts the agent in the application's container.
pub(crate) fn application(pod: &Pod) -> Result<Agent> {
    Agent::start(&mut pod.application(["env"]))?.begun()
}

/// The options that name the networks of the pod and its cluster.
pub(crate) fn cluster() -> Vec<&'static str> {
    CLUSTER_NETWORKS.iter().flat_map(|network| ["--local", network]).collect()
}

/// Returns the act that gets a page.
pub(crate) fn get(address: impl Into<IpAddr>) -> String {
    format!("get http://{}/", SocketAddr::new(address.into(), 80))
}

/// Returns the packets from the pod that neither are encrypted packets to the provider nor stay on the cable: those
/// that a leak would consist of. Packets to the pod's cluster count as well.
pub(crate) fn left_the_pod(lab: &Lab) -> Result<Vec<Packet>> {
    let cable = lab.host.run(|| Netlink::open()?.link_index(&"pod0".parse().expect("a name")))?;
    let packets = lab.capture.on(cable)?;
    let is_foreign = |packet: &Packet| {
        let Some(flow) = &packet.flow else { return false };
        let to = flow.destination.ip();
        let is_encrypted = PROVIDER.both().contains(&to) && flow.destination.port() == lab::PROVIDER_PORT;
        !packet.outgoing && !is_encrypted && !to.is_multicast()
    };
    Ok(packets.into_iter().filter(is_foreign).collect())
}

/// Requires that no packet has left the pod since the capture was last told to forget, except to these addresses.
pub(crate) fn require_closed(lab: &Lab, except: &[IpAddr]) -> Result<()> {
    let left = left_the_pod(lab)?;
    let leaks: Vec<&Packet> = left
        .iter()
        .filter(|packet| packet.flow.as_ref().is_some_and(|flow| !except.contains(&flow.destination.ip())))
        .collect();
    ensure!(leaks.is_empty(), "these packets left the pod: {leaks:?}");
    Ok(())
}
