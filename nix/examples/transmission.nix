# Transmission in a tunnel, its web page behind nginx, and the port that the provider forwards.
{
  services.vpn-exec.tunnels.airvpn = {
    configFile = "/run/secrets/airvpn.conf";
    # What the provider forwards to this key.
    openPorts = [ 51413 ];
    # The host alone reaches the page, and nginx is there.
    publish = [ "127.0.0.1:9091:9091" ];
  };

  services.transmission = {
    enable = true;
    settings = {
      peer-port = 51413;
      # Who comes by the published port comes from the program's own loopback.
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
      # Transmission takes whoever comes from its loopback for its owner: the password is asked for here.
      basicAuthFile = "/run/secrets/torrent-users";
      locations."/".proxyPass = "http://127.0.0.1:9091";
    };
  };
}
