"""Which addresses may be called on somebody else's behalf, and what a name resolves to.

A server that calls URLs can be made to call its own network (server-side request forgery). So a name is
resolved once, every address it has is checked, and the connection goes to an address that was: a name that
resolves to another one a moment later changes nothing.

Public is what the IANA special-purpose address registries (RFC 6890) do not take out of the ordinary:
https://www.iana.org/assignments/iana-ipv4-special-registry and …/iana-ipv6-special-registry.
"""

import ipaddress
from collections.abc import Awaitable, Callable

import trio

Address = ipaddress.IPv4Address | ipaddress.IPv6Address
Resolve = Callable[[str, int], Awaitable[list[Address]]]
"""The addresses of a host, best first. Raises OSError where it has none."""

MAX_ADDRESSES = 4
"""Tried of those a name has."""

_REFUSED_IPV4 = tuple(
    map(
        ipaddress.IPv4Network,
        (
            "0.0.0.0/8",  # "this network" (RFC 791); 0.0.0.0 is this host
            "10.0.0.0/8",  # private (RFC 1918)
            "100.64.0.0/10",  # carrier-grade NAT (RFC 6598); a cloud's metadata is at 100.100.100.200
            "127.0.0.0/8",  # loopback
            "168.63.129.16/32",  # a cloud's metadata, though the address looks public
            "169.254.0.0/16",  # link-local (RFC 3927); clouds' metadata is at 169.254.169.254
            "172.16.0.0/12",  # private
            "192.0.0.0/24",  # protocol assignments (RFC 6890); a cloud's metadata is at 192.0.0.192
            "192.0.2.0/24",  # documentation
            "192.88.99.0/24",  # 6to4 relays (RFC 7526)
            "192.168.0.0/16",  # private
            "198.18.0.0/15",  # benchmarks (RFC 2544)
            "198.51.100.0/24",  # documentation
            "203.0.113.0/24",  # documentation
            "224.0.0.0/4",  # multicast
            "240.0.0.0/4",  # reserved, and broadcast
        ),
    )
)

_GLOBAL_UNICAST = ipaddress.IPv6Network("2000::/3")
"""All that IANA has given out. Outside are loopback, link-local and unique local addresses (clouds' metadata
at fd00:ec2::254 and fd20:ce::254 among them), multicast, NAT64 (64:ff9b::/96 and 64:ff9b:1::/48, RFC 6052
and 8215) and addresses that hold an IPv4 one (::ffff:0:0/96)."""

_REFUSED_IPV6 = tuple(
    map(
        ipaddress.IPv6Network,
        (
            "2001::/23",  # protocol assignments (RFC 2928), Teredo (RFC 4380) among them
            "2001:db8::/32",  # documentation
            "2002::/16",  # 6to4: holds an IPv4 address (RFC 3056)
            "3fff::/20",  # documentation (RFC 9637)
        ),
    )
)


class AddressRefusedError(Exception):
    """The name has an address that is not public, and the endpoint does not allow that. Nothing was sent."""


def is_public(address: Address) -> bool:
    """Whether it is an ordinary address of the public internet."""
    if isinstance(address, ipaddress.IPv4Address):
        return not any(address in network for network in _REFUSED_IPV4)
    return address in _GLOBAL_UNICAST and not any(address in network for network in _REFUSED_IPV6)


def literal_address(host: str) -> Address | None:
    """The address a host is written as; None for a name (``localhost`` is one that says what it is)."""
    if host.lower().rstrip(".") == "localhost":
        return ipaddress.IPv4Address("127.0.0.1")
    try:
        return ipaddress.ip_address(host)
    except ValueError:
        return None


async def resolve(host: str, port: int) -> list[Address]:
    """Ask the system's resolver. Raises OSError."""
    found = await trio.socket.getaddrinfo(host, port, type=trio.socket.SOCK_STREAM)
    return list(dict.fromkeys(ipaddress.ip_address(sockaddr[0]) for *_, sockaddr in found))


async def checked_addresses(
    host: str, port: int, *, allow_private: bool, resolve: Resolve = resolve
) -> list[Address]:
    """The addresses to connect to, at most ``MAX_ADDRESSES``, after one resolution.

    Raises OSError for a name without any, and AddressRefusedError when one of them is not public, the first
    ones or the last: such a name is not to be trusted with the others.
    """
    addresses = await resolve(host, port)
    if not allow_private and not all(map(is_public, addresses)):
        raise AddressRefusedError("its name resolves to an address that is not public")
    if not addresses:
        raise OSError("the name has no address")
    return addresses[:MAX_ADDRESSES]
