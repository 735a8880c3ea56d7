//! A client of the Container Runtime Interface in place of the kubelet
//! (<https://github.com/kubernetes/cri-api/blob/release-1.26/pkg/apis/runtime/v1/api.proto>): messages by hand, and
//! curl(1) for HTTP/2.

use std::fs;
use std::os::unix::fs::symlink;
use std::path::Path;
use std::process::Command;

use anyhow::{Context, Result, ensure};
use lab::launcher::{agent_binary, binary, stdout};
use lab::{require_program, require_users, variables};

use crate::containerd::Containerd;
use crate::engine::STATE;
use crate::images;

/// A message of protobuf (<https://protobuf.dev/programming-guides/encoding/>), as far as CRI needs it.
#[derive(Clone, Debug, Default)]
pub(crate) struct Message(Vec<u8>);

impl Message {
    fn varint(&mut self, mut value: u64) {
        while value >= 0x80 {
            self.0.push((value & 0x7f) as u8 | 0x80);
            value >>= 7;
        }
        self.0.push(value as u8);
    }

    /// Adds a number, an enumeration or a boolean.
    pub(crate) fn number(mut self, field: u64, value: u64) -> Self {
        self.varint(field << 3);
        self.varint(value);
        self
    }

    fn bytes(mut self, field: u64, value: &[u8]) -> Self {
        self.varint(field << 3 | 2);
        self.varint(value.len() as u64);
        self.0.extend(value);
        self
    }

    /// Adds a string.
    pub(crate) fn text(self, field: u64, value: &str) -> Self {
        self.bytes(field, value.as_bytes())
    }

    /// Adds a list of strings.
    pub(crate) fn texts<'a>(self, field: u64, values: impl IntoIterator<Item = &'a str>) -> Self {
        values.into_iter().fold(self, |message, value| message.text(field, value))
    }

    /// Adds a message.
    pub(crate) fn message(self, field: u64, value: &Message) -> Self {
        self.bytes(field, &value.0)
    }
}

/// A field of a received message.
enum Value<'a> {
    Number(u64),
    Bytes(&'a [u8]),
}

/// Returns the fields of a message.
fn fields(mut rest: &[u8]) -> Result<Vec<(u64, Value<'_>)>> {
    fn varint(rest: &mut &[u8]) -> Result<u64> {
        let mut value = 0;
        for shift in (0..64).step_by(7) {
            let (byte, others) = rest.split_first().context("the message ends in a number")?;
            *rest = others;
            value |= u64::from(byte & 0x7f) << shift;
            if byte & 0x80 == 0 {
                break;
            }
        }
        Ok(value)
    }
    let mut found = Vec::new();
    while !rest.is_empty() {
        let key = varint(&mut rest)?;
        let value = match key & 7 {
            0 => Value::Number(varint(&mut rest)?),
            2 => {
                let length = varint(&mut rest)? as usize;
                let (bytes, others) = rest.split_at_checked(length).context("the message ends in a field")?;
                rest = others;
                Value::Bytes(bytes)
            }
            other => anyhow::bail!("no field of CRI has the wire type {other}"),
        };
        found.push((key >> 3, value));
    }
    Ok(found)
}

/// Returns the bytes of a field, or none.
fn bytes(message: &[u8], number: u64) -> Result<&[u8]> {
    let found = fields(message)?.into_iter().find_map(|field| match field {
        (field, Value::Bytes(bytes)) if field == number => Some(bytes),
        _ => None,
    });
    Ok(found.unwrap_or_default())
}

fn text(message: &[u8], number: u64) -> Result<String> {
    Ok(String::from_utf8_lossy(bytes(message, number)?).into_owned())
}

fn number(message: &[u8], number: u64) -> Result<u64> {
    let found = fields(message)?.into_iter().find_map(|field| match field {
        (field, Value::Number(value)) if field == number => Some(value),
        _ => None,
    });
    Ok(found.unwrap_or_default())
}

/// The result of a command in a container.
#[derive(Debug)]
pub(crate) struct Executed {
    pub(crate) status: u64,
    pub(crate) output: String,
}

/// containerd's CRI, with a network of pods by the CNI plugins `bridge` and `host-local`.
#[derive(Debug)]
pub(crate) struct Cri(Containerd);

/// A container, in the terms of a pod's manifest.
#[derive(Clone, Debug, Default)]
pub(crate) struct Container<'a> {
    pub(crate) name: &'a str,
    pub(crate) image: &'a str,
    pub(crate) command: Vec<&'a str>,
    pub(crate) environment: Vec<(&'a str, &'a str)>,
    /// Paths on the host and in the container.
    pub(crate) mounts: Vec<(&'a str, &'a str)>,
    /// `capabilities.add`; all others are dropped.
    pub(crate) capabilities: Vec<&'a str>,
}

