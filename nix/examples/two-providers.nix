# Two providers at once. Each service uses one of them, and does not see the other.
{
  services.vpn-exec.tunnels = {
    mullvad.configFile = "/run/secrets/mullvad.conf";
    proton = {
      configFile = "/run/secrets/proton.conf";
      # Starts when a service needs it.
      autoStart = false;
    };
  };

  services.prowlarr.enable = true;
  systemd.services.prowlarr.vpn-exec.tunnel = "mullvad";
  services.qbittorrent.enable = true;
  systemd.services.qbittorrent.vpn-exec.tunnel = "proton";
}
