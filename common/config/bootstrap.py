"""Where bootstrap is."""

from __future__ import annotations

from dataclasses import dataclass

from common.config.flags import flag

DEFAULT_BOOTSTRAP_PORT = 8998


@dataclass(frozen=True)
class BootstrapAddressConfig:
    """How a router or worker finds bootstrap."""

    bootstrap: str | None = flag(
        None, "host:port of bootstrap, or of several of its replicas: a:1,b:1 (default: this host, bootstrap's port)."
    )
    disaggregation_bootstrap_port: int = flag(DEFAULT_BOOTSTRAP_PORT, "Port of bootstrap, when --bootstrap is not set.")

    @property
    def address(self) -> str:
        """host:port, of several replicas with commas between."""
        return self.bootstrap or f"127.0.0.1:{self.disaggregation_bootstrap_port}"
