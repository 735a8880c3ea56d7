# No packet and no DNS question of a confined service bypasses the tunnel, whatever restarts.
{ module, ... }:
let
  common = import ./common.nix { inherit module; };
in
{
  name = "leaks";
  nodes = {
    inherit (common) provider;
    machine = {
      imports = [ common.machine ];
      services.resolved.enable = true;
      services.vpn-exec.tunnels.a.configFile = "/etc/wireguard/a.conf";
      systemd.services.probe = common.waiting // {
        vpn-exec.tunnel = "a";
      };
    };
  };
  testScript = common.prelude + ''
    machine.wait_for_unit("probe.service")
    assert machine.succeed(WEB).strip() == "${common.addresses.machine}"
    assert inside("probe", WEB).strip() == "10.64.0.2"
    interfaces = machine.succeed("ip netns exec a ls /sys/class/net").split()
    assert sorted(interfaces) == ["host0", "lo", "wg0"], interfaces

    # Proves that the log would show a leak.
    machine.succeed("getent ahosts control.example")
    assert asked("control.example", "${common.addresses.machine}")

    for turn, service in enumerate(["nscd", "systemd-resolved", "vpn-exec-nscd-a", "dbus-broker"]):
        name = f"turn-{turn}.example"
        assert "203.0.113.1" in inside("probe", f"getent ahosts {name}")
        assert asked(name, "10.64.0.2"), name
        assert not asked(name, "${common.addresses.machine}"), name
        machine.execute(f"systemctl restart {service}")

    with subtest("without a tunnel there is no service"):
        machine.succeed("systemctl stop vpn-exec@a")
        machine.wait_until_fails("systemctl is-active probe")

    with subtest("a service is back after its keeper was killed"):
        machine.succeed("systemctl start probe")
        before = main_pid("probe")
        machine.succeed("systemctl kill -s KILL vpn-exec@a")
        retry(is_back("probe", before))
        assert inside("probe", WEB).strip() == "10.64.0.2"
  '';
}
