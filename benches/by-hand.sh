#!/bin/sh
# What vpn-exec does, by hand: by-hand.sh [--no-nft] [--kernel FILE] NAME PROGRAM [ARG]...
#
# Batched as well as it can be: one `ip -batch` for the host's side, one for the inside, and a single `ip netns exec`
# for the firewall and the program. A TUN interface stands for WireGuard's, which takes two more commands (`wg setconf`
# and a move): with --kernel it is WireGuard's, configured by that file. Run by launch.rs in a world of its own; it
# writes below /etc/netns and /run.
set -e
nft=yes
if [ "$1" = --no-nft ]; then
    nft=
    shift
fi
kernel=
if [ "$1" = --kernel ]; then
    kernel=$2
    shift 2
fi
name=$1
shift
# Either is made by a line of a batch.
on_host= inside="tuntap add wg0 mode tun"
if [ "$kernel" ]; then on_host="link add $name-wg type wireguard" inside=; fi

ip netns add "$name"
mkdir -p "/etc/netns/$name"
echo "nameserver 10.64.0.1" >"/etc/netns/$name/resolv.conf"
ip -batch - <<END
link add ve-$name type veth peer name host0 netns $name
address add 169.254.77.2/31 dev ve-$name
address add fd00:77::2/127 dev ve-$name nodad
link set ve-$name up
$on_host
END
if [ "$kernel" ]; then
    wg setconf "$name-wg" "$kernel"
    ip link set "$name-wg" netns "$name" name wg0
fi
ip -netns "$name" -batch - <<END
link set lo up
address add 169.254.77.3/31 dev host0
address add fd00:77::3/127 dev host0 nodad
link set host0 up
$inside
link set wg0 mtu 1420
address add 10.64.0.2/32 dev wg0
address add fd00:64::2/128 dev wg0 nodad
link set wg0 up
route add default dev wg0
route add ::/0 dev wg0
END

status=0
if [ "$nft" ]; then
    ip netns exec "$name" sh -c '
        nft -f - <<END
table inet confined {
    chain output {
        type filter hook output priority filter; policy drop
        oifname { "lo", "wg0" } accept
        oifname "host0" ip daddr 169.254.77.2 accept
        oifname "host0" ip6 daddr fd00:77::2 accept
    }
}
END
        exec "$@"' sh "$@" || status=$?
else
    ip netns exec "$name" "$@" || status=$?
fi

# The links go with the namespace, in the background: deleting them one by one would take longer.
ip netns delete "$name"
rm -r "/etc/netns/$name"
exit $status
