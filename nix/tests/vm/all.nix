# One file per promise.
{
  boot-without-network = ./boot-without-network.nix;
  compat = ./compat.nix;
  dynamic-user = ./dynamic-user.nix;
  leaks = ./leaks.nix;
  many-tunnels = ./many-tunnels.nix;
  publish = ./publish.nix;
  switch = ./switch.nix;
}
