"""Hosts and ports as one text."""

from __future__ import annotations

import ipaddress


def join(host: str, port: int) -> str:
    """`host:port`; an IPv6 address gets its brackets."""
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def is_loopback(host: str) -> bool:
    """Whether only this machine reaches a socket that is bound to `host`."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"