/// The namespaces of a pod: the pod's own network (0), and a PID namespace for each container (1).
fn namespaces() -> Message {
    Message::default().number(1, 0).number(2, 1).number(3, 0)
}

impl Cri {
    /// Starts containerd. `plugins` are the CNI plugins after `bridge`.
    ///
    /// # Errors
    /// [`lab::Skip`] where it cannot run.
    pub(crate) fn start(plugins: &[serde_json::Value]) -> Result<Self> {
        require_users()?;
        for program in ["containerd", "ctr", "curl", "runc", "/usr/lib/cni/bridge"] {
            require_program(program, variables::REQUIRE_ENGINES)?;
        }
        let state = Path::new(STATE);
        for directory in ["cni", "logs"] {
            fs::create_dir_all(state.join(directory))?;
        }
        // Debian's plugins, and vpn-exec's by its name.
        let plugins_at = state.join("plugins");
        fs::create_dir(&plugins_at)?;
        for plugin in ["loopback", "bridge", "host-local"] {
            symlink(Path::new("/usr/lib/cni").join(plugin), plugins_at.join(plugin))?;
        }
        symlink(binary(), plugins_at.join("vpn-exec-cni"))?;
        let bridge = serde_json::json!({
            "type": "bridge", "bridge": "cni0", "isGateway": true, "ipMasq": true,
            "ipam": {
                "type": "host-local", "dataDir": "/run/engine/addresses",
                "ranges": [[{ "subnet": "10.44.0.0/24" }], [{ "subnet": "fd2c::/64" }]],
                "routes": [{ "dst": "0.0.0.0/0" }, { "dst": "::/0" }],
            },
        });
        let chain: Vec<_> = [bridge].iter().chain(plugins).cloned().collect();
        let list = serde_json::json!({ "cniVersion": "1.0.0", "name": "pods", "plugins": chain });
        fs::write(state.join("cni/10-pods.conflist"), list.to_string())?;
        for parameter in ["ipv4/ip_forward", "ipv6/conf/all/forwarding"] {
            vpn_exec::linux::sysctl::set(&format!("net/{parameter}"), "1")?;
        }
        let more = format!(
            "[plugins.\"io.containerd.grpc.v1.cri\"]\nsandbox_image = \"{}\"\nrestrict_oom_score_adj = true\n\
             [plugins.\"io.containerd.grpc.v1.cri\".cni]\nconf_dir = \"{STATE}/cni\"\nbin_dir = \"{STATE}/plugins\"\n",
            images::APP
        );
        let containerd = Containerd::start(state, &more)?;
        let cri = Self(containerd);
        for image in [images::app()?, images::vpn_exec()?] {
            let mut import = Command::new("ctr");
            import.arg("-a").arg(cri.0.socket()).args(["-n", "k8s.io", "images", "import"]).arg(image);
            stdout(import)?;
        }
        Ok(cri)
    }

    /// Calls a method of the runtime service.
    fn call(&self, method: &str, request: &Message) -> Result<Vec<u8>> {
        static CALLS: std::sync::atomic::AtomicU32 = std::sync::atomic::AtomicU32::new(0);

        let number = CALLS.fetch_add(1, std::sync::atomic::Ordering::Relaxed);
        let files = ["request", "headers", "answer"].map(|name| Path::new(STATE).join(format!("{name}-{number}")));
        // gRPC over HTTP/2: a byte for "not compressed", and the length.
        let length = u32::try_from(request.0.len())?.to_be_bytes();
        fs::write(&files[0], [&[0][..], &length, &request.0].concat())?;
        let mut curl = Command::new("curl");
        curl.args(["-sS", "--max-time", "60", "--http2-prior-knowledge", "--unix-socket"]).arg(self.0.socket());
        curl.args(["-H", "content-type: application/grpc", "-H", "te: trailers", "--data-binary"]);
        curl.arg(format!("@{}", files[0].display())).arg("-D").arg(&files[1]).arg("-o").arg(&files[2]);
        curl.arg(format!("http://localhost/runtime.v1.RuntimeService/{method}"));
        stdout(curl)?;
        let headers = fs::read_to_string(&files[1])?;
        ensure!(headers.lines().any(|line| line.trim_end() == "grpc-status: 0"), "{method} fails: {headers}");
        let answer = fs::read(&files[2])?;
        Ok(answer.get(5..).unwrap_or_default().to_vec())
    }

