# Prowlarr, Sonarr, Radarr and qBittorrent in one tunnel, where they reach each other at localhost. Jellyfin stays
# outside and shares only their files.
{ lib, ... }:
let
  pages = {
    prowlarr = 9696;
    sonarr = 8989;
    radarr = 7878;
    qbittorrent = 8080;
  };
in
{
  services.vpn-exec.tunnels.mullvad = {
    configFile = "/run/secrets/mullvad.conf";
    publish = lib.mapAttrsToList (_: port: "${toString port}:${toString port}") pages;
    openFirewall = true;
  };

  services.prowlarr.enable = true;
  services.sonarr.enable = true;
  services.radarr.enable = true;
  services.qbittorrent.enable = true;
  systemd.services = lib.mapAttrs (_: _: { vpn-exec.tunnel = "mullvad"; }) pages;

  services.jellyfin.enable = true;
}
