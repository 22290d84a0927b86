"""The addresses of machines, IPv4 or IPv6. This module imports only the standard library, because
the check of a node (cluster/node_check.py) imports it.

A server must not listen at the address that its own node's name resolves to: Debian's installer
writes `127.0.1.1 NAME` into /etc/hosts, and no other node reaches that address.
"""

import fcntl
import os
import socket
import struct
from collections.abc import Iterable
from ipaddress import ip_address

SIOCGIFADDR = 0x8915
ANY_PORT = 9  # no packet is sent


def bracketed(host: str) -> str:
    """Return a host as a URL writes it before a port: an IPv6 address in brackets."""
    return f"[{host}]" if ":" in host else host


def addresses_of(host: str) -> list[str]:
    """Return the addresses to which this machine resolves a name; empty if it cannot."""
    try:
        found = socket.getaddrinfo(host, ANY_PORT, type=socket.SOCK_DGRAM)
    except OSError:
        return []
    return [str(target[0]) for *_, target in found]


def address_towards(host: str) -> str:
    """Return this machine's address on the route to a host. Raises OSError if there is none."""
    family, kind, _, _, target = socket.getaddrinfo(host, ANY_PORT, type=socket.SOCK_DGRAM)[0]
    with socket.socket(family, kind) as probe:
        probe.connect(target)
        return str(probe.getsockname()[0])


def address_of_interface(name: str) -> str:
    """Return an interface's IPv4 address or, without one, a global IPv6 address. Raises OSError if
    there is no such interface or it has neither."""
    socket.if_nametoindex(name)
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        try:
            answer = fcntl.ioctl(probe, SIOCGIFADDR, struct.pack("256s", name.encode()[:15]))
            return socket.inet_ntoa(answer[20:24])
        except OSError:
            pass
    with open("/proc/net/if_inet6", encoding="ascii") as table:
        for number, _, _, scope, _, interface in map(str.split, table):
            if interface == name and scope in ("00", "10"):  # global, or loopback's own
                return socket.inet_ntop(socket.AF_INET6, bytes.fromhex(number))
    raise OSError(f"interface {name} has no address")


def interface_with(address: str) -> str | None:
    """Return the name of the interface that has this address, or None."""
    for _, name in socket.if_nameindex():
        try:
            if address_of_interface(name) == address:
                return name
        except OSError:
            continue
    return None


def reached_at(node: str, others: Iterable[str], interface: str = "") -> str:
    """Return the host by which the nodes `others` reach this node: its name, if that resolves to
    the right address on this node too, or else the address.

    The address is that of `interface` or, without one, that on the route to another node. It is a
    loopback address only if all nodes are this machine. Raises OSError if `interface` has no
    address.
    """
    address = ""
    if interface:
        address = address_of_interface(interface)
    peers = [other for other in others if other != node]
    if peers and not any(map(addresses_of, peers)):  # names that only Slurm knows
        peers = [os.environ.get("SLURM_LAUNCH_NODE_IPADDR", node)]
    for peer in peers:
        if not address and not all(ip_address(its).is_loopback for its in addresses_of(peer)):
            address = address_towards(peer)
    mine = addresses_of(node)
    return node if mine and address in ("", mine[0]) else address or node
