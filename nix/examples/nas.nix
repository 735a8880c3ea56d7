# A NAS in the local network: the host mounts it by NFS, and the service reaches its address. The service also uses a
# database on the host.
{
  services.vpn-exec.tunnels.mullvad = {
    configFile = "/run/secrets/mullvad.conf";
    # Only the NAS. The whole network would be 192.168.1.0/24.
    local.networks = [ "192.168.1.10/32" ];
    # The host's PostgreSQL listens on the loopback. Inside, its address is host.internal:5432.
    local.hostPorts = [ "5432" ];
  };

  fileSystems."/srv/media" = {
    device = "192.168.1.10:/media";
    fsType = "nfs";
  };

  services.radarr.enable = true;
  systemd.services.radarr = {
    vpn-exec = {
      tunnel = "mullvad";
      # PostgreSQL's unix socket, which exists once it runs.
      allowRunPaths = [ "/run/postgresql" ];
    };
    after = [ "postgresql.service" ];
    # The service sees the host's mounts as usual.
    unitConfig.RequiresMountsFor = [ "/srv/media" ];
  };
}
