# A published port is reachable from the local network, and no other port is.
{ module, ... }:
let
  common = import ./common.nix { inherit module; };
in
{
  name = "publish";
  nodes = {
    inherit (common) provider remote;
    machine =
      { pkgs, ... }:
      {
        imports = [ common.machine ];
        services.vpn-exec.tunnels.a = {
          configFile = "/etc/wireguard/a.conf";
          publish = [
            "8080:80"
            "127.0.0.1:8081:80"
          ];
          openFirewall = true;
        };
        systemd.services.page = {
          wantedBy = [ "multi-user.target" ];
          serviceConfig.RuntimeDirectory = "page";
          # Listens on its loopback alone.
          script = ''
            cd /run/page
            echo a page inside >index.html
            exec ${pkgs.python3}/bin/python3 -m http.server --bind 127.0.0.1 80
          '';
          vpn-exec.tunnel = "a";
        };
      };
  };
  testScript = common.prelude + ''
    machine.wait_for_unit("page.service")
    page = "curl -sS -m 5 --retry 10 --retry-connrefused http://{}/"
    assert "a page inside" in machine.succeed(page.format("127.0.0.1:8080"))
    assert "a page inside" in machine.succeed(page.format("127.0.0.1:8081"))
    assert "a page inside" in remote.succeed(page.format("${common.addresses.machine}:8080"))
    remote.fail("curl -sS -m 5 http://${common.addresses.machine}:8081/")
    # Unsolicited packets from the tunnel are dropped.
    provider.fail("curl -sS -m 5 http://10.64.0.2/")
  '';
}
