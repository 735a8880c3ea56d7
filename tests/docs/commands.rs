//! Every published command is accounted for: a test runs it, or a reason says why none does. All of vpn-exec's are
//! valid.

use std::collections::BTreeSet;
use std::ffi::OsString;

use vpn_exec::cli::{Cli, NotParsed};

use crate::examples::RUN;
use crate::pages::{page, published};

/// The published commands that no test here runs, with the place of their test or the reason.
const NOT_RUN: [(&str, &str); 80] = [
    ("vpn-exec desktop firefox --tunnel mullvad", "needs Mozilla's Firefox; tests/desktop.rs and tests/rootless/"),
    ("vpn-exec desktop firefox --tunnel mullvad --remove", "the same"),
    ("cargo run --release --example demo", ".ci/run runs it"),
    ("cargo test", "this runs in it"),
    ("cargo build --release", ".ci/run builds it"),
    ("benches/run --update", "takes minutes; tests/docs/benchmarks.rs checks its output"),
    ("cargo bench --bench launch", "takes minutes"),
    ("cargo bench --bench standing", "takes minutes"),
    ("cargo bench --bench rootless", "takes minutes"),
    ("cargo bench --bench sidecar", "takes minutes"),
    ("cargo bench --bench relay", "takes minutes"),
    ("cargo bench --bench embedded", "takes minutes"),
    ("sudo install -m 755 target/release/vpn-exec /usr/local/bin/", "changes the machine"),
    ("sudo install -D -m 600 mullvad.conf /etc/wireguard/mullvad.conf", "changes the machine"),
    ("sudo apt install rustup", "changes the machine"),
    ("rustup default stable", "changes the machine"),
    ("sudo systemctl enable --now vpn-exec@mullvad", "tests/vm/inside/cases/keeper"),
    ("sudo vpn-exec unit transmission-daemon --tunnel mullvad --install", "tests/vm/inside/cases/confined"),
    ("sudo systemctl restart transmission-daemon", "tests/vm/inside/cases/confined"),
    ("systemctl status vpn-exec@mullvad | grep Status", "tests/vm/inside/cases/keeper"),
    ("sudo systemctl daemon-reload", "tests/vm/inside/cases/confined"),
    ("sudo rm /etc/systemd/system/transmission-daemon.service.d/50-vpn-exec.conf", "changes the machine"),
    (
        "sudo rm -f /etc/systemd/system/vpn-exec@mullvad.service.wants/transmission-daemon.service",
        "changes the machine",
    ),
    ("sudo tcpdump -ni eth0 'port 53 or port 853'", "tests/leaks/ captures packets itself"),
    (
        "sudo nft 'add table inet test; add chain inet test out { type filter hook output priority 0; }; \
         add rule inet test out ip daddr 198.51.100.1 drop'",
        "the test stops the provider instead",
    ),
    ("sudo nft delete table inet test", "the same"),
    ("sudo kill -9 \"$(vpn-exec status mullvad --json | jq .keeper)\"", "tests/lifecycle/ kills keepers"),
    ("sudo vpn-exec mullvad --user crawler -- /srv/crawler/run", "needs a user of that name; tests/program/"),
    ("vpn-exec mullvad.conf --local 192.168.1.10/32 -- curl http://192.168.1.10/", "tests/local/"),
    (
        "vpn-exec mullvad.conf --lan --dns-for home.arpa=192.168.1.1 -- curl http://nas.home.arpa/",
        "tests/local/split_dns/",
    ),
    ("vpn-exec mullvad.conf --host-port 5432 -- psql --host host.internal", "tests/host_ports.rs"),
    ("vpn-exec mullvad.conf --host-port 5432 -- ./crawl --database host.internal:5432", "the same"),
    (
        "sops -d mullvad.conf.enc | sudo vpn-exec --config - --name mullvad -- curl https://ifconfig.me",
        "needs sops; tests/secrets.rs reads files from pipes",
    ),
    (
        "vpn-exec completions bash | sudo tee /usr/share/bash-completion/completions/vpn-exec",
        "changes the machine; tests/cli.rs runs completions",
    ),
    ("vpn-exec man | man -l -", "opens a pager; tests/cli.rs prints the page"),
    (
        "sed 's:/usr/bin/:/usr/local/bin/:' units/vpn-exec@.service | sudo tee /etc/systemd/system/vpn-exec@.service",
        "changes the machine; examples.rs runs the first half",
    ),
    ("sudo mkdir -p /etc/cdi", "changes the machine"),
    ("sudo sh -c 'vpn-exec cdi >/etc/cdi/vpn-exec.json'", "changes the machine; tests/container_hooks/"),
    (
        "sudo podman run --device vpn-exec.io/tunnel=mullvad --cap-drop NET_RAW docker.io/library/alpine wget -qO- \
         https://ifconfig.me",
        "needs an image; tests/containers/",
    ),
    (
        "sudo docker run --device vpn-exec.io/tunnel=mullvad --cap-drop NET_RAW alpine wget -qO- https://ifconfig.me",
        "needs an image; no test has Docker's CDI",
    ),
    (
        "sudo podman run --annotation vpn-exec.tunnel=mullvad --cap-drop NET_RAW --dns 10.64.0.1 \
         docker.io/library/alpine wget -qO- https://ifconfig.me",
        "needs an image; tests/containers/",
    ),
    ("sudo ln -s /usr/local/bin/vpn-exec /opt/cni/bin/vpn-exec-cni", "changes the machine"),
    ("sudo systemctl enable --now vpn-exec@airvpn", "tests/vm/inside/cases/keeper"),
    ("sudo vpn-exec unit transmission-daemon --tunnel airvpn --install", "tests/vm/inside/cases/confined"),
    ("deploy/image/build", "builds for minutes"),
    ("podman load -i target/image/vpn-exec-0.1.0-amd64.tar", "needs the built image"),
    ("sudo podman load -i target/image/vpn-exec-0.1.0-amd64.tar", "the same"),
    ("sudo docker load -i target/image/vpn-exec-0.1.0-amd64.tar", "the same"),
    (
        "skopeo copy oci-archive:target/image/vpn-exec-0.1.0-amd64.tar \
         docker-archive:vpn-exec.tar:localhost/vpn-exec:0.1.0",
        "the same",
    ),
    ("sudo docker load -i vpn-exec.tar", "the same"),
    ("podman push localhost/vpn-exec:0.1.0 registry.example.org/vpn-exec:0.1.0", "needs a registry"),
    ("sudo k3s ctr images import vpn-exec-0.1.0-amd64.tar", "needs k3s"),
    ("sudo chown root: wg0.conf && sudo chmod 600 wg0.conf", "changes the machine"),
    ("kubectl create secret generic wg --from-file=wg0.conf=airvpn.conf", "needs a cluster"),
    ("kubectl apply -k deploy/kubernetes/base", "needs a cluster; deploy/check builds the overlays"),
    ("kubectl apply -f deploy/admission/settings.yaml", "needs a cluster; deploy/admission/test/run evaluates it"),
    ("kubectl apply -f deploy/admission/validating.yaml", "the same"),
    ("kubectl apply -f deploy/admission/mutating.yaml", "the same"),
    ("podman pod create --name torrent --publish 9091:9091 --dns 10.64.0.1", "tests/containers/ runs such a pod"),
    (
        "podman create --init-ctr always --pod torrent --cap-drop all --cap-add NET_ADMIN --read-only --volume \
         ./wg0.conf:/etc/wireguard/wg0.conf:ro localhost/vpn-exec:0.1.0 attach /etc/wireguard/wg0.conf --open 51413 \
         --closed",
        "the same; kube_play.rs has such an init container",
    ),
    (
        "podman create --pod torrent --name vpn --cap-drop all --cap-add NET_ADMIN --read-only --device /dev/net/tun \
         --volume ./wg0.conf:/etc/wireguard/wg0.conf:ro localhost/vpn-exec:0.1.0 attach /etc/wireguard/wg0.conf \
         --open 51413",
        "the same",
    ),
    (
        "podman create --pod torrent --cap-drop NET_RAW --volume downloads:/downloads \
         lscr.io/linuxserver/transmission:4.0.6",
        "needs a registry",
    ),
    ("podman pod start torrent", "the same"),
    ("kubectl describe pod -l app=torrent", "needs a cluster"),
    ("kubectl logs deploy/torrent -c vpn-exec", "the same"),
    ("kubectl exec deploy/torrent -c vpn-exec -- /vpn-exec status", "the same"),
    ("kubectl exec deploy/torrent -c vpn-exec -- /vpn-exec attach --check", "the same"),
    ("kubectl exec deploy/torrent -c transmission -- curl https://ifconfig.me", "the same"),
    ("kubectl exec deploy/torrent -c transmission -- cat /etc/resolv.conf", "the same"),
    ("docker compose -f deploy/compose.yaml exec transmission curl https://ifconfig.me", "needs a registry"),
    ("docker compose -f deploy/compose.yaml stop vpn", "the same"),
    ("docker compose -f deploy/compose.yaml exec transmission curl --max-time 10 https://ifconfig.me", "the same"),
    ("docker compose -f deploy/compose.yaml up -d --force-recreate", "the same"),
    ("docker compose -f deploy/compose.yaml up -d", "needs a registry; deploy/check checks the file"),
    ("sudo podman secret create wg0.conf airvpn.conf", "changes the machine"),
    ("sudo cp deploy/quadlet/torrent* /etc/containers/systemd/", "changes the machine"),
    ("sudo systemctl start torrent-pod", "needs a registry; deploy/check checks the units"),
    ("podman kube play deploy/kubernetes/secret.example.yaml", "the file has placeholders"),
    ("podman kube play --network podman deploy/podman/pod.yaml", "needs a registry; deploy/check checks the file"),
    (
        "sudo podman run --rm --network ns:/run/netns/mullvad --dns 10.64.0.1 docker.io/curlimages/curl \
         https://ifconfig.me",
        "needs a registry; tests/containers/ joins tunnels by their names",
    ),
];

