# A Docker Compose file with gluetun, translated: qBittorrent is a service instead of a container.
{
  services.vpn-exec.tunnels.gluetun = {
    # A wg-quick file with the values of WIREGUARD_PRIVATE_KEY, WIREGUARD_ADDRESSES and the server's keys.
    configFile = "/run/secrets/wg0.conf";
    # FIREWALL_OUTBOUND_SUBNETS=192.168.1.0/24
    local.networks = [ "192.168.1.0/24" ];
    # FIREWALL_VPN_INPUT_PORTS=6881
    openPorts = [ 6881 ];
    # ports: [ "8080:8080" ]
    publish = [ "8080:8080" ];
    openFirewall = true;
  };

  # network_mode: "service:gluetun", and depends_on
  services.qbittorrent.enable = true;
  systemd.services.qbittorrent.vpn-exec.tunnel = "gluetun";
}
