# The provider's file as a secret of agenix. When it changes, the tunnel and its services restart.
{ config, ... }:
let
  inherit (config.age.secrets) mullvad;
in
{
  age.secrets.mullvad.file = ./secrets/mullvad.conf.age;

  services.vpn-exec.tunnels.mullvad.configFile = mullvad.path;
  systemd.services."vpn-exec@mullvad".restartTriggers = [ mullvad.file ];
}
