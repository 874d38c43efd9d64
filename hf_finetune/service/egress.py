"""Requests to addresses that callers give: only to public ones, within a time limit, and of the answer only its status.

The address that is connected to is the one that was checked: a name that leads elsewhere a moment later gains nothing.
Redirects are not followed, no proxy of the environment is asked, and connections are not kept.
"""

from __future__ import annotations

import ssl
import time
from collections.abc import Mapping, Sequence
from functools import cache
from ipaddress import IPv4Address, IPv4Network, IPv6Address, IPv6Network, ip_address
from socket import SOCK_STREAM, getaddrinfo
from typing import Any

import httpcore2 as core
import httpx2

LIMIT = 10.0
"""Seconds for connection, request and the head of the answer, together."""
Networks = Sequence[IPv4Network | IPv6Network]
Address = IPv4Address | IPv6Address
_UNICAST = IPv6Network("2000::/3")
_NAT64 = IPv6Network("64:ff9b::/96")


class Unreachable(Exception):  # noqa: N818 - it is an answer
    """A URL that was not reached; the message has no more of it than its caller may know."""


def check(url: str, networks: Networks) -> None:
    """Check a URL, and where its name leads now.

    Args:
        url: Of https; of http only where it leads into `networks`.
        networks: Private networks that may be called, too.

    Raises:
        Unreachable: It may not be called, or its name leads nowhere.
    """
    parsed = _parsed(url)
    _addresses(parsed.raw_host.decode("ascii"), parsed.port or 443, networks, is_private=parsed.scheme == "http")


def post(url: str, headers: Mapping[str, str], body: bytes, networks: Networks) -> int:
    """Send a request.

    Args:
        url: See `check`.
        headers: To be sent.
        body: To be sent.
        networks: See `check`.

    Returns:
        The status of the answer.

    Raises:
        Unreachable: There was no answer.
    """
    parsed = _parsed(url)
    request = httpx2.Request("POST", parsed, headers=dict(headers), content=body)
    target = core.URL(scheme=parsed.raw_scheme, host=parsed.raw_host, port=parsed.port, target=parsed.raw_path)
    backend = _Checked(networks, is_private=parsed.scheme == "http")
    try:
        with (
            core.ConnectionPool(_context(), network_backend=backend) as pool,
            pool.stream("POST", target, headers=request.headers.raw, content=body) as answer,
        ):
            return answer.status
    except core.TimeoutException:
        raise Unreachable(f"it did not answer within {LIMIT:g} seconds") from None
    except core.NetworkError as error:
        is_certificate = any(isinstance(reason, ssl.SSLCertVerificationError) for reason in error.args)
        said = "its certificate is not valid" if is_certificate else "no connection"
        raise Unreachable(said) from None
    except core.ProtocolError:
        raise Unreachable("it did not answer in HTTP") from None


@cache
def _context() -> ssl.SSLContext:
    return ssl.create_default_context()


def _parsed(url: str) -> httpx2.URL:
    try:
        parsed = httpx2.URL(url)
    except httpx2.InvalidURL:
        raise Unreachable("this is no URL") from None
    if parsed.scheme not in ("https", "http") or not parsed.raw_host:
        raise Unreachable("give a URL of https")
    if not 0 < (parsed.port or 443) < 1 << 16:
        raise Unreachable("its port is not between 1 and 65535")
    if parsed.userinfo or parsed.fragment:
        raise Unreachable("give a URL without user, password and fragment")
    return parsed


def _addresses(host: str, port: int, networks: Networks, *, is_private: bool) -> list[str]:
    """Resolve a name; every address of it must be allowed.

    Raises:
        Unreachable: One is not. Whether a name of the operator's network exists is not said.
    """
    try:
        found = list(dict.fromkeys(str(entry[4][0]) for entry in getaddrinfo(host, port, type=SOCK_STREAM)))
    except (OSError, UnicodeError):
        found = []
    if not found or not all(_is_allowed(ip_address(one), networks, is_private=is_private) for one in found):
        kind = "where the operator of this service allows http; use https" if is_private else "to a public address"
        raise Unreachable(f"its name does not lead {kind}")
    return found


def _is_allowed(address: Address, networks: Networks, *, is_private: bool) -> bool:
    """Tell whether an address may be called; `is_private` leaves only those that the operator allows by name."""
    if isinstance(address, IPv6Address):
        inner = address.ipv4_mapped or (IPv4Address(int(address) & 0xFFFFFFFF) if address in _NAT64 else None)
        if inner is not None:
            return _is_allowed(inner, networks, is_private=is_private)
    if any(address in network for network in networks):
        return True
    if is_private or not address.is_global or address.is_multicast:
        return False
    # Of IPv6, only what is given out for use, and no tunnel to an address of IPv4.
    return isinstance(address, IPv4Address) or (
        address in _UNICAST and address.sixtofour is None and address.teredo is None
    )


class _Checked(core.SyncBackend):
    """Connects to the first address of a name that answers, after all were checked."""

    def __init__(self, networks: Networks, *, is_private: bool) -> None:
        self._networks, self._is_private = networks, is_private

    def connect_tcp(self, host: str, port: int, *_: Any, **__: Any) -> core.NetworkStream:
        """Resolve, check, connect."""
        addresses = _addresses(host, port, self._networks, is_private=self._is_private)
        end = time.monotonic() + LIMIT
        for index, address in enumerate(addresses):
            try:
                # Each gets its share of the time that is left: a dead one must not use up that of the next.
                return _Timed(super().connect_tcp(address, port, _left(end) / (len(addresses) - index)), end)
            except (core.ConnectError, core.ConnectTimeout):
                if index == len(addresses) - 1:
                    raise
        raise core.ConnectError


class _Timed(core.NetworkStream):
    """A connection with one limit for all that happens on it: an answer that comes byte by byte takes no longer."""

    def __init__(self, stream: core.NetworkStream, end: float) -> None:
        self._stream, self._end = stream, end

    def read(self, max_bytes: int, timeout: float | None = None) -> bytes:
        """Read."""
        return self._stream.read(max_bytes, _left(self._end))

    def write(self, buffer: bytes, timeout: float | None = None) -> None:
        """Write."""
        self._stream.write(buffer, _left(self._end))

    def start_tls(
        self, ssl_context: ssl.SSLContext, server_hostname: str | None = None, timeout: float | None = None
    ) -> core.NetworkStream:
        """Encrypt; the certificate must be that of the name, not of the address."""
        return _Timed(self._stream.start_tls(ssl_context, server_hostname, _left(self._end)), self._end)

    def close(self) -> None:
        """Close."""
        self._stream.close()

    def get_extra_info(self, info: str) -> Any:
        """Tell of the connection."""
        return self._stream.get_extra_info(info)


def _left(end: float) -> float:
    left = end - time.monotonic()
    if left <= 0:
        raise core.ReadTimeout
    return left
