# The NixOS module: options, and how they are wired. What a unit receives and what is refused is decided in unit.nix and tunnel.nix.
{
  imports = [
    ./module/tunnels.nix
    ./module/services.nix
    ./module/wrappers.nix
  ];
}
