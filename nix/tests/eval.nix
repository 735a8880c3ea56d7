# Evaluates the whole module with `lib.evalModules`, in an environment of its own. NIXPKGS_LIB is the path of nixpkgs'
# `lib`: `NIXPKGS_LIB=… nix-instantiate --eval --strict --json nix/tests/eval.nix`. Each case has an actual and an
# expected value.
let
  lib = import (builtins.getEnv "NIXPKGS_LIB");
  surroundings = import ./surroundings.nix { inherit lib; };
  inherit (surroundings) failures pkgs;
  evaluate =
    module:
    surroundings.evaluate [
      ../module.nix
      module
    ];
  evaluateCompat =
    module:
    surroundings.evaluate [
      ../module.nix
      ../vpn-confinement-compat.nix
      module
    ];

  # --- Refusals: their messages.

  tunnel.services.vpn-exec.tunnels.mullvad.configFile = "/run/secrets/mullvad.conf";
  with' = module: {
    imports = [
      tunnel
      module
    ];
  };
  service =
    settings:
    with' {
      systemd.services.web = settings // {
        vpn-exec = {
          tunnel = "mullvad";
        }
        // settings.vpn-exec or { };
      };
    };
  refused = module: sentences: {
    actual = failures (evaluate module);
    expected = sentences;
  };
  web = reason: "systemd.services.web cannot be in the tunnel `mullvad`: ${reason}.";

  refusals = {
    "nothing, if all is valid" = refused (service { }) [ ];
    "nothing, without tunnels" = refused { } [ ];

    "an unknown tunnel" = refused (with' { systemd.services.web.vpn-exec.tunnel = "ivpn"; }) [
      "systemd.services.web.vpn-exec.tunnel: no tunnel `ivpn` in `services.vpn-exec.tunnels`, which has `mullvad`."
    ];
    "a tunnel, without any tunnels" = refused { systemd.services.web.vpn-exec.tunnel = "ivpn"; } [
      "systemd.services.web.vpn-exec.tunnel: no tunnel `ivpn` in `services.vpn-exec.tunnels`, which is empty."
    ];
    "a disabled tunnel" =
      refused (service { } // { services.vpn-exec.tunnels.mullvad.enable = false; })
        [
          "systemd.services.web.vpn-exec.tunnel: the tunnel `mullvad` is disabled: set `services.vpn-exec.tunnels.mullvad.enable`, or remove this option."
        ];
    "a socket's unknown tunnel" = refused (with' { systemd.sockets.web.vpn-exec.tunnel = "ivpn"; }) [
      "systemd.sockets.web.vpn-exec.tunnel: no tunnel `ivpn` in `services.vpn-exec.tunnels`, which has `mullvad`."
    ];

    "resolved's plain files may be bound, as NixOS's tor does" = refused (service {
      serviceConfig.BindReadOnlyPaths = [
        "/run/systemd/resolve/stub-resolv.conf"
        "/run/systemd/resolve/resolv.conf"
      ];
    }) [ ];
    "a folder of an instance" = refused (with' {
      systemd.services."worker@" = {
        serviceConfig.RuntimeDirectory = "%p/%i";
        vpn-exec.tunnel = "mullvad";
      };
    }) [ ];
    "a resolver, by a specifier" = refused (service { serviceConfig.BindPaths = [ "%t/nscd" ]; }) [
      (web "the unit binds /run/nscd, through which the host looks up names, bypassing the tunnel: remove that bind")
    ];
    "a service of the whole machine" =
      refused (with' { systemd.services.systemd-resolved.vpn-exec.tunnel = "mullvad"; })
        [
          "systemd.services.systemd-resolved cannot be in the tunnel `mullvad`: systemd-resolved.service serves the whole machine: leave it outside."
        ];
    "a podman container" =
      refused (with' { systemd.services.podman-web.vpn-exec.tunnel = "mullvad"; })
        [
          "systemd.services.podman-web cannot be in the tunnel `mullvad`: a container engine runs the program of podman-web.service in another network namespace: leave the unit's service settings as they are, and give podman the options --network=ns:/run/netns/mullvad and --volume=/run/vpn-exec/mullvad/resolv.conf:/etc/resolv.conf:ro, and the unit BindsTo= and After=vpn-exec@mullvad.service."
        ];
    "a container with the tunnel's interface name" =
      refused (with' { containers.mullvad.privateNetwork = true; })
        [
          "services.vpn-exec.tunnels.mullvad: `ve-mullvad` is the name of the tunnel's interface on the host, and of the interface of `containers.mullvad`: rename one of them."
        ];
    "a container of that name without an interface" = refused (with' {
      containers.mullvad.privateNetwork = false;
    }) [ ];

    "a long name" =
      refused
        { services.vpn-exec.tunnels.${lib.concatStrings (lib.genList (_: "x") 65)}.configFile = "/x"; }
        [
          "services.vpn-exec.tunnels.${lib.concatStrings (lib.genList (_: "x") 65)}: \"${
            lib.concatStrings (lib.genList (_: "x") 65)
          }\" cannot be the name of a tunnel: it has 65 characters, and at most 64 are allowed."
        ];
    "a name with a bad character" = refused { services.vpn-exec.tunnels."a b".configFile = "/x"; } [
      "services.vpn-exec.tunnels.a b: \"a b\" cannot be the name of a tunnel: allowed are letters, digits and _ . -."
    ];

    "a file in the store" =
      refused { services.vpn-exec.tunnels.mullvad.configFile = "${builtins.storeDir}/x.conf"; }
        [
          "services.vpn-exec.tunnels.mullvad.configFile: it is in the Nix store, where every user can read the private key: use a file outside of the store, for example from sops-nix or agenix."
        ];
    "a key in the configuration" =
      refused
        {
          services.vpn-exec.tunnels.mullvad.configFile =
            "[Interface]\nPrivateKey = iGxYvNQ5eVwPrTzY3Qe5MHfNxGbKxFfQyM7zq2nX8Vc=";
        }
        [
          "services.vpn-exec.tunnels.mullvad.configFile: it is the file's contents or a key, which every user could read in the Nix store: use the path of a file that exists on the running machine."
        ];
    "a disabled tunnel's file is not checked" = refused {
      services.vpn-exec.tunnels.mullvad = {
        enable = false;
        configFile = "${builtins.storeDir}/x.conf";
      };
    } [ ];

    "a port that two tunnels publish" =
      refused
        {
          services.vpn-exec.tunnels = {
            a = {
              configFile = "/x";
              publish = [ "8080:80" ];
            };
            b = {
              configFile = "/x";
              settings.local.publish = [ "127.0.0.1:8080:90" ];
            };
          };
        }
        [
          "services.vpn-exec.tunnels: the tcp port 8080 of the host is published by both `a` and `b`: give one of them another port, or another address."
        ];
    "IPv6 addresses while IPv6 is off" =
      refused
        (with' {
          networking.enableIPv6 = false;
          services.vpn-exec.tunnels.mullvad = {
            dns = [ "fd00::1" ];
            local.networks = [ "fd00::/8" ];
          };
        })
        [
          "services.vpn-exec.tunnels.mullvad: `fd00::/8`, `fd00::1` cannot be used, because `networking.enableIPv6` is off: remove the IPv6 addresses."
        ];

    "PrivateNetwork" = refused (service { serviceConfig.PrivateNetwork = true; }) [
      (web "the unit has PrivateNetwork=yes, a network without a route out: set PrivateNetwork=no in the unit")
    ];
    "another namespace" =
      refused (service { serviceConfig.NetworkNamespacePath = "/run/netns/other"; })
        [
          (web "the unit already has NetworkNamespacePath=/run/netns/other, and a service can be in one network namespace only: remove that line")
        ];
    "the tunnel's own namespace is valid" = refused (service {
      serviceConfig.NetworkNamespacePath = "/run/netns/mullvad";
    }) [ ];
    "JoinsNamespaceOf" = refused (service { unitConfig.JoinsNamespaceOf = "one.service"; }) [
      (web "the unit has JoinsNamespaceOf=one.service, and would share the network of that unit: remove that line, and put both into the tunnel")
    ];
    "the system bus" = refused (service { serviceConfig.Type = "dbus"; }) [
      (web "the unit has Type=dbus, and the system bus is hidden, because it lets a service ask the host to look up names: `vpn-exec.dbus = \"system\"` shows it")
    ];
    "the system bus, if requested" = refused (service {
      serviceConfig.Type = "dbus";
      vpn-exec.dbus = "system";
    }) [ ];
    "an invisible PID file" = refused (service { serviceConfig.PIDFile = "/run/web.pid"; }) [
      (web "the unit has PIDFile=/run/web.pid, which systemd would not see, because the service has a private /run: put it into a folder of RuntimeDirectory=, or show its folder with `vpn-exec.allowRunPaths`")
    ];
    "a path to the host's resolver" =
      refused (service { vpn-exec.allowRunPaths = [ "/run/systemd/resolve" ]; })
        [
          (web "cannot show /run/systemd/resolve: the host looks up names through /run/systemd/resolve*, bypassing the tunnel")
        ];

    "a unit that shows the host's resolver" =
      refused (service { serviceConfig.BindReadOnlyPaths = [ "/run/nscd" ]; })
        [
          (web "the unit binds /run/nscd, through which the host looks up names, bypassing the tunnel: remove that bind")
        ];

    "a socket outside" =
      refused
        (with' {
          imports = [ (service { }) ];
          systemd.sockets.web.listenStreams = [
            "80"
            "/run/web.sock"
          ];
        })
        [
          (web "web.socket listens on 80 outside of the tunnel, and its answers would bypass the tunnel: publish a port of the tunnel instead and disable web.socket, or let it listen inside (`systemd.sockets.web.vpn-exec.tunnel = \"mullvad\"`)")
        ];
    "a socket of another name outside" =
      refused
        (with' {
          imports = [ (service { }) ];
          systemd.sockets.other = {
            listenStreams = [ "80" ];
            socketConfig.Service = "web.service";
          };
        })
        [
          (web "other.socket listens on 80 outside of the tunnel, and its answers would bypass the tunnel: publish a port of the tunnel instead and disable other.socket, or let it listen inside (`systemd.sockets.other.vpn-exec.tunnel = \"mullvad\"`)")
        ];
    "a socket inside is valid" = refused (with' {
      imports = [ (service { }) ];
      systemd.sockets.web = {
        listenStreams = [ "80" ];
        vpn-exec.tunnel = "mullvad";
      };
    }) [ ];
    "a socket in another namespace" =
      refused
        (with' {
          systemd.sockets.web = {
            vpn-exec.tunnel = "mullvad";
            socketConfig.NetworkNamespacePath = "/run/netns/other";
          };
        })
        [
          "systemd.sockets.web is in the tunnel `mullvad`, and has NetworkNamespacePath=/run/netns/other: remove one of them."
        ];

    "overridden masks" =
      refused (service { serviceConfig.TemporaryFileSystem = lib.mkForce [ "/tmp" ]; })
        [
          "systemd.services.web.serviceConfig.TemporaryFileSystem is overridden, and lacks the entries that keep the service in its tunnel: use a list instead of `mkForce`, so that both are merged."
        ];
    "no namespaces at all is stricter" = refused (service {
      serviceConfig.RestrictNamespaces = lib.mkForce true;
    }) [ ];
    "some namespaces are not" =
      refused (service { serviceConfig.RestrictNamespaces = lib.mkForce [ "net" ]; })
        [
          "systemd.services.web.serviceConfig.RestrictNamespaces is overridden, and lacks the entries that keep the service in its tunnel: use a list instead of `mkForce`, so that both are merged."
        ];
    "extended masks are valid" = refused (service {
      serviceConfig = {
        TemporaryFileSystem = "/tmp";
        BindReadOnlyPaths = [ "/srv" ];
        BindPaths = "/srv";
      };
    }) [ ];

    "a wrapper's unknown tunnel" =
      refused
        {
          programs.vpn-exec.wrappers.fox = {
            package = pkgs.firefox;
            tunnel = "ivpn";
          };
        }
        [
          "programs.vpn-exec.wrappers.fox: no enabled tunnel `ivpn` in `services.vpn-exec.tunnels`."
        ];
    "a wrapper's name" =
      refused
        (with' {
          programs.vpn-exec.wrappers."a b" = {
            package = pkgs.firefox;
            tunnel = "mullvad";
          };
        })
        [
          "programs.vpn-exec.wrappers.a b: invalid command name: use letters, digits and _ . + -."
        ];
    "a wrapper without sudo" =
      refused
        (with' {
          security.sudo.enable = false;
          programs.vpn-exec.wrappers.fox = {
            package = pkgs.firefox;
            tunnel = "mullvad";
          };
        })
        [ "programs.vpn-exec.wrappers: entering a tunnel needs root, and `security.sudo.enable` is off." ];
    "a wrapper for a group without sudo" =
      refused
        (with' {
          security.sudo.execWheelOnly = true;
          programs.vpn-exec = {
            group = "media";
            wrappers.fox = {
              package = pkgs.firefox;
              tunnel = "mullvad";
            };
          };
        })
        [
          "programs.vpn-exec.group: members of `media` cannot use sudo, because `security.sudo.execWheelOnly` is on."
        ];
  };

  # --- Wiring.

  full = evaluate {
    services.vpn-exec.tunnels.mullvad = {
      configFile = "/run/secrets/mullvad.conf";
      backend = "userspace";
      mtu = 1380;
      wait = 20;
      dns = [ "10.64.0.1" ];
      dnsFor."home.arpa" = [ "192.168.1.1" ];
      local = {
        networks = [ "192.168.1.0/24" ];
        lan = true;
        hostPorts = [ "5432" ];
      };
      publish = [
        "9091:9091"
        "80:80"
      ];
      openFirewall = true;
      openPorts = [
        51413
        "6881-6889/udp"
      ];
      settings.dns.options = [ "edns0" ];
      settings.program.user = "alice";
    };
    services.vpn-exec.tunnels.lazy = {
      configFile = /run/secrets/lazy.conf;
      autoStart = false;
      publish = [ "1234:1234" ];
    };
    services.vpn-exec.tunnels.off = {
      enable = false;
      configFile = "/x";
      publish = [ "80:80" ];
      openFirewall = true;
    };
    systemd.services.transmission = {
      wantedBy = [ "multi-user.target" ];
      vpn-exec = {
        tunnel = "mullvad";
        restrict = true;
        allowRunPaths = [ "/run/postgresql" ];
        dbus = "system";
      };
      serviceConfig = {
        RuntimeDirectory = "transmission";
        ProtectHome = "tmpfs";
        RestrictNamespaces = "user";
        # As in NixOS's module for Transmission.
        BindPaths = [
          "/srv/downloads"
          "/run"
        ];
      };
    };
    systemd.services.by-timer.vpn-exec.tunnel = "mullvad";
    systemd.services.off = {
      enable = false;
      wantedBy = [ "multi-user.target" ];
      vpn-exec.tunnel = "mullvad";
    };
    systemd.services.elsewhere = {
      wantedBy = [ "multi-user.target" ];
      serviceConfig.BindPaths = [ "/run" ];
    };
    systemd.services.sockets.wantedBy = [ "multi-user.target" ];
    systemd.sockets.web = {
      wantedBy = [ "sockets.target" ];
      listenStreams = [ "80" ];
      vpn-exec.tunnel = "mullvad";
    };
    systemd.sockets.by-hand.vpn-exec.tunnel = "mullvad";
    programs.vpn-exec = {
      group = "surfers";
      wrappers.fox = {
        package = pkgs.firefox;
        tunnel = "mullvad";
        args = [
          "--profile"
          "/home/a b"
        ];
      };
    };
  };
  inherit (full.systemd) services sockets;
  transmission = services.transmission;
  wrapped = with' {
    programs.vpn-exec.wrappers.fox = {
      package = pkgs.firefox;
      tunnel = "mullvad";
    };
  };
  keeper = services."vpn-exec@mullvad";
  keeperText = config: surroundings.serviceText config.systemd.services."vpn-exec@mullvad";
  nscd = services.vpn-exec-nscd-mullvad;
  withoutNscd = evaluate (service { } // { services.nscd.enable = false; });
  etc = full.environment.etc;

  wiring = {
    "the module adds only these services" = {
      actual = lib.attrNames services;
      expected = [
        "by-timer"
        "elsewhere"
        "off"
        "sockets"
        "transmission"
        "vpn-exec-nscd-lazy"
        "vpn-exec-nscd-mullvad"
        "vpn-exec@lazy"
        "vpn-exec@mullvad"
      ];
    };
    "a service outside of a tunnel is unchanged" = {
      actual = {
        inherit (services.elsewhere)
          serviceConfig
          bindsTo
          after
          wants
          ;
      };
      expected = {
        serviceConfig.BindPaths = [ "/run" ];
        bindsTo = [ ];
        after = [ ];
        wants = [ ];
      };
    };

    "a service starts and stops with its tunnel" = {
      actual = { inherit (transmission) bindsTo after; };
      expected = {
        bindsTo = [ "vpn-exec@mullvad.service" ];
        after = [
          "vpn-exec@mullvad.service"
          "vpn-exec-nscd-mullvad.service"
        ];
      };
    };
    "it has the tunnel's network, and cannot enter another" = {
      actual = { inherit (transmission.serviceConfig) NetworkNamespacePath RestrictNamespaces; };
      # In this order: the preset's restriction, the service's exception, and ours.
      expected = {
        NetworkNamespacePath = "/run/netns/mullvad";
        RestrictNamespaces = [
          "yes"
          "user"
          "~net"
        ];
      };
    };
    "it sees its own paths" = {
      actual = transmission.serviceConfig.BindPaths;
      expected = [
        "/srv/downloads"
        "-/run/dbus -/run/lock -/run/systemd/journal -/run/systemd/notify -/run/systemd/userdb"
        "/run/postgresql"
        "/run/transmission"
      ];
    };
    "its resolver files are the tunnel's" = {
      actual = transmission.serviceConfig.BindReadOnlyPaths;
      expected = [
        "/run/vpn-exec/mullvad/resolv.conf:/etc/resolv.conf:norbind"
        "/run/vpn-exec/mullvad/hosts:/etc/hosts:norbind"
        "/run/vpn-exec/mullvad/nsswitch.conf:/etc/nsswitch.conf:norbind"
        "-/run/agenix -/run/booted-system -/run/current-system -/run/keys -/run/opengl-driver -/run/secrets"
        "/run/vpn-exec-nscd/mullvad:/run/nscd"
      ];
    };
    "it does not see other paths" = {
      actual = { inherit (transmission.serviceConfig) TemporaryFileSystem InaccessiblePaths; };
      expected = {
        TemporaryFileSystem = [
          "/run:mode=0755,nosuid,nodev"
          "/sys/class/net:ro /sys/devices/virtual/net:ro"
        ];
        InaccessiblePaths = [ "-/var/lib/sss/pipes" ];
      };
    };
    "hardening is optional" = {
      actual = [
        (transmission.serviceConfig.ProtectSystem or null)
        (services.by-timer.serviceConfig.ProtectSystem or null)
      ];
      expected = [
        "strict"
        null
      ];
    };
    "a service's own settings override hardening" = {
      actual = transmission.serviceConfig.ProtectHome;
      expected = "tmpfs";
    };

    "a tunnel's nscd runs inside" = {
      actual = {
        inherit (nscd) bindsTo after wants;
        inherit (nscd.serviceConfig)
          NetworkNamespacePath
          ExecStart
          User
          RuntimeDirectory
          RuntimeDirectoryPreserve
          BindPaths
          ;
        library = nscd.environment.LD_LIBRARY_PATH;
        masked = lib.elem "/run/vpn-exec/mullvad/resolv.conf:/etc/resolv.conf:norbind" nscd.serviceConfig.BindReadOnlyPaths;
        # Its own folder replaces the host's.
        others = lib.filter (lib.hasSuffix ":/run/nscd") nscd.serviceConfig.BindReadOnlyPaths;
      };
      expected = {
        bindsTo = [ "vpn-exec@mullvad.service" ];
        after = [ "vpn-exec@mullvad.service" ];
        wants = [ ];
        NetworkNamespacePath = "/run/netns/mullvad";
        ExecStart = "${pkgs.nsncd}/bin/nsncd";
        User = "nscd";
        RuntimeDirectory = "vpn-exec-nscd/mullvad";
        RuntimeDirectoryPreserve = "yes";
        BindPaths = [
          "/run/vpn-exec-nscd/mullvad:/run/nscd"
          "-/run/lock -/run/systemd/journal -/run/systemd/notify -/run/systemd/userdb"
          "/run/vpn-exec-nscd/mullvad"
        ];
        library = full.system.nssModules.path;
        masked = true;
        others = [ ];
      };
    };
    "it restarts when the files below the tunnel's change" = {
      actual =
        (evaluate (with' {
          environment.etc.hosts.source = "/the/hosts";
          environment.etc.other.source = "/other";
        })).systemd.services.vpn-exec-nscd-mullvad.restartTriggers;
      expected = [ "/the/hosts" ];
    };
    "a service starts it" = {
      actual = transmission.wants;
      expected = [ "vpn-exec-nscd-mullvad.service" ];
    };
    "no nscd inside without one on the host" = {
      actual = {
        services = lib.attrNames withoutNscd.systemd.services;
        inherit (withoutNscd.systemd.services.web) after wants;
        binds = lib.filter (lib.hasSuffix ":/run/nscd") withoutNscd.systemd.services.web.serviceConfig.BindReadOnlyPaths;
      };
      expected = {
        services = [
          "vpn-exec@mullvad"
          "web"
        ];
        after = [ "vpn-exec@mullvad.service" ];
        wants = [ ];
        binds = [ ];
      };
    };

    "a tunnel is a drop-in for the package's unit" = {
      actual = {
        inherit (keeper) overrideStrategy wantedBy stopIfChanged;
        inherit (keeper.serviceConfig) LoadCredential TimeoutStartSec;
        packages = map (it: it.name) full.systemd.packages;
      };
      expected = {
        overrideStrategy = "asDropin";
        wantedBy = [ "multi-user.target" ];
        stopIfChanged = false;
        LoadCredential = [ "vpn-exec.mullvad:/run/secrets/mullvad.conf" ];
        TimeoutStartSec = 80;
        packages = [ "package-of-this-repository" ];
      };
    };
    "without autoStart, a service starts its tunnel" = {
      actual = {
        inherit (services."vpn-exec@lazy") wantedBy;
        inherit (services."vpn-exec@lazy".serviceConfig) LoadCredential;
      };
      expected = {
        wantedBy = [ ];
        LoadCredential = [ "vpn-exec.lazy:/run/secrets/lazy.conf" ];
      };
    };
    "a tunnel for containers waits for a container" = {
      actual =
        let
          config = evaluate {
            services.vpn-exec.tunnels.pods = {
              configFile = "/run/secrets/pods.conf";
              containers = true;
            };
          };
        in
        {
          inherit (config.systemd.services."vpn-exec@pods") wantedBy;
          profile = builtins.fromTOML config.environment.etc."vpn-exec/pods.toml".source.environment.text;
        };
      expected = {
        wantedBy = [ ];
        profile = {
          wireguard = "/run/secrets/pods.conf";
          containers = true;
        };
      };
    };
    "enabled units start with the tunnel" = {
      actual = lib.mapAttrs (_: lib.mapAttrs (_: unit: unit.wantedBy)) {
        services = {
          inherit (services)
            transmission
            by-timer
            off
            elsewhere
            ;
        };
        sockets = {
          inherit (sockets) web by-hand;
        };
      };
      expected = {
        services = {
          transmission = [
            "multi-user.target"
            "vpn-exec@mullvad.service"
          ];
          by-timer = [ ];
          off = [ "multi-user.target" ];
          elsewhere = [ "multi-user.target" ];
        };
        sockets = {
          web = [
            "sockets.target"
            "vpn-exec@mullvad.service"
          ];
          by-hand = [ ];
        };
      };
    };
    # NixOS compares the files, and would restart a changed tunnel with everything inside.
    "another service inside does not change the tunnel" = {
      actual = lib.all (more: keeperText (evaluate (with' more)) == keeperText (evaluate tunnel)) [
        {
          systemd.services.web = {
            wantedBy = [ "multi-user.target" ];
            vpn-exec.tunnel = "mullvad";
          };
        }
        {
          systemd.sockets.web = {
            wantedBy = [ "sockets.target" ];
            vpn-exec.tunnel = "mullvad";
          };
        }
      ];
      expected = true;
    };
    "a changed profile reloads the tunnel, fixed settings restart it" = {
      actual = {
        reload = map (it: it.outPath) keeper.reloadTriggers;
        restart = map builtins.fromJSON keeper.restartTriggers;
      };
      expected = {
        reload = [ etc."vpn-exec/mullvad.toml".source.outPath ];
        restart = [
          {
            backend = "userspace";
            privileged = [ "80:80" ];
            raw = false;
          }
        ];
      };
    };

    "the profile" = {
      actual = builtins.fromTOML etc."vpn-exec/mullvad.toml".source.environment.text;
      expected = {
        wireguard = "credential:vpn-exec.mullvad";
        backend = "userspace";
        mtu = 1380;
        wait = 20;
        open = [
          "51413"
          "6881-6889/udp"
        ];
        dns = {
          servers = [ "10.64.0.1" ];
          options = [ "edns0" ];
          for."home.arpa" = [ "192.168.1.1" ];
        };
        local = {
          networks = [ "192.168.1.0/24" ];
          lan = true;
          publish = [
            "9091:9091"
            "80:80"
          ];
          host-ports = [ "5432" ];
        };
        program.user = "alice";
      };
    };
    "the profile of a tunnel with defaults" = {
      actual =
        builtins.fromTOML
          (evaluate tunnel).environment.etc."vpn-exec/mullvad.toml".source.environment.text;
      expected.wireguard = "credential:vpn-exec.mullvad";
    };
    "the program checks the profile" = {
      actual =
        lib.hasInfix "/bin/vpn-exec check --profile-only mullvad.toml\n"
          etc."vpn-exec/mullvad.toml".source.script;
      expected = true;
    };
    "a foreign build platform skips the check" = {
      actual =
        (evaluate (with' {
          services.vpn-exec.checkProfiles = false;
        })).environment.etc."vpn-exec/mullvad.toml".source.text;
      expected = "wireguard = \"credential:vpn-exec.mullvad\"\n";
    };
    "no other files" = {
      actual = lib.attrNames etc;
      expected = [
        "vpn-exec/lazy.toml"
        "vpn-exec/mullvad.toml"
      ];
    };

    "openFirewall opens the firewall" = {
      actual = full.networking.firewall.allowedTCPPorts;
      expected = [
        9091
        80
      ];
    };
    "ports of the host are open on the tunnel's link alone" = {
      actual =
        let
          of =
            more:
            (evaluate {
              imports = [ more ];
              services.vpn-exec.tunnels = {
                mullvad = {
                  configFile = "/x";
                  local.hostPorts = [
                    "5432"
                    "6000-6010/udp"
                  ];
                };
                thirteen-char = {
                  configFile = "/x";
                  settings.local.host-ports = [ "631" ];
                };
                without.configFile = "/x";
              };
            }).networking.firewall;
          iptables = of { };
        in
        {
          interfaces = lib.mapAttrs (_: it: {
            tcp = it.allowedTCPPorts;
            udp = it.allowedUDPPortRanges;
          }) iptables.interfaces;
          everywhere = iptables.allowedTCPPorts;
          nftables = lib.attrNames (of { networking.nftables.enable = true; }).interfaces;
        };
      expected = {
        interfaces = {
          ve-mullvad = {
            tcp = [ 5432 ];
            udp = [
              {
                from = 6000;
                to = 6010;
              }
            ];
          };
          "ve-thirt-+" = {
            tcp = [ 631 ];
            udp = [ ];
          };
        };
        everywhere = [ ];
        nftables = [
          "ve-mullvad"
          "ve-thirt-*"
        ];
      };
    };
    "a firewall that drops forwarded packets accepts a tunnel's with local networks" = {
      actual =
        map
          (
            filterForward:
            (evaluate {
              networking.firewall = { inherit filterForward; };
              services.vpn-exec.tunnels = {
                networks = {
                  configFile = "/x";
                  local.networks = [ "192.168.1.0/24" ];
                };
                lan = {
                  configFile = "/x";
                  local.lan = true;
                };
                without.configFile = "/x";
              };
            }).networking.firewall.extraForwardRules
          )
          [
            true
            false
          ];
      expected = [
        "iifname ve-lan accept\n\niifname ve-networks accept\n"
        ""
      ];
    };
    "network managers ignore the links" = {
      actual = {
        inherit (full.networking.dhcpcd) denyInterfaces;
        inherit (full.networking.networkmanager) unmanaged;
        networkd = full.systemd.network.networks."10-vpn-exec-mullvad";
      };
      expected = {
        denyInterfaces = [ "ve-*" ];
        unmanaged = [ "interface-name:ve-*" ];
        networkd = {
          matchConfig.Name = "ve-mullvad ve-mullv-*";
          linkConfig.Unmanaged = true;
        };
      };
    };
    "without tunnels the host is unchanged" = {
      actual =
        let
          config = evaluate { };
        in
        {
          inherit (config.networking.dhcpcd) denyInterfaces;
          inherit (config.environment) etc systemPackages;
          inherit (config.systemd) packages services;
        };
      expected = {
        denyInterfaces = [ ];
        etc = { };
        systemPackages = [ ];
        packages = [ ];
        services = { };
      };
    };

    "read-only options for use elsewhere" = {
      actual = { inherit (full.services.vpn-exec.tunnels.mullvad) netnsPath unit; };
      expected = {
        netnsPath = "/run/netns/mullvad";
        unit = "vpn-exec@mullvad.service";
      };
    };

    "a socket listens inside, and waits for the tunnel" = {
      actual = {
        inherit (sockets.web)
          bindsTo
          after
          before
          conflicts
          ;
        inherit (sockets.web.unitConfig) DefaultDependencies;
        inherit (sockets.web.socketConfig) NetworkNamespacePath;
      };
      expected = {
        bindsTo = [ "vpn-exec@mullvad.service" ];
        after = [
          "sysinit.target"
          "vpn-exec@mullvad.service"
        ];
        before = [ "shutdown.target" ];
        conflicts = [ "shutdown.target" ];
        DefaultDependencies = false;
        NetworkNamespacePath = "/run/netns/mullvad";
      };
    };

    "a wrapper enters through sudo, for members of the group" = {
      actual = {
        rules = map (rule: {
          inherit (rule) groups;
          options = map (it: it.options) rule.commands;
        }) full.security.sudo.extraRules;
        commands = map (it: it.command) (lib.head full.security.sudo.extraRules).commands;
        keeps = lib.hasInfix "WAYLAND_DISPLAY" full.security.sudo.extraConfig;
        # None of them changes what root's script does.
        dangerous = lib.filter (name: lib.hasInfix name full.security.sudo.extraConfig) [
          "LD_"
          "PATH"
          "HOME"
          "CONFIG"
          "SUDO_"
        ];
      };
      expected = {
        rules = [
          {
            groups = [ "surfers" ];
            options = [ [ "NOPASSWD" ] ];
          }
        ];
        commands = [ "/nix/store/00000000000000000000000000000000-vpn-exec-enter-fox" ];
        keeps = true;
        dangerous = [ ];
      };
    };
    "a wrapper's root script starts the tunnel and enters it" = {
      actual =
        let
          # The stand-in of a script is its text.
          config = evaluate {
            imports = [ wrapped ];
            _module.args.pkgs = lib.mkForce (pkgs // { writeShellScript = _: text: text; });
            programs.vpn-exec.wrappers.fox = {
              args = [ "--profile=/a b" ];
              sockets = [ "/run/x.sock" ];
              dbus = [ "session" ];
              dbusTalk = [ "org.example.Fox" ];
            };
          };
        in
        map (it: it.command) (lib.head config.security.sudo.extraRules).commands;
      expected = [
        (
          "/nix/store/00000000000000000000000000000000-systemd/bin/systemctl start vpn-exec@mullvad.service &&\n"
          + "exec /nix/store/00000000000000000000000000000000-package-of-this-repository/bin/vpn-exec --tunnel mullvad "
          + "--socket /run/x.sock --dbus session --dbus-talk org.example.Fox -- "
          + "/nix/store/00000000000000000000000000000000-firefox/bin/firefox '--profile=/a b' \"$@\"\n"
        )
      ];
    };
    "a wrapper's sudo rule comes last" = {
      actual =
        map (rule: rule.commands == [ "ALL" ])
          (evaluate {
            imports = [ wrapped ];
            security.sudo.extraRules = [
              {
                groups = [ "wheel" ];
                commands = [ "ALL" ];
              }
            ];
          }).security.sudo.extraRules;
      expected = [
        true
        false
      ];
    };
    "a wrapper runs only its program" = {
      actual =
        let
          fox = lib.findFirst (it: it.name == "fox-in-mullvad") null full.environment.systemPackages;
        in
        {
          inherit (fox.environment) name tunnel;
          command = fox.environment.command.text;
        };
      expected = {
        name = "fox";
        tunnel = "mullvad";
        command = "exec /run/wrappers/bin/sudo -n -- /nix/store/00000000000000000000000000000000-vpn-exec-enter-fox \"$@\"\n";
      };
    };
  };

  # --- VPN-Confinement's options, from its README.

  compat = evaluateCompat {
    vpnNamespaces.wg = {
      enable = true;
      wireguardConfigFile = /. + "/secrets/wg0.conf";
      accessibleFrom = [
        "192.168.0.0/24"
        "127.0.0.1"
        "fd25:9ab6:6133::/64"
        "::"
      ];
      portMappings = [
        {
          from = 9091;
          to = 9091;
        }
        {
          from = 53;
          to = 5353;
          protocol = "both";
        }
      ];
      openVPNPorts = [
        {
          port = 60729;
          protocol = "both";
        }
        { port = 1; }
      ];
    };
    systemd.services.transmission.vpnConfinement = {
      enable = true;
      vpnNamespace = "wg";
    };
    systemd.services.off.vpnConfinement.vpnNamespace = "wg";
  };
  wg = compat.services.vpn-exec.tunnels.wg;

  confinement = {
    "VPN-Confinement: a namespace is a tunnel" = {
      actual = builtins.fromTOML compat.environment.etc."vpn-exec/wg.toml".source.environment.text;
      expected = {
        wireguard = "credential:vpn-exec.wg";
        open = [
          "60729"
          "1/tcp"
        ];
        local = {
          networks = [
            "192.168.0.0/24"
            "fd25:9ab6:6133::/64"
          ];
          publish = [
            "9091:9091/tcp"
            "53:5353/tcp"
            "53:5353/udp"
          ];
        };
      };
    };
    "VPN-Confinement: only its networks reach its ports" = {
      actual = {
        inherit (compat.networking.firewall) allowedTCPPorts extraCommands extraInputRules;
        nftables =
          (evaluateCompat {
            networking.nftables.enable = true;
            vpnNamespaces = {
              wg = {
                wireguardConfigFile = "/x";
                accessibleFrom = [ "192.168.1.27" ];
                portMappings = [
                  {
                    from = 9091;
                    to = 9091;
                  }
                ];
              };
              off = {
                enable = false;
                wireguardConfigFile = "/x";
                accessibleFrom = [ "192.168.1.27" ];
                portMappings = [
                  {
                    from = 1;
                    to = 1;
                  }
                ];
              };
            };
          }).networking.firewall.extraInputRules;
        file = toString wg.configFile;
      };
      expected = {
        allowedTCPPorts = [ ];
        extraInputRules = "";
        extraCommands = lib.concatStrings [
          "iptables -A nixos-fw -s 192.168.0.0/24 -p tcp --dport 9091 -j nixos-fw-accept\n"
          "iptables -A nixos-fw -s 192.168.0.0/24 -p tcp --dport 53 -j nixos-fw-accept\n"
          "iptables -A nixos-fw -s 192.168.0.0/24 -p udp --dport 53 -j nixos-fw-accept\n"
          "ip6tables -A nixos-fw -s fd25:9ab6:6133::/64 -p tcp --dport 9091 -j nixos-fw-accept\n"
          "ip6tables -A nixos-fw -s fd25:9ab6:6133::/64 -p tcp --dport 53 -j nixos-fw-accept\n"
          "ip6tables -A nixos-fw -s fd25:9ab6:6133::/64 -p udp --dport 53 -j nixos-fw-accept\n"
        ];
        nftables = "ip saddr 192.168.1.27 tcp dport 9091 accept\n";
        file = "/secrets/wg0.conf";
      };
    };
    "VPN-Confinement: IPv6 networks are dropped where IPv6 is off" = {
      actual =
        let
          config = evaluateCompat {
            networking.enableIPv6 = false;
            vpnNamespaces.wg = {
              wireguardConfigFile = "/x";
              accessibleFrom = [
                "192.168.0.0/24"
                "fd25:9ab6:6133::/64"
              ];
            };
          };
        in
        {
          failures = failures config;
          inherit (config.services.vpn-exec.tunnels.wg.local) networks;
        };
      expected = {
        failures = [ ];
        networks = [ "192.168.0.0/24" ];
      };
    };
    "VPN-Confinement: its former names" = {
      actual =
        (evaluateCompat {
          vpnnamespaces.wg.wireguardConfigFile = "/x";
          systemd.services.x.vpnconfinement = {
            enable = true;
            vpnnamespace = "wg";
          };
        }).systemd.services.x.vpn-exec.tunnel;
      expected = "wg";
    };
    "root with CAP_SYS_ADMIN causes a warning" = {
      actual = map (settings: (evaluate (service settings)).warnings) [
        { }
        { serviceConfig.User = "web"; }
        { vpn-exec.restrict = true; }
      ];
      expected = [
        [
          "systemd.services.web: web.service runs as root with CAP_SYS_ADMIN, and can leave the tunnel: set User= or DynamicUser=yes, or CapabilityBoundingSet=~CAP_SYS_ADMIN CAP_SYS_PTRACE, or `vpn-exec.restrict`."
        ]
        [ ]
        [ ]
      ];
    };
    # From the example in its README.
    "VPN-Confinement: a lost address causes a warning" = {
      actual =
        map (text: builtins.match ".*rpc-bind-address is (.*), an address.*" text)
          (evaluateCompat {
            vpnNamespaces.wg.wireguardConfigFile = "/x";
            services.transmission.settings.rpc-bind-address = "192.168.15.1";
          }).warnings;
      expected = [ [ "192.168.15.1" ] ];
    };
    "VPN-Confinement: its services are in the tunnel" = {
      actual = {
        inside = compat.systemd.services.transmission.vpn-exec.tunnel;
        outside = compat.systemd.services.off.vpn-exec.tunnel;
        failures = failures compat;
      };
      expected = {
        inside = "wg";
        outside = null;
        failures = [ ];
      };
    };
    "VPN-Confinement: options without effect cause warnings" = {
      actual =
        map (text: builtins.match ".*(namespaceAddress|bridgeAddress).*host.internal.*" text)
          (evaluateCompat {
            vpnNamespaces.wg = {
              wireguardConfigFile = "/x";
              namespaceAddress = "192.168.20.1";
            };
            vpnNamespaces.same = {
              wireguardConfigFile = "/x";
            };
          }).warnings;
      expected = [ [ "namespaceAddress" ] ];
    };
    "VPN-Confinement: a service needs its namespace's name" = {
      actual = failures (evaluateCompat {
        systemd.services.x.vpnConfinement.enable = true;
      });
      expected = [ "systemd.services.x.vpnConfinement: `vpnNamespace` is missing." ];
    };
  };

  # --- The package, with a stand-in for nixpkgs.

  package =
    emulator:
    import ../package.nix {
      lib = lib // {
        # Nix 2.8 cannot tell files from folders.
        fileset = {
          toSource = lib.id;
          unions = map baseNameOf;
        };
      };
      stdenv.hostPlatform = {
        emulatorAvailable = _: emulator != null;
        emulator = _: emulator;
      };
      buildPackages = { };
      rustPlatform.buildRustPackage = lib.id;
      installShellFiles = "installShellFiles";
    };
  manifest = lib.importTOML ../../Cargo.toml;

  packaging = {
    "the package matches the manifest" = {
      actual = {
        inherit (package null) pname version;
        inherit ((package null).meta) mainProgram;
        licenses = map (it: it.spdxId) (package null).meta.license;
        lock = baseNameOf (package null).cargoLock.lockFile;
      };
      expected = {
        inherit (manifest.package) version;
        pname = manifest.package.name;
        mainProgram = manifest.package.name;
        licenses = [
          "MIT"
          "Apache-2.0"
          "LGPL-2.1-or-later"
        ];
        lock = "Cargo.lock";
      };
    };
    "the package's sources are those that cargo needs, without these tests" = {
      actual = (package null).src.fileset;
      expected = [
        "Cargo.lock"
        "Cargo.toml"
        "benches"
        "examples"
        "src"
        "tests"
        "units"
      ];
    };
    "the package prints its completions and man page if it can run" = {
      actual =
        map
          (
            emulator:
            builtins.match ".*<\\((.*) completions bash\\).*" (
              builtins.replaceStrings [ "\n" ] [ " " ] (package emulator).postInstall
            )
          )
          [
            "/emulator"
            null
          ];
      expected = [
        [ "/emulator $out/bin/vpn-exec" ]
        null
      ];
    };
  };

  # --- The examples of the documentation.

  examples = (import ./examples.nix { inherit lib surroundings; }).cases;

  all = lib.mapAttrsToList (name: case: case // { inherit name; }) (
    lib.mapAttrs' (name: lib.nameValuePair "refused: ${name}") refusals
    // wiring
    // packaging
    // confinement
    // examples
  );
in
{
  passed = map (it: it.name) (lib.filter (it: it.actual == it.expected) all);
  failed = lib.filter (it: it.actual != it.expected) all;
}
