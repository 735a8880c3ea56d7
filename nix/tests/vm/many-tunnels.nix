# Several tunnels at once, each with its own services, which do not see each other.
{ module, ... }:
let
  common = import ./common.nix { inherit module; };
  each = make: builtins.mapAttrs make common.clients;
in
{
  name = "many-tunnels";
  nodes = {
    inherit (common) provider;
    machine = {
      imports = [ common.machine ];
      services.vpn-exec.tunnels = each (name: _: { configFile = "/etc/wireguard/${name}.conf"; });
      systemd.services = builtins.listToAttrs (
        map (name: {
          name = "probe-${name}";
          value = common.waiting // {
            vpn-exec.tunnel = name;
          };
        }) (builtins.attrNames common.clients)
      );
    };
  };
  testScript = common.prelude + ''
    addresses = {"a": "10.64.0.2", "b": "10.64.0.3", "c": "10.64.0.4"}
    for name, address in addresses.items():
        machine.wait_for_unit(f"probe-{name}.service")
        assert inside(f"probe-{name}", WEB).strip() == address
    machine.succeed("systemctl stop vpn-exec@b")
    assert inside("probe-a", WEB).strip() == "10.64.0.2"
    assert inside("probe-c", WEB).strip() == "10.64.0.4"
    machine.fail("systemctl is-active probe-b")
  '';
}
