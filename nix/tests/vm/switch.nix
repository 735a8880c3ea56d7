# A switch to a changed configuration reloads a tunnel, or restarts it with its services if a reload cannot apply the
# change.
{ module, ... }:
let
  common = import ./common.nix { inherit module; };
in
{
  name = "switch";
  nodes = {
    inherit (common) provider;
    machine = {
      imports = [ common.machine ];
      services.vpn-exec.tunnels.a = {
        configFile = "/etc/wireguard/a.conf";
        publish = [ "8080:80" ];
      };
      systemd.services.probe = common.waiting // {
        vpn-exec.tunnel = "a";
      };
      specialisation.joined.configuration.systemd.services.second = common.waiting // {
        vpn-exec.tunnel = "a";
      };
      specialisation.reloaded.configuration.services.vpn-exec.tunnels.a.publish = [ "8081:80" ];
      specialisation.restarted.configuration.services.vpn-exec.tunnels.a.backend = "userspace";
    };
  };
  testScript = common.prelude + ''
    machine.wait_for_unit("probe.service")
    pid = main_pid("probe")
    system = machine.succeed("readlink -f /run/current-system").strip()

    # Adding and removing another service does not affect the first.
    machine.succeed(f"{system}/specialisation/joined/bin/switch-to-configuration test")
    machine.wait_for_unit("second.service")
    assert main_pid("probe") == pid

    machine.succeed(f"{system}/specialisation/reloaded/bin/switch-to-configuration test")
    assert main_pid("probe") == pid
    assert "8081" in machine.succeed("ss -ltn")

    machine.succeed(f"{system}/specialisation/restarted/bin/switch-to-configuration test")
    retry(is_back("probe", pid))
    assert inside("probe", WEB).strip() == "10.64.0.2"
  '';
}
