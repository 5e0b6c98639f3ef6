"""NIXL's own plugins: which it takes, and what it says of the others when the endpoint starts."""

from __future__ import annotations

import pytest

from common.transfer import registry
from common.transfer.base import TransferConfig, TransferError, no_wake

pytestmark = [
    pytest.mark.contract,
    pytest.mark.skipif(bool(registry.available()["nixl"]), reason="NIXL does not load here"),
]


@pytest.mark.parametrize("params", [{}, {"num_workers": "2"}])
def test_ucx_with_its_parameters(params: dict[str, str]) -> None:
    endpoint = registry.create("nixl", TransferConfig(nixl_params=params), no_wake)
    endpoint.allocate(1 << 20)
    endpoint.close()


@pytest.mark.parametrize(
    ("config", "why"),
    [
        (
            TransferConfig(nixl_backend="NONE"),
            r"NIXL_BACKEND\): NIXL has no plugin NONE; there are .*UCX",
        ),
        (TransferConfig(nixl_backend="POSIX"), r"NIXL's plugin POSIX moves data to storage"),
        (TransferConfig(nixl_params={"num_workers": "many"}), r"NIXL_BACKEND_PARAMS\): NIXL's UCX does not start with"),
    ],
)
def test_what_does_not_do_is_refused(config: TransferConfig, why: str) -> None:
    endpoint = registry.create("nixl", config, no_wake)
    with pytest.raises(TransferError, match=why):
        endpoint.allocate(1 << 20)
    endpoint.close()
