# A configuration for VPN-Confinement works unchanged.
{ module, compat }:
let
  common = import ./common.nix { inherit module; };
in
{
  name = "compat";
  nodes = {
    inherit (common) provider remote;
    machine =
      { pkgs, ... }:
      {
        imports = [
          common.machine
          compat
        ];
        vpnNamespaces.wg = {
          enable = true;
          wireguardConfigFile = "/etc/wireguard/a.conf";
          accessibleFrom = [ "192.168.1.0/24" ];
          portMappings = [
            {
              from = 9091;
              to = 9091;
            }
          ];
        };
        systemd.services.page = {
          wantedBy = [ "multi-user.target" ];
          serviceConfig.RuntimeDirectory = "page";
          script = ''
            cd /run/page
            exec ${pkgs.python3}/bin/python3 -m http.server 9091
          '';
          vpnConfinement = {
            enable = true;
            vpnNamespace = "wg";
          };
        };
      };
  };
  testScript = common.prelude + ''
    machine.wait_for_unit("page.service")
    assert inside("page", WEB).strip() == "10.64.0.2"
    remote.succeed("curl -sS -m 5 --retry 10 --retry-connrefused http://${common.addresses.machine}:9091/")
  '';
}
