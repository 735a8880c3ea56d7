# Transmission in a tunnel, with its web page behind nginx and a port that the provider forwards.
{
  services.vpn-exec.tunnels.airvpn = {
    configFile = "/run/secrets/airvpn.conf";
    # The port that the provider forwards to this key.
    openPorts = [ 51413 ];
    # Only the host reaches the page, through nginx.
    publish = [ "127.0.0.1:9091:9091" ];
  };

  services.transmission = {
    enable = true;
    settings = {
      peer-port = 51413;
      # Connections through the published port come from the program's own loopback.
      rpc-bind-address = "127.0.0.1";
      rpc-host-whitelist = "torrent.example.org";
    };
  };
  systemd.services.transmission.vpn-exec.tunnel = "airvpn";

  services.nginx = {
    enable = true;
    virtualHosts."torrent.example.org" = {
      forceSSL = true;
      enableACME = true;
      # Transmission trusts its loopback, so nginx asks for the password.
      basicAuthFile = "/run/secrets/torrent-users";
      locations."/".proxyPass = "http://127.0.0.1:9091";
    };
  };
}
