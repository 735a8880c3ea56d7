//! User namespaces that a program makes inside, as browsers' sandboxes, bubblewrap and flatpak do. They work, and have
//! no power over the tunnel's namespaces, which another user namespace owns.

use std::collections::BTreeSet;

use anyhow::{Result, ensure};
use lab::agent::Agent;
use lab::{Lab, PROVIDER, Peer, WEB};

use crate::{PATIENCE, User, output};

/// Makes a user namespace with all capabilities, and a mount namespace of its own, and runs Python there. No user has
/// to be mapped for that, which the user ID 0 could not be (user_namespaces(7)).
const NESTED: [&str; 6] = ["unshare", "--user", "--keep-caps", "--mount", "/usr/bin/python3", "-c"];

/// Prints a line for each attempt that did not fail as it must, and whether there were many. The first line tells
/// whether it has capabilities: without any, all would fail.
const ATTEMPTS: &str = r#"
import ctypes, errno, os, re, subprocess
libc = ctypes.CDLL(None, use_errno=True)
made = 0
def read(path):
    with open(path) as file: return file.read()
def result(value):
    return 'done' if value == 0 else errno.errorcode[ctypes.get_errno()]
def must(what, got, allowed):
    global made
    made += 1
    if got not in allowed: print(f'{what}: {got}')
def run(line):
    done = subprocess.run(line.split(), capture_output=True, text=True)
    said = done.stderr.strip()
    denied = re.search('Operation not permitted|permission denied', said, re.I)
    return 'done' if done.returncode == 0 else 'denied' if denied else said
print('capabilities', re.search(r'CapEff:\s*(\S+)', read('/proc/self/status')).group(1).lstrip('0') != '')
for line in [
    'ip link set wg0 down', 'ip link set wg0 mtu 1280', 'ip link delete host0', 'ip link delete wg0',
    'ip link set host0 netns 1', 'ip link add dummy type veth', 'ip route add 198.51.100.0/26 dev host0',
    'ip route replace default dev host0', 'ip -6 route replace default dev host0', 'ip route flush table main',
    'ip rule add from all lookup 99', 'ip address add 192.0.2.9/32 dev host0', 'ip address flush dev wg0',
    'ip neigh add 192.0.2.9 lladdr 02:00:00:00:00:01 dev host0',
    'nft flush ruleset', 'nft add table inet mine', 'nft list ruleset',
    'sysctl -w net.ipv4.conf.host0.rp_filter=0', 'sysctl -w net.ipv4.ip_forward=1',
]:
    must(line, run(line), ['denied'])
launcher = os.environ['LAUNCHER']
for line in [f'nsenter --net=/proc/{launcher}/ns/net true', f'nsenter --user=/proc/{launcher}/ns/user true',
    f'nsenter --mount=/proc/{launcher}/ns/mnt true', f'nsenter --net=/proc/{os.getppid()}/ns/net true',
    'nsenter --net=/proc/1/ns/net true', 'nsenter --mount=/proc/1/ns/mnt true']:
    must(line, run(line), ['denied'])
# All mounts have come from another user namespace, so none can be taken off what it covers (mount_namespaces(7)).
MNT_DETACH, MS_BIND, MS_REC, MS_MOVE, MS_REMOUNT = 2, 4096, 16384, 8192, 32
points = [line.split()[4].encode().decode('unicode_escape') for line in read('/proc/self/mountinfo').splitlines()]
before = {path: read(path) for path in ['/etc/resolv.conf', '/etc/hosts', '/etc/nsswitch.conf']}
for point in dict.fromkeys(points):
    taken_off = libc.umount2(point.encode(), MNT_DETACH)
    must(f'umount {point}', result(taken_off), ['EINVAL', 'EPERM', 'EBUSY', 'ENOENT', 'EACCES'])
    moved = libc.mount(point.encode(), b'/mnt', None, MS_MOVE, None)
    must(f'move {point}', result(moved), ['EINVAL', 'EPERM', 'EBUSY', 'ENOENT', 'EACCES', 'ELOOP'])
# A copy of the tree without what is mounted in it would uncover the rest.
must('bind / alone', result(libc.mount(b'/', b'/mnt', None, MS_BIND, None)), ['EINVAL'])
for path, text in before.items():
    must(path, 'same' if read(path) == text else 'changed', ['same'])
for path in [os.environ['TUNNELS'], '/run/netns', '/run/vpn-exec']:
    must(path, os.listdir(path) if os.path.isdir(path) else [], [[]])
print('attempts', made > 30)
"#;