#[test]
fn every_published_command_is_accounted_for() {
    let pages = published();
    let published: BTreeSet<&str> = pages.iter().flat_map(|page| page.commands()).collect();
    let known: BTreeSet<&str> = RUN.into_iter().chain(NOT_RUN.iter().map(|(command, _)| *command)).collect();
    let unknown: Vec<_> = published.difference(&known).collect();
    assert!(unknown.is_empty(), "neither run by a test nor explained here: {unknown:#?}");
    let gone: Vec<_> = known.difference(&published).collect();
    assert!(gone.is_empty(), "no document has these any more: {gone:#?}");
}

/// Splits a command as a shell does, as far as the documents need it.
fn words(command: &str) -> Vec<String> {
    let mut words = Vec::new();
    let mut word = String::new();
    let mut quote = None;
    for c in command.chars() {
        match (quote, c) {
            (Some(open), c) if c == open => quote = None,
            (None, '\'' | '"') => quote = Some(c),
            (None, ' ') => words.extend(Some(std::mem::take(&mut word)).filter(|word| !word.is_empty())),
            _ => word.push(c),
        }
    }
    words.extend(Some(word).filter(|word| !word.is_empty()));
    words
}

/// Returns the calls of vpn-exec in a command.
fn calls(command: &str) -> Vec<Vec<String>> {
    let flat = command.replace("\"$(", "| ").replace(")\"", " |");
    let words = words(&flat);
    let parts = words.split(|word| matches!(word.as_str(), "|" | "&"));
    let calls = parts.filter_map(|part| {
        let begin = part.iter().position(|word| word == "vpn-exec" || word.ends_with("/bin/vpn-exec"))?;
        let is_called = part[..begin].iter().all(|word| word == "sudo" || word.starts_with("--preserve-env="));
        is_called.then(|| part[begin..].to_vec())
    });
    calls.collect()
}

