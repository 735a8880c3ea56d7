# The container image, as deploy/image/build makes it: one static binary.
{
  dockerTools,
  runCommand,
  vpn-exec,
}:
let
  inherit (vpn-exec) version;
in
dockerTools.buildLayeredImage {
  name = "localhost/vpn-exec";
  tag = version;
  contents = [
    (runCommand "vpn-exec-root" { } ''
      install -D -m 755 ${vpn-exec}/bin/vpn-exec $out/vpn-exec
      install -D -m 644 -t $out/licenses ${../LICENSE-MIT} ${../LICENSE-APACHE}
    '')
  ];
  config = {
    # Probes call the same path.
    Entrypoint = [ "/vpn-exec" ];
    Labels = {
      "org.opencontainers.image.title" = "vpn-exec";
      "org.opencontainers.image.description" =
        "A WireGuard tunnel with a kill switch for a pod or container";
      "org.opencontainers.image.version" = version;
      "org.opencontainers.image.licenses" = "(MIT OR Apache-2.0) AND LGPL-2.1-or-later";
    };
  };
  meta = {
    inherit (vpn-exec.meta) license platforms;
    description = "Container image of vpn-exec";
  };
}
