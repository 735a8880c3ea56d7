# The machine boots without a network, and a service in a tunnel connects once there is one.
{ module, ... }:
let
  common = import ./common.nix { inherit module; };
in
{
  name = "boot-without-network";
  nodes = {
    inherit (common) provider;
    machine =
      { lib, ... }:
      {
        imports = [ common.machine ];
        networking.defaultGateway = lib.mkForce null;
        networking.interfaces.eth1.ipv4.addresses = lib.mkForce [ ];
        services.vpn-exec.tunnels.a.configFile = "/etc/wireguard/a.conf";
        systemd.services.probe = common.waiting // {
          vpn-exec.tunnel = "a";
        };
      };
  };
  testScript = common.prelude + ''
    machine.wait_for_unit("multi-user.target")
    machine.succeed("systemctl is-active vpn-exec@a probe")
    pid = main_pid("probe")
    machine.succeed("ip addr add ${common.addresses.machine}/24 dev eth1; ip link set eth1 up; ip route add default via ${common.addresses.provider}")
    assert inside("probe", WEB).strip() == "10.64.0.2"
    assert main_pid("probe") == pid
  '';
}
