# The provider's file as a secret of agenix.
{ config, ... }:
{
  age.secrets.mullvad.file = ./secrets/mullvad.conf.age;

  services.vpn-exec.tunnels.mullvad.configFile =
    config.age.secrets.mullvad.path or "/run/agenix/mullvad";
}
