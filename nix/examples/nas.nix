# A NAS in the local network, by NFS for the host and by its address for the service, which also reaches a database of the host.
{
  services.vpn-exec.tunnels.mullvad = {
    configFile = "/run/secrets/mullvad.conf";
    # The NAS alone; all of the network would be 192.168.1.0/24.
    local.networks = [ "192.168.1.10/32" ];
    # PostgreSQL of the host, which listens on its loopback: inside it is host.internal:5432.
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
      # Its socket, too, which is there once it runs.
      allowRunPaths = [ "/run/postgresql" ];
    };
    after = [ "postgresql.service" ];
    # What is mounted by the host is seen as ever.
    unitConfig.RequiresMountsFor = [ "/srv/media" ];
  };
}
