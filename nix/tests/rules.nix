# The pure rules, without nixpkgs: `nix-instantiate --eval --strict --json nix/tests/rules.nix`. Each case is what is decided and what should be.
let
  rules = import ../unit.nix // import ../tunnel.nix;
  inherit (builtins)
    attrNames
    concatLists
    filter
    head
    length
    map
    match
    pathExists
    readDir
    readFile
    ;

  # --- The files that `vpn-exec unit` is held to, too.
  agreed = ../../tests/unit;
  names = filter (name: name != null) (
    map (
      file:
      let
        found = match "(.*)\\.json" file;
      in
      if found == null then null else head found
    ) (attrNames (readDir agreed))
  );
  goldens = map (
    name:
    let
      file = ending: agreed + "/${name}.${ending}";
      case = builtins.fromJSON (readFile (file "json"));
      refusals = rules.refusals case;
    in
    {
      name = "tests/unit/${name}";
      is =
        if refusals == [ ] then
          rules.text case
          + builtins.concatStringsSep "" (map (it: "# warning: ${it}\n") (rules.warnings case))
        else
          builtins.concatStringsSep "" (map (it: "${it}\n") refusals);
      wanted = readFile (if pathExists (file "conf") then file "conf" else file "refused");
    }
  ) names;

  plain = {
    request = {
      service = "transmission";
      tunnel = "mullvad";
    };
  };
  with' = request: { request = plain.request // request; };

  cases = {
    "there are files that are agreed on" = {
      is = length names >= 8;
      wanted = true;
    };

    "an nscd of the tunnel takes the place of the host's" = {
      is = filter (line: match ".*nscd.*" line != null) (
        (rules.settings (with' {
          nscd = "/run/vpn-exec-nscd/mullvad";
        })).service.BindReadOnlyPaths
      );
      wanted = [ "/run/vpn-exec-nscd/mullvad:/run/nscd" ];
    };
    "without one nothing is there" = {
      is = match ".*:/run/nscd.*" (builtins.toJSON (rules.settings plain).service);
      wanted = null;
    };
    "which settings there are does not depend on the unit" = {
      is = attrNames (rules.settings (plain // { unit = throw "looked into"; })).service;
      wanted = attrNames (rules.settings plain).service;
    };
    "refusals speak the module's language where they are asked to" = {
      is =
        rules.refusalsIn
          {
            bus = "BUS";
            folder = "FOLDER";
          }
          (
            plain
            // {
              unit = {
                kind = "dbus";
                pid_file = "/run/x.pid";
              };
            }
          );
      wanted = [
        "the unit has Type=dbus, and the system bus is hidden, where anybody can have the host look names up: BUS"
        "the unit has PIDFile=/run/x.pid, which systemd would not see: /run is the service's own inside. Put it into a folder of RuntimeDirectory=, or FOLDER"
      ];
    };
    "a way around a pattern is none" = {
      is = map (rules.pathProblem "system") [
        "/run//nscd"
        "/run/./systemd/resolve"
        "/run/dbus"
        "/run/nsc"
      ];
      wanted = [
        "/run//nscd cannot be shown: /run/nscd* is there, by which the host looks names up, past the tunnel"
        "/run/./systemd/resolve cannot be shown: /run/systemd/resolve* is there, by which the host looks names up, past the tunnel"
        null
        null
      ];
    };

    "names of tunnels" = {
      is = map (name: rules.tunnelNameProblem name == null) [
        "mullvad"
        "_x.y-Z0"
        (builtins.concatStringsSep "" (builtins.genList (_: "x") 64))
        (builtins.concatStringsSep "" (builtins.genList (_: "x") 65))
        ""
        "-x"
        ".x"
        "a b"
        "a/b"
        "a=b"
        "a+b"
        "a@b"
        "ä"
        "a\nb"
      ];
      wanted = [
        true
        true
        true
        false
        false
        false
        false
        false
        false
        false
        false
        false
        false
        false
      ];
    };

    "where the provider's file can be" = {
      is = map (file: rules.configFileProblem file == null) [
        "/run/secrets/mullvad.conf"
        /run/secrets/mullvad.conf
        "/nix/storehouse/x"
        "/run/secrets/PrivateKey.conf"
      ];
      wanted = [
        true
        true
        true
        true
      ];
    };
    "where it cannot be" = {
      is =
        map
          (file: match ".*(contents|absolute|Nix store, which).*" (toString (rules.configFileProblem file)))
          [
            "mullvad.conf"
            "${builtins.storeDir}/x/mullvad.conf"
            "${builtins.storeDir}"
            "[Interface]\nPrivateKey = x"
            "PrivateKey=x"
            "iGxYvNQ5eVwPrTzY3Qe5MHfNxGbKxFfQyM7zq2nX8Vc="
            "/nix//store/x"
          ];
      wanted = [
        [ "absolute" ]
        [ "Nix store, which" ]
        [ "Nix store, which" ]
        [ "contents" ]
        [ "contents" ]
        [ "contents" ]
        [ "Nix store, which" ]
      ];
    };
    "a key is not repeated" = {
      is = match ".*iGxY.*" (rules.configFileProblem "iGxYvNQ5eVwPrTzY3Qe5MHfNxGbKxFfQyM7zq2nX8Vc=");
      wanted = null;
    };

    "published ports are read" = {
      is = map rules.publish [
        "8080:80"
        "127.0.0.1:8000-8009:9000-9009/udp"
        "[2001:db8::1]:080:80/TCP,proxy-protocol=v2"
        "80"
        "a:b"
      ];
      wanted = [
        {
          address = null;
          first = 8080;
          last = 8080;
          protocol = "tcp";
        }
        {
          address = "127.0.0.1";
          first = 8000;
          last = 8009;
          protocol = "udp";
        }
        {
          address = "[2001:db8::1]";
          first = 80;
          last = 80;
          protocol = "tcp";
        }
        null
        null
      ];
    };
    "what is published for all is let in" = {
      is = rules.firewall [
        "8080:80"
        "192.168.1.2:53:53/udp"
        "7000-7009:7000-7009"
        "127.0.0.1:1:1"
        "[::1]:2:2"
        "nonsense"
      ];
      wanted = {
        allowedTCPPorts = [ 8080 ];
        allowedTCPPortRanges = [
          {
            from = 7000;
            to = 7009;
          }
        ];
        allowedUDPPorts = [ 53 ];
        allowedUDPPortRanges = [ ];
      };
    };
    "a port belongs to one tunnel" = {
      is = rules.collisions {
        a = [
          "8080:80"
          "127.0.0.1:90:1"
          "100-200:100-200"
          "7:7/udp"
        ];
        b = [
          "192.168.1.2:8080:80"
          "127.0.0.2:90:1"
          "150:1"
          "7:7/tcp"
        ];
        c = [
          "0.0.0.0:90:1"
          "9:9"
          "9:9"
        ];
      };
      wanted = [
        {
          tunnels = [
            "a"
            "b"
          ];
          port = 8080;
          protocol = "tcp";
        }
        {
          tunnels = [
            "a"
            "c"
          ];
          port = 90;
          protocol = "tcp";
        }
        {
          tunnels = [
            "a"
            "b"
          ];
          port = 150;
          protocol = "tcp";
        }
        {
          tunnels = [
            "b"
            "c"
          ];
          port = 90;
          protocol = "tcp";
        }
      ];
    };
    "what is IPv6" = {
      is = rules.ipv6Entries {
        dns.servers = [
          "10.64.0.1"
          "fd00::1"
        ];
        local.networks = [
          "192.168.1.0/24"
          "fd00::/8"
        ];
        local.publish = [
          "127.0.0.1:1:1"
          "[::1]:1:1"
        ];
      };
      wanted = [
        "fd00::/8"
        "fd00::1"
        "[::1]:1:1"
      ];
    };
    "what a tunnel that is up cannot take over" = {
      is = map rules.fixed [
        { }
        {
          backend = "kernel";
          local.publish = [
            "80:80"
            "8080:80"
            "127.0.0.1:443-1100:443-1100"
          ];
          # The link to the host has IPv6 without them.
          local.networks = [ "fd00::/8" ];
          local.host-ports = [
            "631"
            "53/udp"
            "5432"
          ];
          program.capabilities = [
            "CAP_CHOWN"
            "net_raw"
          ];
        }
      ];
      wanted = [
        {
          backend = "auto";
          privileged = [ ];
          raw = false;
        }
        {
          backend = "kernel";
          privileged = [
            "80:80"
            "127.0.0.1:443-1100:443-1100"
            "631"
            "53/udp"
          ];
          raw = true;
        }
      ];
    };

    "a profile is TOML" = {
      is = builtins.fromTOML (
        rules.toml {
          wireguard = "a \"quoted\" \\ text";
          wait = 1.5;
          backend = null;
          open = [
            "1"
            "2/udp"
          ];
          dns = { };
          local = {
            lan = true;
            publish = [ ];
            deeper."a key".x = [ 1 ];
          };
          "odd key" = 1;
        }
      );
      wanted = {
        wireguard = "a \"quoted\" \\ text";
        wait = 1.5;
        open = [
          "1"
          "2/udp"
        ];
        local = {
          lan = true;
          publish = [ ];
          deeper."a key".x = [ 1 ];
        };
        "odd key" = 1;
      };
    };

    "who keeps CAP_SYS_ADMIN as root" = {
      is = map (serviceConfig: (rules.factsOf { inherit serviceConfig; }).privileged) [
        { }
        { User = "root"; }
        { CapabilityBoundingSet = "CAP_SYS_ADMIN CAP_KILL"; }
        { CapabilityBoundingSet = [ "~CAP_KILL" ]; }
        { User = "web"; }
        { DynamicUser = true; }
        { CapabilityBoundingSet = ""; }
        { CapabilityBoundingSet = [ "CAP_KILL" ]; }
        { CapabilityBoundingSet = "~CAP_SYS_ADMIN CAP_SYS_PTRACE"; }
      ];
      wanted = [
        true
        true
        true
        true
        false
        false
        false
        false
        false
      ];
    };
    "specifiers that say a path" = {
      is =
        let
          facts = rules.factsOf {
            name = "worker@";
            serviceConfig = {
              RuntimeDirectory = "%p/%i";
              BindPaths = "%t/nscd %S/x";
            };
          };
        in
        [
          facts.runtime_directories
          facts.bind_paths
        ];
      wanted = [
        [ "worker/%i" ]
        [
          "/run/nscd"
          "/var/lib/x"
        ]
      ];
    };
    "facts of a service" = {
      is = rules.factsOf {
        serviceConfig = {
          ExecStart = [
            ""
            "-@/nix/store/x/bin/podman run x"
          ];
          Type = "forking";
          RuntimeDirectory = [
            "a b:link"
            "c"
          ];
          ReadWritePaths = "/run/x -/run/y";
          ReadOnlyPaths = [ "/run/z" ];
          ExecPaths = "-+/run/ -/run/none";
          NoExecPaths = [ "/" ];
          PIDFile = "/run/a/pid";
          PrivateNetwork = "yes";
          BindReadOnlyPaths = "/srv:/x";
        };
        unitConfig.JoinsNamespaceOf = "one.service two.service";
      };
      wanted = {
        kind = "forking";
        programs = [
          ""
          "podman"
        ];
        privileged = true;
        runtime_directories = [
          "a"
          "b"
          "c"
        ];
        used_paths = [
          "/run/x"
          "/run/z"
          "/run"
          "/"
        ];
        pid_file = "/run/a/pid";
        private_network = true;
        network_namespace = null;
        joins_namespace_of = [
          "one.service"
          "two.service"
        ];
        bind_paths = [ "/srv:/x" ];
        sockets = [ ];
      };
    };
    "the host's /run is not put into the place of the service's own" = {
      is = [
        (rules.withoutRun [
          "/srv /run"
          "/run"
          "-/run/:/run/:rbind"
          "/x:/var/run"
          "/run:/host-run"
          "-/run/lock"
          "/run-x"
        ])
        (rules.withoutRun "/run /srv")
      ];
      wanted = [
        [
          "/srv"
          "/run:/host-run"
          "-/run/lock"
          "/run-x"
        ]
        "/srv"
      ];
    };
    "where a socket listens" = {
      is = rules.socketFactsOf "web" {
        listenStreams = [ "80" ];
        listenDatagrams = [ "53" ];
        socketConfig = {
          ListenStream = [ "81" ];
          ListenNetlink = "route";
          NetworkNamespacePath = "/x";
        };
      };
      wanted = {
        name = "web.socket";
        listens = [
          "80"
          "53"
          "81"
          "route"
        ];
        network_namespace = "/x";
      };
    };
    "what a socket starts" = {
      is = map (rules.serviceOfSocket "web") [
        { }
        { Accept = true; }
        { Service = "other.service"; }
      ];
      wanted = [
        "web.service"
        "web@.service"
        "other.service"
      ];
    };
  };

  all = goldens ++ map (name: cases.${name} // { inherit name; }) (attrNames cases);
in
{
  passed = map (it: it.name) (filter (it: it.is == it.wanted) all);
  failed = concatLists (map (it: if it.is == it.wanted then [ ] else [ it ]) all);
}
