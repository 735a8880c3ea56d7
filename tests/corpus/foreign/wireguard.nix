{ config, pkgs, ... }:
{
  networking.wg-quick.interfaces.wg0.address = [ "10.64.0.2/32" ];
}
