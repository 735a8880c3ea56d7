# A NixOS container that joins a tunnel's namespace by its path.
{ config, lib, ... }:
let
  inherit (config.services.vpn-exec.tunnels) mullvad;
in
{
  services.vpn-exec.tunnels.mullvad.configFile = "/run/secrets/mullvad.conf";

  containers.web = {
    autoStart = true;
    networkNamespace = mullvad.netnsPath;
    # The container uses the tunnel's resolver.
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
    # Also starts the container again after a crash of the tunnel's keeper.
    wantedBy = [ mullvad.unit ];
  };
}
