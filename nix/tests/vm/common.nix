# Common parts of the tests: a machine with the module; a provider, which is also the machine's default gateway,
# resolver, and a web server that answers with the client's address; and a remote machine in the local network.
#
#   remote 192.168.1.3 ── machine 192.168.1.1 ── 192.168.1.2 provider, with 203.0.113.1 and, inside tunnels, 10.64.0.1
#
# NixOS's tests number machines in the order of their names, so a machine that some tests lack comes last. The keys
# serve these tests alone.
{ module }:
let
  providerKey = "aBWYCaNaOkCg+Zwli+owxQmYhaFngSLnyQd3aTb+Tlw=";
  providerPublic = "fDYDSROVfnPz3MecW78d6a0yTL0e8V8V1SIzigTLGVI=";
  clients = {
    a = {
      address = "10.64.0.2";
      key = "EIFpJ8JjP8Ty+i57TMYIL2HDntC9vPTqiwleD6SLd0M=";
      public = "U4qeHmGQV6NhPrHNc8RZpJ6tKt4oWduluzQRuloUEhw=";
    };
    b = {
      address = "10.64.0.3";
      key = "UEWRqANlfTJUqlLiOtxVRtfMo9cNX4scjrmwbOuGyEE=";
      public = "OP3OSPfcszy42ebvrnMwXgw/i1FgnO9FBfdeu1JGGi8=";
    };
    c = {
      address = "10.64.0.4";
      key = "uJBRS7iqOd57Ebqd/Z8FEEx1EjeOWzeFvHUZb8P7jX0=";
      public = "PVNYyjqiKrKaVHckvor4F0t7q41Sz+8/8Yy33V8nm2o=";
    };
  };
  names = builtins.attrNames clients;
  addresses = {
    machine = "192.168.1.1";
    provider = "192.168.1.2";
    remote = "192.168.1.3";
  };
in
{
  inherit addresses clients;

  provider = {
    networking.firewall.enable = false;
    networking.interfaces.lo.ipv4.addresses = [
      {
        address = "203.0.113.1";
        prefixLength = 32;
      }
    ];
    networking.wireguard.interfaces.wg0 = {
      ips = [ "10.64.0.1/24" ];
      listenPort = 51820;
      privateKey = providerKey;
      peers = map (name: {
        publicKey = clients.${name}.public;
        allowedIPs = [ "${clients.${name}.address}/32" ];
      }) names;
    };
    services.dnsmasq = {
      enable = true;
      resolveLocalQueries = false;
      settings = {
        no-resolv = true;
        log-queries = true;
        address = "/example/203.0.113.1";
        # Answers all other record types of these names itself.
        local = "/example/";
      };
    };
    services.nginx = {
      enable = true;
      virtualHosts.default.locations."/".return = ''200 "$remote_addr\n"'';
    };
  };

  remote = { };

  # Files for the tunnels `a`, `b` and `c`; each test declares the tunnels that it uses.
  machine =
    { pkgs, ... }:
    {
      imports = [ module ];
      # The VM's own uplink would be a second route.
      networking.useDHCP = false;
      networking.defaultGateway = addresses.provider;
      networking.nameservers = [ addresses.provider ];
      environment.systemPackages = [ pkgs.curl ];
      environment.etc = builtins.listToAttrs (
        map (name: {
          name = "wireguard/${name}.conf";
          value = {
            mode = "0400";
            text = ''
              [Interface]
              PrivateKey = ${clients.${name}.key}
              Address = ${clients.${name}.address}/32
              DNS = 10.64.0.1

              [Peer]
              PublicKey = ${providerPublic}
              AllowedIPs = 0.0.0.0/0
              Endpoint = ${addresses.provider}:51820
            '';
          };
        }) names
      );
    };

  # A service that keeps running, so that a test can look inside.
  waiting = {
    wantedBy = [ "multi-user.target" ];
    script = "exec sleep infinity";
  };

  # Helpers for each test: requests from a service's environment, and the provider's DNS log.
  prelude = ''
    start_all()
    provider.wait_for_unit("dnsmasq.service")
    provider.wait_for_unit("nginx.service")


    def inside(service, command):
        pid = machine.succeed(f"systemctl show -P MainPID {service}").strip()
        return machine.succeed(f"nsenter -t {pid} -m -n {command}")


    def main_pid(service):
        return int(machine.succeed(f"systemctl show -P MainPID {service}"))


    def is_back(service, before):
        return lambda _: main_pid(service) not in (0, before)


    def asked(name, address):
        log = provider.succeed("journalctl --sync; journalctl -u dnsmasq -o cat")
        return any(f"] {name} from {address}" in line for line in log.splitlines())


    WEB = "curl -sS -m 10 --retry 10 --retry-connrefused http://203.0.113.1/"
  '';
}
