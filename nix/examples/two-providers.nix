# Two providers at once. Each service has one; nothing of the one is seen by the other.
{
  services.vpn-exec.tunnels = {
    mullvad.configFile = "/run/secrets/mullvad.conf";
    proton = {
      configFile = "/run/secrets/proton.conf";
      # It is started when a service needs it.
      autoStart = false;
    };
  };

  services.prowlarr.enable = true;
  systemd.services.prowlarr.vpn-exec.tunnel = "mullvad";
  services.qbittorrent.enable = true;
  systemd.services.qbittorrent.vpn-exec.tunnel = "proton";
}
