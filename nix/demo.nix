# The demonstration. It expects the binary in the parent of its own folder.
{ vpn-exec }:
vpn-exec.overrideAttrs {
  pname = "vpn-exec-demo";
  cargoBuildFlags = [
    "--bin=vpn-exec"
    "--example=demo"
  ];
  doCheck = false;
  installPhase = ''
    runHook preInstall
    built=$(dirname "$(find target -type f -path '*/release/vpn-exec' -print -quit)")
    install -D -m 755 "$built/vpn-exec" $out/libexec/vpn-exec
    install -D -m 755 "$built/examples/demo" $out/libexec/examples/demo
    mkdir -p $out/bin
    ln -s ../libexec/examples/demo $out/bin/vpn-exec-demo
    runHook postInstall
  '';
  postInstall = "";
  meta = vpn-exec.meta // {
    mainProgram = "vpn-exec-demo";
  };
}
