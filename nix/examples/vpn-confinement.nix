# An unchanged configuration for VPN-Confinement, read by `nixosModules.vpn-confinement-compat`.
{
  vpnNamespaces.wg = {
    enable = true;
    wireguardConfigFile = "/secrets/wg0.conf";
    accessibleFrom = [ "192.168.0.0/24" ];
    portMappings = [
      {
        from = 9091;
        to = 9091;
      }
    ];
    openVPNPorts = [
      {
        port = 60729;
        protocol = "both";
      }
    ];
  };

  systemd.services.transmission.vpnConfinement = {
    enable = true;
    vpnNamespace = "wg";
  };
}