#[test]
fn published_commands_and_units_have_valid_command_lines() {
    let mut checked = 0;
    for page in published() {
        let units = page.blocks("ini").into_iter().flat_map(str::lines);
        let units = units.filter_map(|line| line.strip_prefix("ExecStart="));
        for command in page.commands().into_iter().chain(units) {
            for call in calls(command) {
                let parsed = Cli::parse_checked(call.iter().map(OsString::from), Vec::new);
                if let Err(NotParsed::Invalid(failure)) = parsed {
                    panic!("{}: {command}: {failure}", page.path);
                }
                checked += 1;
            }
        }
    }
    assert!(checked > 30, "the documents have only {checked} commands");
}

#[test]
fn published_profiles_are_valid() {
    let pages = published();
    let profiles: Vec<_> =
        pages.iter().flat_map(|page| page.blocks("toml").into_iter().map(move |text| (page, text))).collect();
    assert!(profiles.len() >= 4, "the documents have only {} profiles", profiles.len());
    for (page, profile) in profiles {
        let parsed = vpn_exec::config::profile::parse("profile.toml", profile.as_bytes());
        assert!(parsed.is_ok(), "{}: {profile}", page.path);
    }
}

/// `nix/tests/` evaluates the guide's.
#[test]
fn the_readme_configures_nixos_as_the_guide_does() {
    let (readme, guide) = (page("README.md"), page("docs/how-to/nixos.md"));
    let lines: Vec<&str> = readme.blocks("nix").into_iter().flat_map(str::lines).collect();
    assert!(!lines.is_empty(), "the README has no example for NixOS");
    for line in lines {
        assert!(guide.blocks("nix")[0].lines().any(|other| other == line), "{line}");
    }
}

#[test]
fn the_readme_begins_with_the_demonstration_and_the_tests() {
    let readme = page("README.md");
    let commands = readme.commands();
    assert_eq!(commands[..2], ["cargo run --release --example demo", "cargo test"]);
}