/// Returns what a nested user namespace could see of the tunnel's network, from the host.
fn network(pid: &str) -> Result<BTreeSet<String>> {
    let mut lines = BTreeSet::new();
    for line in
        ["ip -o address", "ip -o route show table all", "ip -6 -o route show table all", "ip rule", "nft list ruleset"]
    {
        let mut command = std::process::Command::new("nsenter");
        command.arg(format!("--net=/proc/{pid}/ns/net")).args(line.split(' '));
        // The kernel's own routes and flags follow an interface's state a moment later.
        let said = output(command)?.replace(" tentative", "");
        let own = said.lines().filter(|text| !text.contains("proto kernel"));
        lines.extend(own.map(|text| format!("{line}: {text}")));
    }
    Ok(lines)
}

#[test]
fn a_nested_user_namespace_cannot_touch_the_tunnel() {
    lab::test(Peer::Ours, |lab: &Lab| {
        for program in ["nft", "nsenter", "unshare", "sysctl"] {
            lab::require_program(program, lab::variables::REQUIRE_PEERS)?;
        }
        let user = User::new(lab)?;
        let mut agent = Agent::start(&mut user.inside("mine", &["--wait", "20"], &[]))?.begun()?;
        let inside = agent.succeed("pid")?;
        let before = network(&inside)?;
        ensure!(before.iter().any(|line| line.contains("policy drop")), "{before:#?}");
        let mut command = user.inside("mine", &[], &[&NESTED[..], &[ATTEMPTS]].concat());
        command.env("LAUNCHER", agent.pid().to_string()).env("TUNNELS", user.tunnels());
        let seen = output(command)?;
        ensure!(seen == "capabilities True\nattempts True\n", "a nested user namespace could: {seen}");
        let after = network(&inside)?;
        let changed: Vec<&String> = before.symmetric_difference(&after).collect();
        ensure!(changed.is_empty(), "{changed:#?}");
        let server = agent.succeed_within(PATIENCE, &format!("get http://{}/", WEB.ipv4))?;
        ensure!(server == PROVIDER.ipv4.to_string(), "the server saw {server}");
        agent.finish_well().map(drop)
    });
}

/// The twin: what fails above works in a network namespace of its own, and where the mounts are one's own.
#[test]
fn a_nested_user_namespace_may_do_all_of_it_to_what_is_its_own() {
    lab::test(Peer::Ours, |lab: &Lab| {
        lab::require_program("nft", lab::variables::REQUIRE_PEERS)?;
        let user = User::new(lab)?;
        let script = "import ctypes, subprocess\n\
                      libc = ctypes.CDLL(None)\n\
                      mounted = libc.mount(b'own', b'/tmp', b'tmpfs', 0, None), libc.umount2(b'/tmp', 2)\n\
                      for line in ['ip link set lo up', 'ip route add 198.51.100.0/26 dev lo', 'nft add table inet mine',\n\
                      \x20   'nft flush ruleset', 'sysctl -q -w net.ipv4.ip_forward=1']:\n\
                      \x20   subprocess.run(line.split(), check=True)\n\
                      print(mounted)";
        let nested = [&NESTED[..4], &["--net", "/usr/bin/python3", "-c", script]].concat();
        let seen = output(user.inside("mine", &[], &nested))?;
        ensure!(seen == "(0, 0)\n", "{seen}");
        Ok(())
    });
}

#[test]
fn bubblewrap_sandboxes_work_and_stay_in_the_tunnel() {
    lab::test(Peer::Ours, |lab: &Lab| {
        lab::require_program("bwrap", lab::variables::REQUIRE_PROGRAMS)?;
        // The user ID 0 cannot be nested without CAP_SETFCAP (user_namespaces(7)).
        lab::require_users()?;
        let user = User::new(lab)?;
        let get = format!(
            "import urllib.request; print(urllib.request.urlopen('http://{}/', timeout=20).read().decode())",
            WEB.ipv4
        );
        // As flatpak makes them: with the network of the caller.
        let sandbox =
            ["bwrap", "--unshare-user", "--unshare-pid", "--unshare-ipc", "--ro-bind", "/", "/", "--dev", "/dev"];
        let words = [&sandbox[..], &["--proc", "/proc", "/usr/bin/python3", "-c", &get]].concat();
        let seen = output(user.inside("mine", &["--wait", "20"], &words))?;
        ensure!(seen.trim() == PROVIDER.ipv4.to_string(), "the server saw {seen}");
        // Without a network, there is none.
        let words =
            [&sandbox[..], &["--unshare-net", "sh", "-c", "grep -c : /proc/net/dev; cat /proc/net/route | wc -l"]]
                .concat();
        let seen = output(user.inside("mine", &[], &words))?;
        ensure!(seen == "1\n1\n", "{seen}");
        Ok(())
    });
}