    /// Runs a pod's sandbox.
    pub(crate) fn run_pod(&self, annotations: &[(&str, &str)], servers: &[&str]) -> Result<Pod<'_>> {
        let security = Message::default().message(1, &namespaces()).message(9, &Message::default());
        let metadata = Message::default().text(1, "pod").text(2, "1").text(3, "default");
        let mut config = Message::default()
            .message(1, &metadata)
            .text(2, "pod")
            .text(3, "/run/engine/logs")
            .message(4, &Message::default().texts(1, servers.iter().copied()));
        for (name, value) in annotations {
            config = config.message(7, &Message::default().text(1, name).text(2, value));
        }
        let config = config.message(8, &Message::default().message(2, &security));
        let answer = self.call("RunPodSandbox", &Message::default().message(1, &config))?;
        Ok(Pod { cri: self, id: text(&answer, 1)?, config })
    }
}

/// A pod.
#[derive(Debug)]
pub(crate) struct Pod<'a> {
    cri: &'a Cri,
    id: String,
    config: Message,
}

impl Pod<'_> {
    /// Returns the pod's first address.
    pub(crate) fn address(&self) -> Result<String> {
        let answer = self.cri.call("PodSandboxStatus", &Message::default().text(1, &self.id))?;
        text(bytes(bytes(&answer, 1)?, 5)?, 1)
    }

    /// Creates and starts a container with the security context of the "restricted" standard: unprivileged, with the
    /// default seccomp profile, `allowPrivilegeEscalation: false` and a read-only root.
    pub(crate) fn start(&self, container: &Container<'_>) -> Result<String> {
        let capabilities = Message::default().texts(1, container.capabilities.iter().copied()).text(2, "ALL");
        let read_only = ["/proc/bus", "/proc/fs", "/proc/irq", "/proc/sys", "/proc/sysrq-trigger"];
        let security = Message::default()
            .message(1, &capabilities)
            .message(3, &namespaces())
            .message(5, &Message::default().number(1, 0))
            .number(7, 1)
            .number(11, 1)
            .texts(13, ["/proc/kcore", "/proc/keys"])
            .texts(14, read_only)
            .message(15, &Message::default());
        let mut config = Message::default()
            .message(1, &Message::default().text(1, container.name))
            .message(2, &Message::default().text(1, container.image))
            .texts(3, container.command.iter().copied());
        for (name, value) in &container.environment {
            config = config.message(6, &Message::default().text(1, name).text(2, value));
        }
        for (host, inside) in &container.mounts {
            config = config.message(7, &Message::default().text(1, inside).text(2, host).number(3, 1));
        }
        let config =
            config.text(11, &format!("{}.log", container.name)).message(15, &Message::default().message(2, &security));
        let request = Message::default().text(1, &self.id).message(2, &config).message(3, &self.config);
        let id = text(&self.cri.call("CreateContainer", &request)?, 1)?;
        self.cri.call("StartContainer", &Message::default().text(1, &id))?;
        Ok(id)
    }

    /// Starts the application, whose programs are the host's.
    pub(crate) fn start_application(
        &self,
        name: &str,
        command: &[&str],
        environment: &[(&str, &str)],
    ) -> Result<String> {
        let agent = agent_binary().to_string_lossy().into_owned();
        let mounts = vec![("/usr", "/usr"), (&agent[..], &agent[..])];
        self.start(&Container {
            name,
            image: images::APP,
            command: command.to_vec(),
            environment: environment.to_vec(),
            mounts,
            capabilities: Vec::new(),
        })
    }

    /// Runs a command in a container, as probes do.
    pub(crate) fn execute(&self, container: &str, command: &[&str]) -> Result<Executed> {
        let request = Message::default().text(1, container).texts(2, command.iter().copied()).number(3, 20);
        let answer = self.cri.call("ExecSync", &request)?;
        let output = format!("{}{}", text(&answer, 1)?, text(&answer, 2)?);
        Ok(Executed { status: number(&answer, 3)?, output: output.trim_end().to_owned() })
    }

    /// Stops a container: SIGTERM, and SIGKILL after `seconds`.
    pub(crate) fn stop(&self, container: &str, seconds: u64) -> Result<()> {
        self.cri.call("StopContainer", &Message::default().text(1, container).number(2, seconds)).map(drop)
    }

    /// Returns the exit status of a container that has ended.
    pub(crate) fn exit_status(&self, container: &str) -> Result<Option<u64>> {
        const EXITED: u64 = 2;

        let answer = self.cri.call("ContainerStatus", &Message::default().text(1, container))?;
        let status = bytes(&answer, 1)?;
        Ok(if number(status, 3)? == EXITED { Some(number(status, 7)?) } else { None })
    }

    /// Removes the pod.
    pub(crate) fn remove(self) -> Result<()> {
        self.cri.call("StopPodSandbox", &Message::default().text(1, &self.id))?;
        self.cri.call("RemovePodSandbox", &Message::default().text(1, &self.id)).map(drop)
    }
}
