"""Bootstrap, asked as a person at 3 a.m. would: JSON through server reflection."""

from __future__ import annotations

import json
import subprocess
import sysconfig
from pathlib import Path
from typing import Any

BUF = Path(sysconfig.get_path("scripts")) / "buf"


class Refused(Exception):
    """A call was refused; `code` is gRPC's."""

    def __init__(self, said: dict[str, Any]) -> None:
        super().__init__(said["message"])
        self.code, self.message = said["code"], said["message"]


def ask(address: str, method: str, **request: Any) -> dict[str, Any]:
    """Call bootstrap at `address`. Raises `Refused`."""
    url = f"http://{address}/pdmesh.v1.BootstrapService/{method}"
    command = [BUF, "curl", "--protocol", "grpc", "--http2-prior-knowledge", "-d", json.dumps(request), url]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=60)
    if ended.returncode:
        raise Refused(json.loads(ended.stderr))
    answer: dict[str, Any] = json.loads(ended.stdout)
    return answer


def seconds_of(duration: str) -> float:
    """A Duration as JSON has it, such as 0.012s."""
    return float(duration.removesuffix("s"))
