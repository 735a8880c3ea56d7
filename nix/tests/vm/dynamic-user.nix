# A service with a dynamic user finds its own user, and resolves host names through the tunnel.
{ module, ... }:
let
  common = import ./common.nix { inherit module; };
in
{
  name = "dynamic-user";
  nodes = {
    inherit (common) provider;
    machine = {
      imports = [ common.machine ];
      services.vpn-exec.tunnels.a.configFile = "/etc/wireguard/a.conf";
      systemd.services.probe = common.waiting // {
        serviceConfig = {
          DynamicUser = true;
          StateDirectory = "probe";
        };
        script = ''
          id -un >/var/lib/probe/user
          exec sleep infinity
        '';
        vpn-exec = {
          tunnel = "a";
          restrict = true;
        };
      };
    };
  };
  testScript = common.prelude + ''
    machine.wait_for_unit("probe.service")
    machine.wait_until_succeeds("test -s /var/lib/probe/user")
    assert machine.succeed("cat /var/lib/probe/user").strip() == "probe"
    assert "203.0.113.1" in inside("probe", "getent ahosts dynamic.example")
    assert asked("dynamic.example", "10.64.0.2")
    assert not asked("dynamic.example", "${common.addresses.machine}")
    # Also after a restart of its nscd.
    machine.succeed("systemctl restart vpn-exec-nscd-a")
    assert "probe" in inside("probe", "getent passwd probe")
  '';
}
