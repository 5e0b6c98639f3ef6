"""Hosts and ports as one text."""

from __future__ import annotations

import ipaddress
import re

# An IPv6 address, bare; or a name, an IPv4 address or an IPv6 address in brackets, and perhaps a port.
HOST = re.compile(r"([0-9A-Fa-f]*:[0-9A-Fa-f.]*:[0-9A-Fa-f:.]*|\[[0-9A-Fa-f:.]+\]|[^\s\[\]/,:]+)(:([0-9]+))?")


def join(host: str, port: int) -> str:
    """`host:port`; an IPv6 address gets its brackets."""
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def split(text: str) -> tuple[str, int | None]:
    """`host` or `host:port`, an IPv6 address in brackets if a port follows. Raises `ValueError`, with a sentence."""
    found = HOST.fullmatch(text)
    if found is None:
        raise ValueError(f"{text!r} is neither host nor host:port")
    host, _, port = found.groups()
    if port is not None and not 0 < int(port) < 65536:
        raise ValueError(f"{port} is not a port")
    return host.strip("[]"), None if port is None else int(port)


def is_loopback(host: str) -> bool:
    """Whether only this machine reaches a socket that is bound to `host`."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"
