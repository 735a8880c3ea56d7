# A NixOS container in a tunnel, by the path of its namespace.
{ config, lib, ... }:
let
  inherit (config.services.vpn-exec.tunnels) mullvad;
in
{
  services.vpn-exec.tunnels.mullvad.configFile = "/run/secrets/mullvad.conf";

  containers.web = {
    autoStart = true;
    networkNamespace = mullvad.netnsPath;
    # Its resolver is the tunnel's.
    bindMounts."/etc/resolv.conf" = {
      hostPath = "/run/vpn-exec/mullvad/resolv.conf";
      isReadOnly = true;
    };
    config.networking = {
      useHostResolvConf = lib.mkForce false;
      resolvconf.enable = false;
    };
  };
  systemd.services."container@web" = {
    bindsTo = [ mullvad.unit ];
    after = [ mullvad.unit ];
    # It is back after a crash of the tunnel's keeper, too.
    wantedBy = [ mullvad.unit ];
  };
}
