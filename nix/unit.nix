# The settings that put a unit into a tunnel, and the reasons to refuse it. Pure rules with builtins alone, so that
# tests need no nixpkgs. `vpn-exec unit` (src/plan/drop_in/) decides the same: both must match the files in tests/unit/.
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

  # --- The paths below /run that a service sees: as in src/plan/drop_in/ and src/plan/hidden_paths.rs.

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
  # Files that only name resolvers, which cannot be reached from inside.
  harmless = [
    "/run/NetworkManager/no-stub-resolv.conf"
    "/run/NetworkManager/resolv.conf"
    "/run/resolvconf/resolv.conf"
    "/run/systemd/resolve/resolv.conf"
    "/run/systemd/resolve/stub-resolv.conf"
  ];
  # Services that the whole machine needs for names, links or the bus.
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

  # The remedies in refusals, as options of the command line. The module passes its own.
  commandLine = {
    bus = "--dbus system shows it";
    folder = "show its folder with --show";
    socket = _: tunnel: "NetworkNamespacePath=${netnsPath tunnel} in its [Socket]";
  };

  # A request and the facts of its unit with all defaults: { request; unit; } as in tests/unit/*.json.
  complete =
    {
      request,
      unit ? { },
    }:
    {
      request = {
        dbus = "session";
        show = [ ];
        # The folder of an nscd inside the tunnel, which replaces the host's, or null.
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

  # The unit's settings. Their names do not depend on the unit, so that a module can use them while it defines the unit.
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
          "# The tunnel's network namespace. The service cannot enter another one."
          "NetworkNamespacePath=${service.NetworkNamespacePath}"
        ]
        ++ say "RestrictNamespaces" service.RestrictNamespaces
        ++ [
          ""
          "# The tunnel's resolver files. If the unit binds these paths too, systemd mounts one of the two, and prefers norbind."
        ]
        ++ say "BindReadOnlyPaths" files
        ++ [
          ""
          "# A private /run without the host's resolvers. A mask over /run/nscd alone would disappear with that folder whenever"
          "# nscd restarts."
          "TemporaryFileSystem=${head service.TemporaryFileSystem}"
          "BindPaths=${head service.BindPaths}"
        ]
        ++ say "BindReadOnlyPaths" lists
        ++ say "BindPaths" (tail service.BindPaths)
        ++ say "InaccessiblePaths" service.InaccessiblePaths
        ++ [
          ""
          "# Hides the host's network interfaces."
        ]
        ++ say "TemporaryFileSystem" (tail service.TemporaryFileSystem)
      )
    );

  # Why the service must not see a path, or null.
  pathProblem =
    dbus: path:
    let
      # Allows the specifiers for an instance's name (systemd.unit(5)).
      isPlain = match "([A-Za-z0-9/._@-]|%[iIjJ])+" path != null;
      # Without doubled slashes.
      written = "/" + concatStringsSep "/" (parts path);
      fixed = head (split "%" written);
      isOpen = fixed != written;
      # Whether a pattern and the path can mean the same or contain each other.
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
      "cannot show ${path}: use a path below /run of letters, digits and / . _ - @ or %i"
    else if elem written harmless then
      null
    else if met != [ ] then
      "cannot show ${path}: the host looks up names through ${head met}, bypassing the tunnel"
    else
      null;

  # --- The unit's own binds.

  # Parses `SOURCE[:TARGET[:OPTIONS]]`, an entry of BindPaths= or BindReadOnlyPaths=.
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

  # Drops entries that bind the host's /run over the private one, because systemd would prefer them. NixOS's
  # Transmission has such an entry.
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

  # Why a service cannot have an entry, or null. `own` contains the requested paths, which are checked elsewhere.
  bindProblem =
    { own, dbus }:
    entry:
    let
      source = inRealRun (bound entry).source;
      target = inRealRun (bound entry).target;
      same = a: b: isAbsolute a == isAbsolute b && parts a == parts b;
      # Entries of an earlier drop-in of ours.
      ours = any (path: hasPrefix "-" entry && same source path) (
        shown ++ shownReadOnly ++ [ "/run/dbus" ]
      );
    in
    if same target "/run" then
      "the unit binds ${entry} over the private /run, and with it the host's resolvers: remove that bind"
    else if same source target && (ours || any (same source) own) then
      null
    else if
      isBelow "/run" target && match ".*bypassing the tunnel" (toString (pathProblem dbus source)) != null
    then
      "the unit binds ${entry}, through which the host looks up names, bypassing the tunnel: remove that bind"
    else
      null;

  # The name of the container engine that runs the program, or null.
  engineOf =
    { request, unit }:
    let
      inherit (request) service;
      runs =
        engine:
        elem engine unit.programs
        # NixOS's units for containers run scripts, so only their names tell. Its registry is not a container.
        || hasPrefix "${engine}-" service && service != "${engine}-registry.service";
    in
    if runs "podman" then
      "podman"
    else if runs "docker" then
      "docker"
    else
      null;

  # Warnings about a service inside a tunnel.
  warnings =
    case:
    let
      inherit (complete case) request unit;
    in
    optional unit.privileged (
      "${request.service} runs as root with CAP_SYS_ADMIN, and can leave the tunnel: set User= or DynamicUser=yes, or "
      + "CapabilityBoundingSet=~CAP_SYS_ADMIN CAP_SYS_PTRACE"
    );

  # The reasons against putting a service into a tunnel, as messages.
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
          # Unix sockets are reachable on the machine alone.
          addresses = filter (address: match "[/@].*" address == null) (socket.listens or [ ]);
        in
        optional ((socket.network_namespace or null) != netnsPath tunnel && addresses != [ ]) (
          "${socket.name} listens on ${head addresses} outside of the tunnel, and its answers would bypass the tunnel: publish a "
          + "port of the tunnel instead and disable ${socket.name}, or let it listen inside (${advice.socket socket.name tunnel})"
        );
      pidFile = unit.pid_file;
      realPidFile = if isBelow "/var/run" pidFile then substring 4 (-1) pidFile else pidFile;
      pidFileIsUnseen =
        pidFile != null
        && (isBelow "/run" pidFile || isBelow "/var/run" pidFile)
        && !(any (path: isBelow path realPidFile) own);
    in
    optional (hasPrefix "vpn-exec@" service) "${service} holds a tunnel itself: leave it outside"
    ++ optional (elem (head (split "@" bare)) hostsOwn) "${service} serves the whole machine: leave it outside"
    ++ optional (engine != null) (
      "a container engine runs the program of ${service} in another network namespace: leave the unit's service "
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
        "ve-${tunnel} is the name of the tunnel's interface on the host, and of the container's: rename one of them"
    ++
      optional (match ".*[=+].*" tunnel != null)
        "the tunnel ${tunnel} cannot be a service, because a unit's name may not contain '=' or '+': rename its profile"
    ++ optional unit.private_network "the unit has PrivateNetwork=yes, a network without a route out: set PrivateNetwork=no in the unit"
    ++
      optional (unit.network_namespace != null && unit.network_namespace != netnsPath tunnel)
        "the unit already has NetworkNamespacePath=${toString unit.network_namespace}, and a service can be in one network namespace only: remove that line"
    ++ map (
      other:
      "the unit has JoinsNamespaceOf=${other}, and would share the network of that unit: remove that line, and put both into the tunnel"
    ) unit.joins_namespace_of
    ++ concatMap outside unit.sockets
    ++
      optional (unit.kind == "dbus" && dbus != "system")
        "the unit has Type=dbus, and the system bus is hidden, because it lets a service ask the host to look up names: ${advice.bus}"
    ++ optional pidFileIsUnseen (
      "the unit has PIDFile=${toString pidFile}, which systemd would not see, because the service has a private /run: put it into a folder of "
      + "RuntimeDirectory=, or ${advice.folder}"
    )
    ++ optional (any (path: isAbsolute path && parts path == [ "run" ]) unit.used_paths) (
      "the unit has /run in ReadWritePaths=, ReadOnlyPaths=, ExecPaths= or NoExecPaths=, which makes systemd show the host's /run with its "
      + "resolvers: name the paths below it that the service needs instead"
    )
    ++ filter (problem: problem != null) (map (pathProblem dbus) own)
    ++ filter (problem: problem != null) (map (bindProblem { inherit own dbus; }) unit.bind_paths);

  # The settings of a socket unit that listens inside a tunnel. The keeper starts after the sockets of the boot, so this
  # one must not be one of them.
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

  # Hardening that suits almost every program. A service's own settings take precedence.
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
    # The C library's look-ups ask netlink for the interfaces.
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
  # --- Facts for a module, from a service's options.

  # Expands the specifiers that do not depend on an instance (systemd.unit(5)).
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

  # The facts of a service, from NixOS's `serviceConfig` and `unitConfig`. `sockets` start it.
  factsOf =
    {
      # The service's name, for specifiers.
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
      # The last of the merged lists decides whether it allows or denies. An empty list denies all.
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
      # A name may be followed by the name of a link to it.
      runtime_directories = map (name: head (split ":" name)) (list "RuntimeDirectory");
      # `/run` itself counts, whatever prefix it has.
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

  # The facts of a socket, from NixOS's options.
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
