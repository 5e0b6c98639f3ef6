"""Transfer backends by name. A backend's engine is imported when it is first asked for."""

from __future__ import annotations

import importlib
from typing import Protocol

from common.transfer.base import TransferBackend, TransferConfig, TransferError, Wake

_MODULES = {
    "local": "common.transfer.local",
    "mooncake": "common.transfer.mooncake",
    "nixl": "common.transfer.nixl",
    "emulated": "common.transfer.emulated",
}
NAMES = tuple(_MODULES)


class _Module(Protocol):
    """What a backend's module offers."""

    def load(self) -> object:
        """Import the engine; raises `TransferError` that says what is missing and how to get it."""

    def create(self, config: TransferConfig, wake: Wake) -> TransferBackend:
        """An endpoint."""


def create(name: str, config: TransferConfig, wake: Wake) -> TransferBackend:
    """An endpoint of the backend `name`. Raises `TransferError` if its engine cannot be loaded or started."""
    return _module(name).create(config, wake)


def available() -> dict[str, str | None]:
    """Every backend with None, or the reason why it cannot be loaded here. Imports all the engines."""
    reasons: dict[str, str | None] = {}
    for name in NAMES:
        try:
            _module(name).load()
        except TransferError as error:
            reasons[name] = str(error)
        else:
            reasons[name] = None
    return reasons


def _module(name: str) -> _Module:
    if name not in _MODULES:
        raise TransferError(f"there is no transfer backend {name!r}; there are {', '.join(NAMES)}")
    module: _Module = importlib.import_module(_MODULES[name])
    return module
