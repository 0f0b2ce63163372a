"""Where a server is: on this computer, or elsewhere and only with permission."""

import ipaddress
import socket
from dataclasses import dataclass
from urllib.parse import urlsplit

from nnssl_plugin.errors import UserError

EXAMPLE = "http://127.0.0.1:8000/v1"


@dataclass(frozen=True)
class Endpoint:
    """The address of a server, written anew from its checked parts."""

    url: str
    host: str
    is_local: bool


def find_endpoint(address: str, *, allow_remote: bool) -> Endpoint:
    """The server of an address.

    Local are loopback addresses, and ``localhost`` where it leads to loopback addresses alone. Every other name is
    another computer, whatever it leads to now: that can change from one look-up to the next.

    Args:
        address: ``http://HOST:PORT/v1`` or ``https://…``.
        allow_remote: whether the server may be another computer.

    Raises:
        UserError: no such address, or another computer that is not allowed.
    """
    if not address:
        raise UserError("No server is named that would describe the slices.", f"For example: --endpoint {EXAMPLE}")
    scheme, host, port, path = _parts(address)
    is_local = _is_local(host)
    if not is_local and not allow_remote:
        raise UserError(
            f"{host} is another computer: pictures of your scans would leave this one.",
            "If they may, add --allow-remote. A server on this computer is named by its address: " + EXAMPLE,
        )
    shown = f"[{host}]" if ":" in host else host
    return Endpoint(f"{scheme}://{shown}{'' if port is None else f':{port}'}{path}", host, is_local)


def _parts(address: str) -> tuple[str, str, int | None, str]:
    refusal = UserError(f"--endpoint {address!r} is no address of a server.", f"For example: {EXAMPLE}")
    if not address.isprintable() or any(sign in address for sign in "\\ @?#"):  # other readers see other hosts in them
        raise refusal
    try:
        parts = urlsplit(address)
        host, port = parts.hostname, parts.port
    except ValueError as error:
        raise refusal from error
    if parts.scheme not in ("http", "https") or not host or not host.isascii():
        raise refusal
    return parts.scheme, host, port, parts.path.rstrip("/")


def _is_local(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        if host != "localhost":
            return False
    try:
        found = {str(entry[4][0]) for entry in socket.getaddrinfo(host, None)}
    except OSError:
        return False
    return bool(found) and all(ipaddress.ip_address(address.partition("%")[0]).is_loopback for address in found)
