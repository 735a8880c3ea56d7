# A second Firefox, in a tunnel, with a profile of its own. (One that finds another running with the same profile hands its pages to that.)
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
