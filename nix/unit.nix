# What a unit receives, and what speaks against it: pure rules. Plain values in, plain values out, by builtins alone, so that all of it is
# tested without nixpkgs. `vpn-exec unit` (src/plan/unit.rs) decides the same: both are held to the files in tests/unit/.
let
  inherit (builtins)
    any
    concatMap
    concatStringsSep
    elem
    elemAt
    filter
    head
    isList
    isString
    length
    map
    match
    replaceStrings
    split
    substring
    tail
    ;
  inherit (import ./text.nix)
    dropSuffix
    hasPrefix
    hasSuffix
    isAbsolute
    isBelow
    lines
    optional
    parts
    sortPaths
    toList
    words
    ;
  inherit (import ./tunnel.nix)
    keeper
    netnsPath
    ;

  # --- What of /run a service sees: as in src/plan/unit.rs and src/plan/hidden.rs.

  shown = [
    "/run/lock"
    "/run/systemd/journal"
    "/run/systemd/notify"
    "/run/systemd/userdb"
  ];
  shownReadOnly = [
    "/run/agenix"
    "/run/booted-system"
    "/run/current-system"
    "/run/keys"
    "/run/opengl-driver"
    "/run/secrets"
  ];
  resolvers = [
    "/run/nscd*"
    "/run/systemd/resolve*"
    "/run/systemd/machine"
    "/run/avahi-daemon"
    "/run/mDNSResponder*"
    "/run/mdnsd*"
    "/run/sssd*"
    "/run/resolvconf"
    "/run/unbound*"
    "/run/dnsmasq*"
    "/run/knot-resolver"
    "/run/pdns-recursor"
    "/run/NetworkManager"
  ];
  hidden =
    dbus:
    resolvers ++ optional (dbus != "system") "/run/dbus/system_bus_socket" ++ [ "/var/lib/sss/pipes" ];
  # Files without an address but those of resolvers, which are not reached from inside.
  harmless = [
    "/run/NetworkManager/no-stub-resolv.conf"
    "/run/NetworkManager/resolv.conf"
    "/run/resolvconf/resolv.conf"
    "/run/systemd/resolve/resolv.conf"
    "/run/systemd/resolve/stub-resolv.conf"
  ];
  # Services that the whole machine asks for names, links or the bus.
  hostsOwn = [
    "NetworkManager"
    "avahi-daemon"
    "connman"
    "dbus"
    "dbus-broker"
    "dhcpcd"
    "dnsmasq"
    "iwd"
    "named"
    "networking"
    "nscd"
    "nsncd"
    "sssd"
    "systemd-machined"
    "systemd-networkd"
    "systemd-resolved"
    "systemd-udevd"
    "unbound"
    "unscd"
    "wpa_supplicant"
  ];
  serviceName = name: if hasSuffix ".service" name then name else "${name}.service";

  # --- The drop-in.

  # How refusals name what would help: on the command line. The module has its own words.
  commandLine = {
    bus = "--dbus system shows it";
    folder = "show its folder with --show";
    socket = _: tunnel: "NetworkNamespacePath=${netnsPath tunnel} in its [Socket]";
  };

  # What is asked for and what the unit says already, all of it told: { request; unit; } as in tests/unit/*.json.
  complete =
    {
      request,
      unit ? { },
    }:
    {
      request = {
        dbus = "session";
        show = [ ];
        # Where an nscd is that looks names up inside the tunnel: it takes the place of the host's. Null: there is none.
        nscd = null;
      }
      // request
      // {
        service = serviceName request.service;
      };
      unit = {
        kind = "";
        programs = [ ];
        privileged = false;
        runtime_directories = [ ];
        used_paths = [ ];
        pid_file = null;
        private_network = false;
        network_namespace = null;
        joins_namespace_of = [ ];
        sockets = [ ];
        bind_paths = [ ];
      }
      // unit;
    };

  ownPaths =
    { request, unit }:
    let
      inRun = path: isBelow "/run" path && parts path != [ "run" ];
      isShown = path: any (folder: isBelow folder path) (shown ++ shownReadOnly);
      used = filter (path: inRun path && !isShown path) (map inRealRun unit.used_paths);
    in
    sortPaths (map (name: "/run/${name}") unit.runtime_directories ++ used ++ request.show);

  # The settings of the unit. Which settings there are does not depend on the unit, so that a module can ask for them while it makes it.
  settings =
    case:
    let
      known = complete case;
      inherit (known) request;
      inherit (request) tunnel;
      names = "/run/vpn-exec/${tunnel}";
      optionally = paths: concatStringsSep " " (map (path: "-${path}") paths);
    in
    {
      unit = {
        BindsTo = [ (keeper tunnel) ];
        After = [ (keeper tunnel) ];
      };
      service = {
        NetworkNamespacePath = netnsPath tunnel;
        RestrictNamespaces = [ "~net" ];
        BindReadOnlyPaths = [
          "${names}/resolv.conf:/etc/resolv.conf:norbind"
          "${names}/hosts:/etc/hosts:norbind"
          "${names}/nsswitch.conf:/etc/nsswitch.conf:norbind"
          (optionally shownReadOnly)
        ]
        ++ optional (request.nscd != null) "${request.nscd}:/run/nscd";
        TemporaryFileSystem = [
          "/run:mode=0755,nosuid,nodev"
          "/sys/class/net:ro /sys/devices/virtual/net:ro"
        ];
        BindPaths = [
          (optionally (optional (request.dbus == "system") "/run/dbus" ++ shown))
        ]
        ++ ownPaths known;
        InaccessiblePaths = [ "-/var/lib/sss/pipes" ];
      };
    };

  # The same as a file.
  text =
    case:
    let
      inherit (settings case) unit service;
      inherit (complete case) request;
      say = key: map (value: "${key}=${value}");
      files = filter (path: !(hasPrefix "-" path)) service.BindReadOnlyPaths;
      lists = filter (hasPrefix "-") service.BindReadOnlyPaths;
    in
    concatStringsSep "" (
      lines (
        [
          "# ${request.service} in the tunnel ${request.tunnel}. Written by vpn-exec."
          ""
          "[Unit]"
        ]
        ++ say "BindsTo" unit.BindsTo
        ++ say "After" unit.After
        ++ [
          ""
          "[Service]"
          "# No network but the tunnel's, and no way to another."
          "NetworkNamespacePath=${service.NetworkNamespacePath}"
        ]
        ++ say "RestrictNamespaces" service.RestrictNamespaces
        ++ [
          ""
          "# Names are the tunnel's, also where the unit binds a file of the host's there: systemd mounts one of both, and prefers norbind."
        ]
        ++ say "BindReadOnlyPaths" files
        ++ [
          ""
          "# Nobody of the host can be asked for them: of /run, only this is there. A mask over /run/nscd alone would go with that folder"
          "# whenever nscd is restarted."
          "TemporaryFileSystem=${head service.TemporaryFileSystem}"
          "BindPaths=${head service.BindPaths}"
        ]
        ++ say "BindReadOnlyPaths" lists
        ++ say "BindPaths" (tail service.BindPaths)
        ++ say "InaccessiblePaths" service.InaccessiblePaths
        ++ [
          ""
          "# The interfaces of the host are not shown."
        ]
        ++ say "TemporaryFileSystem" (tail service.TemporaryFileSystem)
      )
    );

  # Why a path cannot be shown, or null.
  pathProblem =
    dbus: path:
    let
      # With what systemd puts the name of an instance in the place of (systemd.unit(5), Specifiers).
      isPlain = match "([A-Za-z0-9/._@-]|%[iIjJ])+" path != null;
      # In one way of writing it, without doubled slashes.
      written = "/" + concatStringsSep "/" (parts path);
      fixed = head (split "%" written);
      isOpen = fixed != written;
      # Of a pattern, what its names begin with.
      meets =
        pattern:
        let
          isPattern = hasSuffix "*" pattern;
          beginning = if isPattern then dropSuffix "*" pattern else pattern;
        in
        isBelow path beginning
        || isOpen && hasPrefix fixed beginning
        || isBelow beginning path
        || isPattern && hasPrefix beginning fixed;
      met = filter meets (hidden dbus);
    in
    if !(isBelow "/run" path) || parts path == [ "run" ] || elem ".." (parts path) || !isPlain then
      "${path} cannot be shown: give a path below /run, of letters, digits and / . _ - @ or %i"
    else if elem written harmless then
      null
    else if met != [ ] then
      "${path} cannot be shown: ${head met} is there, by which the host looks names up, past the tunnel"
    else
      null;

  # --- What a unit shows of the host already.

  # Of `SOURCE[:TARGET[:OPTIONS]]`, an entry of BindPaths= or BindReadOnlyPaths=.
  bound =
    entry:
    let
      fields = filter isString (split ":" entry);
      source = head (match "[-+]*(.*)" (head fields));
    in
    {
      inherit source;
      target = if length fields > 1 then elemAt fields 1 else source;
    };
  inRealRun = path: if isBelow "/var/run" path then substring 4 (-1) path else path;

  # Without what would put the host's /run into the place of the service's own: systemd mounts one of both there, and it is not ours.
  # (NixOS's Transmission has it.)
  withoutRun =
    let
      isRun = entry: parts (inRealRun (bound entry).target) == [ "run" ];
      clean =
        value:
        if isString value then
          concatStringsSep " " (filter (entry: !(isRun entry)) (words value))
        else
          value;
    in
    value: if isList value then filter (it: it != "") (map clean value) else clean value;

  # Why a service cannot have an entry, or null. `own` is what is shown because it was asked for, and has been judged.
  bindProblem =
    { own, dbus }:
    entry:
    let
      source = inRealRun (bound entry).source;
      target = inRealRun (bound entry).target;
      same = a: b: isAbsolute a == isAbsolute b && parts a == parts b;
      # What a drop-in of ours has written is there already where it is replaced by another.
      ours = any (path: hasPrefix "-" entry && same source path) (
        shown ++ shownReadOnly ++ [ "/run/dbus" ]
      );
    in
    if same target "/run" then
      "the unit binds ${entry}, and the host's resolvers with it, in the place of a /run without them: take that away"
    else if same source target && (ours || any (same source) own) then
      null
    else if
      isBelow "/run" target && match ".*past the tunnel" (toString (pathProblem dbus source)) != null
    then
      "the unit binds ${entry}, by which the host looks names up, past the tunnel: take that away"
    else
      null;

  # Whether an engine runs the program in a container: the engine's name, or null.
  engineOf =
    { request, unit }:
    let
      inherit (request) service;
      runs =
        engine:
        elem engine unit.programs
        # NixOS's units for containers run scripts, so that they are known by their names alone. Its registry is no container.
        || hasPrefix "${engine}-" service && service != "${engine}-registry.service";
    in
    if runs "podman" then
      "podman"
    else if runs "docker" then
      "docker"
    else
      null;

  # What the administrator should know of a service that goes into a tunnel.
  warnings =
    case:
    let
      inherit (complete case) request unit;
    in
    optional unit.privileged (
      "${request.service} runs as root with CAP_SYS_ADMIN, with which it can leave the tunnel: give it User= or DynamicUser=yes, or "
      + "CapabilityBoundingSet=~CAP_SYS_ADMIN CAP_SYS_PTRACE"
    );

  # All that speaks against putting a service into a tunnel, a sentence each.
  refusals = refusalsIn commandLine;
  refusalsIn =
    advice: case:
    let
      known = complete case;
      inherit (known) request unit;
      inherit (request) service tunnel dbus;
      own = ownPaths known;
      bare = dropSuffix ".service" service;
      engine = engineOf known;
      outside =
        socket:
        let
          # What is bound to a file, or to a name of its own, is reached by those on the machine.
          addresses = filter (address: match "[/@].*" address == null) (socket.listens or [ ]);
        in
        optional ((socket.network_namespace or null) != netnsPath tunnel && addresses != [ ]) (
          "${socket.name} listens at ${head addresses} outside of the tunnel, and what comes there would be answered past it: publish a "
          + "port of the tunnel instead, and disable ${socket.name}, or have it listen inside (${advice.socket socket.name tunnel})"
        );
      pidFile = unit.pid_file;
      realPidFile = if isBelow "/var/run" pidFile then substring 4 (-1) pidFile else pidFile;
      pidFileIsUnseen =
        pidFile != null
        && (isBelow "/run" pidFile || isBelow "/var/run" pidFile)
        && !(any (path: isBelow path realPidFile) own);
    in
    optional (hasPrefix "vpn-exec@" service) "${service} holds a tunnel itself, and must stay outside"
    ++ optional (elem (head (split "@" bare)) hostsOwn) "${service} serves the whole machine, which would be without it: leave it outside"
    ++ optional (engine != null) (
      "an engine runs the program of ${service} in a network namespace of its own, outside of the tunnel: leave the unit's service "
      + "settings as they are, and give ${
        if engine == "docker" then "podman (Docker cannot join a namespace by its path)" else "podman"
      } the options --network=ns:${netnsPath tunnel} and "
      + "--volume=/run/vpn-exec/${tunnel}/resolv.conf:/etc/resolv.conf:ro, and the unit BindsTo= and After=${keeper tunnel}"
    )
    ++
      optional
        (elem bare [
          "systemd-nspawn@${tunnel}"
          "container@${tunnel}"
        ])
        "ve-${tunnel} is the interface of the tunnel on the host, and the container's as well: give one of them another name"
    ++
      optional (match ".*[=+].*" tunnel != null)
        "the tunnel ${tunnel} cannot be a service, since the name of a unit has no '=' and no '+': rename its profile"
    ++ optional unit.private_network "the unit has PrivateNetwork=yes, a network without any way out: set PrivateNetwork=no in the unit"
    ++
      optional (unit.network_namespace != null && unit.network_namespace != netnsPath tunnel)
        "the unit has NetworkNamespacePath=${toString unit.network_namespace} already, and a service is in one network namespace: take that line away"
    ++ map (
      other:
      "the unit has JoinsNamespaceOf=${other}, and would share the network of that unit: take that line away, and put both into the tunnel"
    ) unit.joins_namespace_of
    ++ concatMap outside unit.sockets
    ++
      optional (unit.kind == "dbus" && dbus != "system")
        "the unit has Type=dbus, and the system bus is hidden, where anybody can have the host look names up: ${advice.bus}"
    ++ optional pidFileIsUnseen (
      "the unit has PIDFile=${toString pidFile}, which systemd would not see: /run is the service's own inside. Put it into a folder of "
      + "RuntimeDirectory=, or ${advice.folder}"
    )
    ++ optional (any (path: isAbsolute path && parts path == [ "run" ]) unit.used_paths) (
      "the unit has /run in ReadWritePaths=, ReadOnlyPaths=, ExecPaths= or NoExecPaths=, by which systemd shows the host's /run, and the "
      + "host's resolvers with it: name what is below it that the service needs instead"
    )
    ++ filter (problem: problem != null) (map (pathProblem dbus) own)
    ++ filter (problem: problem != null) (map (bindProblem { inherit own dbus; }) unit.bind_paths);

  # What [Socket] receives to listen inside a tunnel. The keeper starts after the sockets that are started with the system, so this one cannot
  # be among them.
  socket = tunnel: {
    unit = {
      BindsTo = [ (keeper tunnel) ];
      After = [
        "sysinit.target"
        (keeper tunnel)
      ];
      Before = [ "shutdown.target" ];
      Conflicts = [ "shutdown.target" ];
      DefaultDependencies = false;
    };
    socket.NetworkNamespacePath = netnsPath tunnel;
  };

  # Hardening that hardly any program minds. Whatever a service says itself goes before it.
  restrictions = {
    CapabilityBoundingSet = "";
    KeyringMode = "private";
    LockPersonality = true;
    NoNewPrivileges = true;
    PrivateDevices = true;
    PrivateTmp = true;
    ProtectClock = true;
    ProtectControlGroups = true;
    ProtectHome = true;
    ProtectHostname = true;
    ProtectKernelLogs = true;
    ProtectKernelModules = true;
    ProtectKernelTunables = true;
    ProtectProc = "invisible";
    ProtectSystem = "strict";
    RemoveIPC = true;
    # Netlink tells a program of its own interfaces, as the C library's look-ups ask for.
    RestrictAddressFamilies = [ "AF_UNIX AF_INET AF_INET6 AF_NETLINK" ];
    RestrictRealtime = true;
    RestrictSUIDSGID = true;
    SystemCallArchitectures = "native";
    SystemCallErrorNumber = "EPERM";
    SystemCallFilter = [
      "@system-service"
      "~@privileged @resources"
    ];
    UMask = "0077";
  };
  # --- What a module reads out of a service.

  # What systemd makes of specifiers that do not depend on an instance (systemd.unit(5)).
  expand =
    service:
    let
      bare = dropSuffix ".service" (serviceName service);
    in
    replaceStrings
      [
        "%t"
        "%n"
        "%N"
        "%p"
        "%S"
        "%C"
        "%L"
        "%E"
        "%T"
        "%V"
      ]
      [
        "/run"
        (serviceName service)
        bare
        (head (split "@" bare))
        "/var/lib"
        "/var/cache"
        "/var/log"
        "/etc"
        "/tmp"
        "/var/tmp"
      ];
  lastOf = list: if list == [ ] then "" else elemAt list (length list - 1);

  # Facts of a service, from NixOS's `serviceConfig` and `unitConfig`. `sockets` are those that start it.
  factsOf =
    {
      # The service, for what its unit says by specifiers.
      name ? null,
      serviceConfig,
      unitConfig ? { },
      sockets ? [ ],
    }:
    let
      list = key: map expanded (concatMap words (map toString (toList (serviceConfig.${key} or [ ]))));
      expanded = if name == null then (text: text) else expand name;
      user = toString (serviceConfig.User or "");
      bounding = concatMap words (map toString (toList (serviceConfig.CapabilityBoundingSet or [ ])));
      # The last list of those that are merged says whether it is one of what is kept or of what is taken away. An empty one takes all.
      keepsAdmin =
        !(serviceConfig ? CapabilityBoundingSet)
        || (
          if bounding != [ ] && hasPrefix "~" (head bounding) then
            !(elem "CAP_SYS_ADMIN" bounding || elem "~CAP_SYS_ADMIN" bounding)
          else
            elem "CAP_SYS_ADMIN" bounding
        );
      isYes =
        value:
        elem value [
          true
          "true"
          "yes"
          "on"
          "1"
          1
        ];
    in
    {
      kind = serviceConfig.Type or "";
      programs = map (
        command:
        let
          program = head (words command ++ [ "" ]);
        in
        lastOf (parts (head (match "[-@:+!|]*(.*)" program)))
      ) (map toString (toList (serviceConfig.ExecStart or [ ])));
      privileged =
        elem user [
          ""
          "root"
          "0"
        ]
        && !(isYes (serviceConfig.DynamicUser or false))
        && keepsAdmin;
      # A name may be followed by one of a link to it.
      runtime_directories = map (name: head (split ":" name)) (list "RuntimeDirectory");
      # `/run` itself is another matter than what is below it, whatever it begins with.
      used_paths =
        let
          paths = concatMap list [
            "ReadWritePaths"
            "ReadOnlyPaths"
            "ExecPaths"
            "NoExecPaths"
          ];
          isRun = path: parts (head (match "[-+]*(.*)" path)) == [ "run" ];
        in
        map (path: if isRun path then "/run" else path) (
          filter (path: isAbsolute path || isRun path) paths
        );
      pid_file = serviceConfig.PIDFile or null;
      private_network = isYes (serviceConfig.PrivateNetwork or false);
      network_namespace = serviceConfig.NetworkNamespacePath or null;
      joins_namespace_of = concatMap words (map toString (toList (unitConfig.JoinsNamespaceOf or [ ])));
      bind_paths = list "BindPaths" ++ list "BindReadOnlyPaths";
      inherit sockets;
    };

  # A socket, from NixOS's options.
  socketFactsOf =
    name:
    {
      listenStreams ? [ ],
      listenDatagrams ? [ ],
      socketConfig ? { },
    }:
    {
      name = "${name}.socket";
      listens =
        listenStreams
        ++ listenDatagrams
        ++ concatMap (kind: map toString (toList (socketConfig.${kind} or [ ]))) [
          "ListenStream"
          "ListenDatagram"
          "ListenSequentialPacket"
          "ListenNetlink"
        ];
      network_namespace = socketConfig.NetworkNamespacePath or null;
    };

  # The service that a socket starts.
  serviceOfSocket =
    name: socketConfig:
    serviceName (
      socketConfig.Service or (
        if
          elem (socketConfig.Accept or false) [
            true
            "yes"
            "true"
          ]
        then
          "${name}@"
        else
          name
      )
    );
in
{
  inherit
    factsOf
    hidden
    pathProblem
    refusals
    refusalsIn
    restrictions
    serviceOfSocket
    settings
    shown
    shownReadOnly
    socket
    socketFactsOf
    text
    warnings
    withoutRun
    ;
}
