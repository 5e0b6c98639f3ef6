"""The policies by name; each is imported when it is asked for."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, cast

if TYPE_CHECKING:
    from services.router.policy.base import Policy

POLICIES = {
    "random": ("services.router.policy.random", "Random"),
    "round_robin": ("services.router.policy.round_robin", "RoundRobin"),
    "least_loaded": ("services.router.policy.least_loaded", "LeastLoaded"),
}
NAMES = tuple(POLICIES)


def make_policy(name: str) -> Policy:
    """A new policy. Raises KeyError for a name that is not in `NAMES`."""
    module, cls = POLICIES[name]
    return cast("Policy", getattr(import_module(module), cls)())
