# A machine whose units tests/vm/ boots under Debian's systemd. tests/vm/inside/nixos/ contains the module's output for
# it.
{ pkgs, ... }:
{
  services.vpn-exec.tunnels.lab = {
    configFile = "/etc/vpn-exec/lab.conf";
    backend = "userspace";
  };

  systemd.services.test-n-user = {
    wantedBy = [ "multi-user.target" ];
    serviceConfig = {
      Type = "exec";
      DynamicUser = true;
      ExecStart = "/bin/sleep 1000";
      # As on NixOS: only nscd knows dynamic users.
      InaccessiblePaths = [ "/usr/lib/x86_64-linux-gnu/libnss_systemd.so.2" ];
    };
    vpn-exec = {
      tunnel = "lab";
      restrict = true;
    };
  };

  # A root directory of its own that contains the host's /run, as in NixOS's module for Transmission.
  systemd.services.test-n-root = {
    serviceConfig = {
      Type = "exec";
      ExecStart = "/bin/sleep 1000";
      RuntimeDirectory = "test-n-root";
      RootDirectory = "/run/test-n-root";
      RootDirectoryStartOnly = true;
      MountAPIVFS = true;
      InaccessiblePaths = [ "-+/run/test-n-root" ];
      BindPaths = [ "/run" ];
      BindReadOnlyPaths = [
        "/bin"
        "/etc"
        "/lib"
        "/lib64"
        "/usr"
      ];
    };
    vpn-exec.tunnel = "lab";
  };

  systemd.sockets.test-n-page = {
    wantedBy = [ "sockets.target" ];
    listenStreams = [ "8000" ];
    socketConfig.Accept = true;
    vpn-exec.tunnel = "lab";
  };
  systemd.services."test-n-page@" = {
    serviceConfig = {
      ExecStart = "${pkgs.curl}/bin/curl -sS -m 5 http://203.0.113.2/";
      StandardOutput = "socket";
    };
    vpn-exec.tunnel = "lab";
  };
}
