# A second Firefox in a tunnel, with a profile of its own. With the same profile, it would hand its pages to a Firefox
# that is already open.
{ pkgs, ... }:
{
  services.vpn-exec.tunnels.mullvad.configFile = "/run/secrets/mullvad.conf";

  programs.vpn-exec.wrappers.firefox-vpn = {
    package = pkgs.firefox;
    tunnel = "mullvad";
    args = [
      "--no-remote"
      "-P"
      "vpn"
    ];
  };
}
