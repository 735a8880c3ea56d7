# A service that its socket starts. The socket listens inside the tunnel, at the port that the provider forwards.
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
      # The program must accept on the socket that systemd passes as file descriptor 3 (sd_listen_fds(3)).
      ExecStart = "${pkgs.python3}/bin/python3 -c 'import http.server as http, socket; server = http.HTTPServer((\"\", 0), http.SimpleHTTPRequestHandler, False); server.socket = socket.socket(fileno=3); server.serve_forever()'";
      DynamicUser = true;
      StateDirectory = "page";
      WorkingDirectory = "/var/lib/page";
    };
    vpn-exec = {
      tunnel = "airvpn";
      restrict = true;
    };
  };
}
