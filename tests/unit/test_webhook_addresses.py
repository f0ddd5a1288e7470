"""Which addresses may be called: the ranges of the registries, and what a name may not hide."""

from ipaddress import ip_address

import pytest
from hypothesis import given
from hypothesis import strategies as st

from actors.webhooks.addresses import (
    MAX_ADDRESSES,
    Address,
    AddressRefusedError,
    checked_addresses,
    is_public,
    literal_address,
    resolve,
)

REFUSED = [
    *("0.0.0.0", "0.1.2.3", "10.0.0.1", "10.255.255.255", "127.0.0.1", "127.9.9.9", "172.16.0.1"),
    *("172.31.255.255", "192.168.0.1", "169.254.0.1", "100.64.0.1", "100.127.255.255", "192.0.0.8"),
    *("192.0.2.1", "192.88.99.1", "198.18.0.1", "198.19.255.255", "198.51.100.7", "203.0.113.9"),
    *("224.0.0.1", "239.255.255.255", "240.0.0.1", "255.255.255.255"),
    # The metadata of clouds.
    *("169.254.169.254", "100.100.100.200", "168.63.129.16", "192.0.0.192", "fd00:ec2::254", "fd20:ce::254"),
    *("::", "::1", "fe80::1", "fec0::1", "fc00::1", "fdff::1", "ff02::1", "ff0e::1", "100::1"),
    # An IPv4 address inside: mapped, compatible, NAT64 (well-known, local), 6to4, Teredo.
    *("::ffff:127.0.0.1", "::ffff:8.8.8.8", "::127.0.0.1", "64:ff9b::7f00:1", "64:ff9b::808:808"),
    *("64:ff9b:1::a00:1", "2002:7f00:1::1", "2002:808:808::1", "2001:0:4136:e378:8000:63bf:3fff:fdd2"),
    *("2001:db8::1", "2001:10::1", "2001:20::1", "3fff::1", "5f00::1", "4000::1"),
]
PUBLIC = [
    *("1.1.1.1", "8.8.8.8", "9.255.255.255", "11.0.0.0", "100.63.255.255", "100.128.0.0", "126.255.255.255"),
    *("128.0.0.1", "169.253.255.255", "169.255.0.0", "172.15.255.255", "172.32.0.0", "192.167.255.255"),
    *("198.17.255.255", "198.20.0.0", "223.255.255.255", "168.63.129.15", "168.63.129.17"),
    *("2606:4700:4700::1111", "2001:4860:4860::8888", "2a00::1", "2001:200::1", "2003::1"),
]


@pytest.mark.parametrize("text", REFUSED)
def test_special_addresses_are_refused(text: str) -> None:
    assert not is_public(ip_address(text))


@pytest.mark.parametrize("text", PUBLIC)
def test_their_neighbours_are_not(text: str) -> None:
    assert is_public(ip_address(text))


@given(st.ip_addresses())
def test_nothing_is_public_that_the_standard_library_says_is_not(address: Address) -> None:
    special = address.is_private or address.is_loopback or address.is_link_local or address.is_multicast
    if special or address.is_reserved or address.is_unspecified:
        assert not is_public(address)


async def answers(*texts: str) -> list[Address]:
    return [ip_address(text) for text in texts]


async def test_one_bad_address_spoils_a_name() -> None:
    for texts in (("8.8.8.8", "127.0.0.1"), ("::1",), ("1.1.1.1", "2606:4700:4700::1111", "fe80::1")):
        with pytest.raises(AddressRefusedError, match="not public"):
            await checked_addresses("x", 80, allow_private=False, resolve=lambda *_: answers(*texts))  # noqa: B023 - called at once


async def test_an_address_beyond_the_bound_is_checked_all_the_same() -> None:
    good = [f"8.8.8.{number}" for number in range(MAX_ADDRESSES)]
    with pytest.raises(AddressRefusedError):
        await checked_addresses("x", 80, allow_private=False, resolve=lambda *_: answers(*good, "10.0.0.1"))
    found = await checked_addresses(
        "x", 80, allow_private=False, resolve=lambda *_: answers(*good, "9.9.9.9")
    )
    assert [str(address) for address in found] == good


async def test_what_is_allowed_is_not_checked() -> None:
    found = await checked_addresses("x", 80, allow_private=True, resolve=lambda *_: answers("10.0.0.1"))
    assert found == [ip_address("10.0.0.1")]


async def test_a_name_without_an_address_is_an_error() -> None:
    with pytest.raises(OSError, match="no address"):
        await checked_addresses("x", 80, allow_private=False, resolve=lambda *_: answers())


@pytest.mark.parametrize(
    "written", ["127.0.0.1", "2130706433", "0x7f.1", "0177.0.0.1", "127.1", "::ffff:127.0.0.1"]
)
async def test_an_address_is_refused_however_it_is_written(written: str) -> None:
    with pytest.raises(AddressRefusedError):
        await checked_addresses(written, 80, allow_private=False, resolve=resolve)


def test_an_address_in_a_url_is_known_as_one() -> None:
    assert literal_address("10.0.0.1") == ip_address("10.0.0.1")
    assert literal_address("LocalHost") == ip_address("127.0.0.1")
    assert literal_address("hooks.example.com") is None
