# nov/27/2026 06:00:00 by RouterOS 7.16
/interface wireguard
add listen-port=13231 mtu=1420 name=wireguard1 private-key="8D5M/tWDiN48bacOo2agzhCLZ6UbfzsqE6WITKyIFWM="
/interface wireguard peers
add allowed-address=0.0.0.0/0 endpoint-address=203.0.113.10 endpoint-port=51820 interface=wireguard1 public-key="Y07spepCV5KcVIHVKyD9KeQj235sTpfGAOcEgloRXic="
