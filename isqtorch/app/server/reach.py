"""Who may use the server: the address it listens on, the names in the Host header, web pages, and the API key."""

from __future__ import annotations

import hmac
import ipaddress
import os
import re
import socket
from collections.abc import Iterable, Sequence
from typing import TypeAlias

from isqtorch.files.system import claim_port

KEY_VARIABLE = "ISQTORCH_API_KEY"

_Address: TypeAlias = ipaddress.IPv4Address | ipaddress.IPv6Address
_HOST = re.compile(r"(?:\[([0-9a-f:.]+)\]|([a-z0-9._-]+))(?::([0-9]{1,5}))?", re.IGNORECASE | re.ASCII)


class Refusal(Exception):
    """A request that is not served, with its HTTP status."""

    def __init__(self, status: int, message: str) -> None:
        super().__init__(message)
        self.status = status


class Reach:
    """The rules for one bound socket.

    A browser sends the name that a page used. A page can point its own name to this machine (DNS rebinding), but it
    cannot make the browser send another name or an address. So an address in the Host header is safe, and a name is
    only served if the user gave it.

    Attributes:
        address: the address that the socket is bound to.
    """

    def __init__(self, sock: socket.socket, host: str, names: Iterable[str] = (), key: str | None = None) -> None:
        """Derive the rules.

        Args:
            sock: the bound socket.
            host: what the user gave as the address; it may be a name.
            names: further names to allow in the Host header, without a port.
            key: the API key, or None.

        Raises:
            ValueError: a name is not the name of a host.
        """
        address = _address(sock.getsockname()[0])
        assert address is not None  # the kernel reports addresses only
        self.address = address
        self._key = None if key is None else key.encode()
        self._names = {_checked_name(name) for name in names}
        if _address(host) is None and _HOST.fullmatch(host):
            self._names.add(host.lower().rstrip("."))
        if address.is_loopback or address.is_unspecified:
            self._names.add("localhost")

    @property
    def has_key(self) -> bool:
        return self._key is not None

    @property
    def local(self) -> bool:
        """Whether only this machine can connect."""
        return self.address.is_loopback

    def check(self, headers: Sequence[tuple[bytes, bytes]], keyed: bool = True) -> None:
        """Refuse a request by its headers; `keyed`: it needs the key, if there is one.

        Raises:
            Refusal: 400 for a malformed header, 403 for a foreign name or web page, 401 without the key.
        """
        host = _single(headers, b"host") or ""
        if not self._serves(host):
            raise Refusal(403, f"the Host header names {host[:100]!r}; this server answers to {self._described()}")
        origin = _single(headers, b"origin")
        if origin is not None and origin.lower() not in (f"http://{host.lower()}", f"https://{host.lower()}"):
            raise Refusal(403, f"requests of web pages from elsewhere ({origin[:100]}) are not served")
        site = _single(headers, b"sec-fetch-site")  # browsers say it where they send no Origin, too
        if site not in (None, "none", "same-origin"):
            raise Refusal(403, "requests of web pages from elsewhere are not served")
        if keyed and self._key is not None:
            scheme, _, key = (_single(headers, b"authorization") or "").partition(" ")
            if scheme.lower() != "bearer" or not hmac.compare_digest(key.strip().encode(), self._key):
                raise Refusal(401, "this server needs its API key: send the header 'Authorization: Bearer KEY'")

    def _serves(self, host: str) -> bool:
        """Whether the Host header names this server. The port may be any: tunnels and containers change it."""
        match = _HOST.fullmatch(host)
        if match is None or int(match[3] or 0) >= 1 << 16:
            raise Refusal(400, f"the Host header is malformed: {host[:100]!r}")
        address = _address(match[1] or match[2])
        if address is None:
            if match[1]:
                raise Refusal(400, f"the Host header is malformed: {host[:100]!r}")
            return match[2].lower().rstrip(".") in self._names
        if self.address.is_unspecified:
            return True
        return address == self.address or (self.local and address.is_loopback)

    def _described(self) -> str:
        if self.address.is_unspecified:
            addresses = "its addresses"
        else:
            addresses = "loopback addresses" if self.local else str(self.address)
        named = f" and the names {', '.join(sorted(self._names))}" if self._names else ""
        return f"{addresses}{named}; --allow-host NAME adds a name"


def bind(host: str, port: int) -> socket.socket:
    """Bind a socket before the model is loaded, so that a port in use is known at once. Port 0 takes a free port.

    Raises:
        ValueError: the host is empty, which would mean all interfaces.
        OSError: the address cannot be bound.
    """
    if not host.strip():
        raise ValueError("--host is empty: give an address of this machine, or 0.0.0.0 for all of them")
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    sock = socket.socket(family, socket.SOCK_STREAM)
    try:
        claim_port(sock)
        sock.bind((host, port))
    except (OSError, ValueError, TypeError) as error:  # the last two: no name of a host, too long or with a NUL in it
        sock.close()
        reason = getattr(error, "strerror", None) or error
        raise OSError(f"cannot listen on {host} port {port}: {reason}. Choose another --host or --port.") from error
    return sock


def api_key(given: str | None) -> str | None:
    """The API key: the one given, else the one in the environment, else None.

    Raises:
        ValueError: the key cannot be sent in a header. The message does not contain it.
    """
    source = f"the environment variable {KEY_VARIABLE}" if given is None else "--api-key"
    key = os.environ.get(KEY_VARIABLE) if given is None else given
    if key is None:
        return None
    if not re.fullmatch(r"[!-~]{1,1024}", key):
        raise ValueError(f"{source} must have 1 to 1024 printable ASCII characters without spaces")
    return key


def check_exposure(reach: Reach, insecure: bool) -> None:
    """ValueError if other machines could use the server without a key and the user has not asked for that."""
    if not (reach.local or reach.has_key or insecure):
        raise ValueError(
            f"--host {reach.address} lets other machines use the server. Set an API key in the environment variable "
            f"{KEY_VARIABLE}, or add --insecure to serve everyone"
        )


def _address(text: str) -> _Address | None:
    """The address in a text, or None. An IPv4 address inside an IPv6 address counts as the IPv4 address."""
    try:
        address = ipaddress.ip_address(text.partition("%")[0])  # after %: the interface
    except ValueError:
        return None
    return getattr(address, "ipv4_mapped", None) or address


def _checked_name(name: str) -> str:
    match = _HOST.fullmatch(name)
    if match is None or match[2] is None or match[3] is not None:
        raise ValueError(f"--allow-host must be the name of a host without a port, got {name!r}")
    return name.lower().rstrip(".")


def _single(headers: Sequence[tuple[bytes, bytes]], name: bytes) -> str | None:
    """The value of a header, or None. Refused if it is there twice: others may read the other one."""
    values = [value for key, value in headers if key.lower() == name]
    if len(values) > 1:
        raise Refusal(400, f"the {name.decode().title()} header is there {len(values)} times")
    return values[0].decode("latin-1").strip() if values else None
