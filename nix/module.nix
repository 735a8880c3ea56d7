# The NixOS module: options and their wiring. unit.nix and tunnel.nix decide what a unit receives, and what is refused.
{
  imports = [
    ./module/tunnels.nix
    ./module/services.nix
    ./module/wrappers.nix
  ];
}
