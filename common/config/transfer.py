"""What users write about the engines that move pages: RDMA devices, Mooncake's file, NIXL's parameters.

Each function raises `MeshError` (BAD_CONFIG) with the flag's name for what cannot work.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from common.config.flags import bad

IB_DEVICE = "--disaggregation-ib-device"
MOONCAKE_FILE = "--mooncake-config-path"
NIXL_PARAMS = "--disaggregation-nixl-backend-params"
RDMA_DEVICES = Path("/sys/class/infiniband")
PEER_TO_PEER = "P2PHANDSHAKE"
DISCOVER = ("", "auto-discovery")  # Mooncake's words for a device that it chooses itself


def rdma_devices() -> list[str]:
    """The RDMA devices of this machine, as the kernel lists them."""
    return sorted(path.name for path in RDMA_DEVICES.iterdir()) if RDMA_DEVICES.is_dir() else []


def rdma_ports(device: str) -> list[int]:
    """The numbers of an RDMA device's ports."""
    return sorted(int(path.name) for path in RDMA_DEVICES.glob(f"{device}/ports/*"))


def check_present(devices: Sequence[str], source: str) -> None:
    """Refuse a device that this machine does not have."""
    there = rdma_devices()
    if missing := [device for device in devices if device not in there]:
        some = f"there are {', '.join(there)}" if there else "it has none"
        raise bad(f"{source}: this machine has no RDMA device {', '.join(missing)}; {some}")


# ------------------------------------------------------------------------------ --disaggregation-ib-device


def ib_devices(text: str | None, gpu: int) -> tuple[str, ...]:
    """The devices that the flag's `text` names for a GPU; none where there is no text.

    As in SGLang, it is one name or several with commas, for every GPU alike; or a JSON object from GPU to names; or
    the path of a `.json` file with such an object.
    """
    devices = ib_device_map(text)
    if isinstance(devices, tuple):
        return devices
    if gpu not in devices:
        raise bad(f"{IB_DEVICE}: names no device for GPU {gpu}, only for {', '.join(map(str, sorted(devices)))}")
    return devices[gpu]


def ib_device_map(text: str | None) -> tuple[str, ...] | dict[int, tuple[str, ...]]:
    """The flag's `text`, read: names for all GPUs, or names by GPU."""
    if text is None:
        return ()
    text, source = text.strip(), IB_DEVICE
    if text.endswith(".json"):
        source = f"{IB_DEVICE}: {text}"
        text = read_text(Path(text), IB_DEVICE)
    elif not text.startswith("{"):
        return names_of(text, source)
    by_gpu = read_object(text, source)
    if not by_gpu:
        raise bad(f"{source}: names no GPU")
    for gpu in by_gpu:
        if not (gpu.isascii() and gpu.isdigit()):
            raise bad(f"{source}: {gpu!r} is not the number of a GPU")
    return {int(gpu): names_of(names, f"{source}: GPU {gpu}") for gpu, names in by_gpu.items()}


def names_of(names: Any, source: str) -> tuple[str, ...]:
    """`a,b` as a tuple."""
    if not isinstance(names, str):
        raise bad(f"{source}: {names!r} is not a text of device names with commas between them")
    devices = tuple(name.strip() for name in names.split(","))
    if not all(device and "/" not in device and not any(map(str.isspace, device)) for device in devices):
        raise bad(f"{source}: {names!r} is not a list of device names with commas between them")
    if len(set(devices)) < len(devices):
        raise bad(f"{source}: {names!r} names a device twice")
    return devices


# ------------------------------------------------------------------------------ Mooncake's file


@dataclass(frozen=True)
class MooncakeFile:
    """What Mooncake's configuration file says of the transfer engine; what is empty is left to us."""

    host: str = ""
    protocol: str = ""
    devices: tuple[str, ...] = ()


def read_mooncake_file(path: str | None) -> MooncakeFile:
    """Mooncake's own JSON file: `local_hostname`, `metadata_server`, `protocol`, `device_name`, all optional.

    What it says of Mooncake's store is nothing to us. Its metadata server is not used: endpoints reach each other
    through the control plane, so that any but Mooncake's peer-to-peer handshake is refused.
    """
    if path is None:
        return MooncakeFile()
    source = f"{MOONCAKE_FILE}: {path}"
    content = read_object(read_text(Path(path), MOONCAKE_FILE), source)
    host, metadata, protocol, device = (
        text_of(content, key, source) for key in ("local_hostname", "metadata_server", "protocol", "device_name")
    )
    if metadata not in ("", PEER_TO_PEER):
        raise bad(f"{source}: metadata_server: {metadata!r} is not used here; endpoints need {PEER_TO_PEER}")
    if protocol.lower() not in ("", "tcp", "rdma"):
        raise bad(f"{source}: protocol: {protocol!r} is neither tcp nor rdma")
    if any(map(str.isspace, host)) or host.count(":") == 1:
        raise bad(f"{source}: local_hostname: {host!r} is not a host, without a port: engines choose theirs")
    devices = () if device in DISCOVER else names_of(device, f"{source}: device_name")
    return MooncakeFile(host, protocol.lower(), devices)


# ------------------------------------------------------------------------------ NIXL's parameters


def nixl_params(text: str) -> Mapping[str, str]:
    """A JSON object of texts, as NIXL's `create_backend` takes it."""
    params = read_object(text, NIXL_PARAMS)
    if wrong := [name for name, value in params.items() if not isinstance(value, str)]:
        raise bad(f"{NIXL_PARAMS}: the value of {wrong[0]!r} is not a text")
    return params


# ------------------------------------------------------------------------------ reading


def read_text(path: Path, source: str) -> str:
    try:
        return path.read_text()
    except (OSError, UnicodeDecodeError) as error:
        why = error.strerror if isinstance(error, OSError) else error
        raise bad(f"{source}: {path} cannot be read: {why}") from None


def read_object(text: str, source: str) -> dict[str, Any]:
    try:
        content = json.loads(text)
    except ValueError as error:
        raise bad(f"{source}: not JSON: {error}") from None
    if not isinstance(content, dict):
        raise bad(f"{source}: not a JSON object")
    return content


def text_of(content: Mapping[str, Any], key: str, source: str) -> str:
    value = content.get(key) or ""
    if not isinstance(value, str):
        raise bad(f"{source}: {key}: {value!r} is not a text")
    return value.strip()
