# The provider's file as a secret of sops-nix. When it changes, the tunnel and its services restart.
{ config, ... }:
let
  inherit (config.services.vpn-exec.tunnels) mullvad;
in
{
  sops.secrets."mullvad.conf" = {
    format = "binary";
    sopsFile = ./secrets/mullvad.conf;
    restartUnits = [ mullvad.unit ];
  };

  services.vpn-exec.tunnels.mullvad.configFile = config.sops.secrets."mullvad.conf".path;
}
