# A service that is started by its socket, which listens inside the tunnel: at the port that the provider forwards.
{ pkgs, ... }:
{
  services.vpn-exec.tunnels.airvpn = {
    configFile = "/run/secrets/airvpn.conf";
    openPorts = [ 8000 ];
  };

  systemd.sockets.page = {
    wantedBy = [ "sockets.target" ];
    listenStreams = [ "8000" ];
    vpn-exec.tunnel = "airvpn";
  };
  systemd.services.page = {
    serviceConfig = {
      ExecStart = "${pkgs.python3}/bin/python3 -m http.server";
      DynamicUser = true;
    };
    vpn-exec = {
      tunnel = "airvpn";
      restrict = true;
    };
  };
}
