# The pure rules, without nixpkgs: `nix-instantiate --eval --strict --json nix/tests/rules.nix`. Each case has an actual
# and an expected value.
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

  # --- The files that `vpn-exec unit` must match, too.
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
      actual =
        if refusals == [ ] then
          rules.text case
          + builtins.concatStringsSep "" (map (it: "# warning: ${it}\n") (rules.warnings case))
        else
          builtins.concatStringsSep "" (map (it: "${it}\n") refusals);
      expected = readFile (if pathExists (file "conf") then file "conf" else file "refused");
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
    "there are shared cases" = {
      actual = length names >= 8;
      expected = true;
    };

    "a tunnel's nscd replaces the host's" = {
      actual = filter (line: match ".*nscd.*" line != null) (
        (rules.settings (with' {
          nscd = "/run/vpn-exec-nscd/mullvad";
        })).service.BindReadOnlyPaths
      );
      expected = [ "/run/vpn-exec-nscd/mullvad:/run/nscd" ];
    };
    "without nscd there is no bind" = {
      actual = match ".*:/run/nscd.*" (builtins.toJSON (rules.settings plain).service);
      expected = null;
    };
    "the set of settings does not depend on the unit" = {
      actual = attrNames (rules.settings (plain // { unit = throw "looked into"; })).service;
      expected = attrNames (rules.settings plain).service;
    };
    "refusals use the module's advice" = {
      actual =
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
      expected = [
        "the unit has Type=dbus, and the system bus is hidden, because it lets a service ask the host to look up names: BUS"
        "the unit has PIDFile=/run/x.pid, which systemd would not see, because the service has a private /run: put it into a folder of RuntimeDirectory=, or FOLDER"
      ];
    };
    "paths cannot evade a pattern" = {
      actual = map (rules.pathProblem "system") [
        "/run//nscd"
        "/run/./systemd/resolve"
        "/run/dbus"
        "/run/nsc"
      ];
      expected = [
        "cannot show /run//nscd: the host looks up names through /run/nscd*, bypassing the tunnel"
        "cannot show /run/./systemd/resolve: the host looks up names through /run/systemd/resolve*, bypassing the tunnel"
        null
        null
      ];
    };

    "names of tunnels" = {
      actual = map (name: rules.tunnelNameProblem name == null) [
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
      expected = [
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

    "valid paths of the provider's file" = {
      actual = map (file: rules.configFileProblem file == null) [
        "/run/secrets/mullvad.conf"
        /run/secrets/mullvad.conf
        "/nix/storehouse/x"
        "/run/secrets/PrivateKey.conf"
      ];
      expected = [
        true
        true
        true
        true
      ];
    };
    "invalid paths of the provider's file" = {
      actual =
        map
          (file: match ".*(contents|absolute|Nix store, where).*" (toString (rules.configFileProblem file)))
          [
            "mullvad.conf"
            "${builtins.storeDir}/x/mullvad.conf"
            "${builtins.storeDir}"
            "[Interface]\nPrivateKey = x"
            "PrivateKey=x"
            "iGxYvNQ5eVwPrTzY3Qe5MHfNxGbKxFfQyM7zq2nX8Vc="
            "/nix//store/x"
          ];
      expected = [
        [ "absolute" ]
        [ "Nix store, where" ]
        [ "Nix store, where" ]
        [ "contents" ]
        [ "contents" ]
        [ "contents" ]
        [ "Nix store, where" ]
      ];
    };
    "an error does not show the key" = {
      actual = match ".*iGxY.*" (rules.configFileProblem "iGxYvNQ5eVwPrTzY3Qe5MHfNxGbKxFfQyM7zq2nX8Vc=");
      expected = null;
    };

    "published ports are parsed" = {
      actual = map rules.publish [
        "8080:80"
        "127.0.0.1:8000-8009:9000-9009/udp"
        "[2001:db8::1]:080:80/TCP,proxy-protocol=v2"
        "80"
        "a:b"
      ];
      expected = [
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
    "the firewall accepts ports published for all" = {
      actual = rules.firewall [
        "8080:80"
        "192.168.1.2:53:53/udp"
        "7000-7009:7000-7009"
        "127.0.0.1:1:1"
        "[::1]:2:2"
        "nonsense"
      ];
      expected = {
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
      actual = rules.collisions {
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
      expected = [
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
    "IPv6 entries" = {
      actual = rules.ipv6Entries {
        dns.servers = [
          "10.64.0.1"
          "fd00::1"
        ];
        dns.for."home.arpa" = [
          "192.168.1.1"
          "fd00::2"
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
      expected = [
        "fd00::/8"
        "fd00::1"
        "fd00::2"
        "[::1]:1:1"
      ];
    };
    "settings that are fixed while a tunnel is up" = {
      actual = map rules.fixed [
        { }
        {
          backend = "kernel";
          local.publish = [
            "80:80"
            "8080:80"
            "127.0.0.1:443-1100:443-1100"
          ];
          # Without them, the link to the host has IPv6.
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
      expected = [
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
      actual = builtins.fromTOML (
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
      expected = {
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

    "services that keep CAP_SYS_ADMIN as root" = {
      actual = map (serviceConfig: (rules.factsOf { inherit serviceConfig; }).privileged) [
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
      expected = [
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
    "specifiers in paths" = {
      actual =
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
      expected = [
        [ "worker/%i" ]
        [
          "/run/nscd"
          "/var/lib/x"
        ]
      ];
    };
    "facts of a service" = {
      actual = rules.factsOf {
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
      expected = {
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
    "the host's /run does not replace the private one" = {
      actual = [
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
      expected = [
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
      actual = rules.socketFactsOf "web" {
        listenStreams = [ "80" ];
        listenDatagrams = [ "53" ];
        socketConfig = {
          ListenStream = [ "81" ];
          ListenNetlink = "route";
          NetworkNamespacePath = "/x";
        };
      };
      expected = {
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
    "the service of a socket" = {
      actual = map (rules.serviceOfSocket "web") [
        { }
        { Accept = true; }
        { Service = "other.service"; }
      ];
      expected = [
        "web.service"
        "web@.service"
        "other.service"
      ];
    };
  };

  all = goldens ++ map (name: cases.${name} // { inherit name; }) (attrNames cases);
in
{
  passed = map (it: it.name) (filter (it: it.actual == it.expected) all);
  failed = concatLists (map (it: if it.actual == it.expected then [ ] else [ it ]) all);
}
