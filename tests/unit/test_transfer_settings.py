"""What users write about transfer engines: RDMA devices, Mooncake's file, NIXL's parameters, addresses."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from common.config import transfer as settings
from common.config.flags import resolve
from common.errors.base import MeshError
from common.rpc.address import split
from common.transfer.nixl import ucx_devices
from common.worker.config import WorkerConfig
from common.worker.transfer import transfer_config

pytestmark = pytest.mark.unit

MODEL = {"PDMESH_MODEL_PATH": "some/model"}


def config(**environ: str) -> WorkerConfig:
    return resolve(WorkerConfig, environ=MODEL | environ)


def refused(**environ: str) -> str:
    with pytest.raises(MeshError) as caught:
        config(**environ)
    return caught.value.message


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """A machine with four RDMA devices, of which one has two ports."""
    for device, ports in {"mlx5_0": "1", "mlx5_1": "12", "mlx5_2": "1", "mlx5_3": "1"}.items():
        for port in ports:
            (tmp_path / "infiniband" / device / "ports" / port).mkdir(parents=True)
    monkeypatch.setattr(settings, "RDMA_DEVICES", tmp_path / "infiniband")
    return tmp_path


# ---------------------------------------------------------------------------------------- RDMA devices


def test_one_device_or_several_are_for_every_gpu() -> None:
    assert settings.ib_devices(None, 3) == ()
    assert settings.ib_devices("mlx5_0", 3) == ("mlx5_0",)
    assert settings.ib_devices("mlx5_0, mlx5_1", 0) == ("mlx5_0", "mlx5_1")


@pytest.mark.parametrize("kind", ["text", "file"])
def test_a_map_names_the_devices_of_each_gpu(kind: str, tmp_path: Path) -> None:
    text = json.dumps({"0": "mlx5_0,mlx5_1", "1": "mlx5_2"})
    if kind == "file":
        path = tmp_path / "devices.json"
        path.write_text(text)
        text = str(path)
    assert settings.ib_devices(text, 0) == ("mlx5_0", "mlx5_1")
    assert settings.ib_devices(text, 1) == ("mlx5_2",)
    with pytest.raises(MeshError, match="--disaggregation-ib-device: names no device for GPU 2, only for 0, 1"):
        settings.ib_devices(text, 2)


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("", "not a list of device names"),
        ("mlx5_0,,mlx5_1", "not a list of device names"),
        ("mlx5_0 mlx5_1", "not a list of device names"),
        ("../mlx5_0", "not a list of device names"),
        ("mlx5_0,mlx5_0", "names a device twice"),
        ("{", "not JSON"),
        ("{}", "names no GPU"),
        ('{"first": "mlx5_0"}', "'first' is not the number of a GPU"),
        ('{"0": ["mlx5_0"]}', "GPU 0: .* is not a text"),
        ('{"0": ""}', "GPU 0: '' is not a list"),
        ("nowhere.json", "nowhere.json cannot be read: No such file"),
    ],
)
def test_malformed_devices_are_refused_whatever_the_backend(text: str, why: str) -> None:
    with pytest.raises(MeshError, match=f"--disaggregation-ib-device: .*{why}|--disaggregation-ib-device: {why}"):
        settings.ib_device_map(text)
    if text:  # an empty variable counts as unset
        assert "PDMESH_DISAGGREGATION_IB_DEVICE: " in refused(PDMESH_DISAGGREGATION_IB_DEVICE=text)


def test_a_device_that_is_not_there_is_refused_by_backends_that_would_use_it(machine: Path) -> None:
    variables = {"PDMESH_DISAGGREGATION_IB_DEVICE": "mlx5_0,mlx5_9"}
    for backend in ("mooncake", "nixl"):
        message = refused(**variables, PDMESH_DISAGGREGATION_TRANSFER_BACKEND=backend)
        assert message == (
            "PDMESH_DISAGGREGATION_IB_DEVICE: this machine has no RDMA device mlx5_9; "
            "there are mlx5_0, mlx5_1, mlx5_2, mlx5_3"
        )
    assert config(**variables).ib_devices() == (), "local uses none"


def test_each_rank_has_the_devices_of_its_gpu(machine: Path) -> None:
    made = config(
        PDMESH_DISAGGREGATION_TRANSFER_BACKEND="nixl",
        PDMESH_DISAGGREGATION_IB_DEVICE='{"4": "mlx5_0,mlx5_1", "5": "mlx5_2"}',
        PDMESH_BASE_GPU_ID="4",
    )
    assert [made.ib_devices(rank) for rank in (0, 1)] == [("mlx5_0", "mlx5_1"), ("mlx5_2",)]
    assert ucx_devices(transfer_config(made)) == "mlx5_0:1,mlx5_1:1,mlx5_1:2"
    assert ucx_devices(transfer_config(config())) == "lo"
    assert ucx_devices(transfer_config(config(PDMESH_HOST="0.0.0.0", PDMESH_ADVERTISE_ADDRESS="10.0.0.7"))) == ""


# ---------------------------------------------------------------------------------------- Mooncake's file


def mooncake(path: Path, **more: str) -> dict[str, str]:
    return {"PDMESH_DISAGGREGATION_TRANSFER_BACKEND": "mooncake", "MOONCAKE_CONFIG_PATH": str(path), **more}


def test_mooncakes_file_is_honoured(machine: Path) -> None:
    path = machine / "mooncake.json"
    content = {"local_hostname": "10.1.2.3", "metadata_server": "P2PHANDSHAKE", "protocol": "RDMA"}
    path.write_text(json.dumps({**content, "device_name": "mlx5_2", "master_server_address": "10.0.0.1:50051"}))
    made = transfer_config(config(**mooncake(path)))
    assert (made.mooncake_host, made.mooncake_protocol, made.ib_devices) == ("10.1.2.3", "rdma", ("mlx5_2",))
    flagged = config(**mooncake(path), PDMESH_DISAGGREGATION_IB_DEVICE="mlx5_1")
    assert flagged.ib_devices() == ("mlx5_1",), "the flag is nearer to this worker than a file that others read too"
    path.write_text(json.dumps({**content, "protocol": "tcp", "device_name": "none_here"}))
    assert transfer_config(config(**mooncake(path))).ib_devices == (), "TCP uses none"


@pytest.mark.parametrize(
    ("content", "why"),
    [
        ("{", "not JSON"),
        ("[]", "not a JSON object"),
        ('{"protocol": "carrier pigeon"}', "protocol: 'carrier pigeon' is neither tcp nor rdma"),
        ('{"protocol": 7}', "protocol: 7 is not a text"),
        ('{"local_hostname": "two words"}', "local_hostname: 'two words' is not a host"),
        ('{"local_hostname": "10.1.2.3:17813"}', "without a port: engines choose theirs"),
        ('{"metadata_server": "etcd://10.0.0.1:2379"}', "endpoints need P2PHANDSHAKE"),
        ('{"device_name": "mlx5_7"}', "this machine has no RDMA device mlx5_7; there are mlx5_0"),
    ],
)
def test_a_bad_file_of_mooncakes_is_refused(machine: Path, content: str, why: str) -> None:
    path = machine / "mooncake.json"
    path.write_text(content)
    message = refused(**mooncake(path))
    assert message.startswith("MOONCAKE_CONFIG_PATH: ")
    assert why in message
    assert config(MOONCAKE_CONFIG_PATH=str(path)), "the local backend does not read it"


def test_a_file_of_mooncakes_that_is_not_there_is_refused(tmp_path: Path) -> None:
    message = refused(**mooncake(tmp_path / "none.json"))
    assert message == f"MOONCAKE_CONFIG_PATH: {tmp_path}/none.json cannot be read: No such file or directory"


# ---------------------------------------------------------------------------------------- NIXL's plugin


@pytest.mark.parametrize("prefix", ["SGLANG", "PDMESH"])
def test_nixls_plugin_and_parameters_are_honoured(prefix: str) -> None:
    names = [f"{prefix}_DISAGGREGATION_NIXL_BACKEND{suffix}" for suffix in ("", "_PARAMS")]
    made = transfer_config(config(**dict(zip(names, ["UCCL", '{"num_cpus": "8"}'], strict=True))))
    assert (made.nixl_backend, made.nixl_params) == ("UCCL", {"num_cpus": "8"})


@pytest.mark.parametrize("prefix", ["SGLANG", "PDMESH"])
@pytest.mark.parametrize(
    ("value", "why"), [("{", "not JSON"), ("[]", "not a JSON object"), ('{"a": 8}', "the value of 'a' is not a text")]
)
def test_bad_parameters_are_refused_by_the_variables_name(prefix: str, value: str, why: str) -> None:
    name = f"{prefix}_DISAGGREGATION_NIXL_BACKEND_PARAMS"
    assert refused(**{name: value}).startswith(f"{name}: {why}")


# ---------------------------------------------------------------------------------------- addresses


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ("10.0.0.7", ("10.0.0.7", None)),
        ("node-1:30001", ("node-1", 30001)),
        ("fd00::7", ("fd00::7", None)),
        ("[fd00::7]:9", ("fd00::7", 9)),
    ],
)
def test_hosts_and_ports(text: str, parts: tuple[str, int | None]) -> None:
    assert split(text) == parts


@pytest.mark.parametrize("text", ["", ":80", "a:b", "a:0", "a:65536", "a:-1", "a b", "http://a", "[fd00::7", "a,b"])
def test_what_is_no_address_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match=r"is neither host nor host:port|is not a port"):
        split(text)
    if text:
        assert refused(PDMESH_ADVERTISE_ADDRESS=text).startswith("PDMESH_ADVERTISE_ADDRESS: ")


def test_a_worker_is_reached_where_it_says() -> None:
    plain = config()
    assert plain.address(30007) == "127.0.0.1:30007"
    assert (transfer_config(plain).host, transfer_config(plain).listen) == ("127.0.0.1", "127.0.0.1")
    behind = config(PDMESH_HOST="0.0.0.0", PDMESH_ADVERTISE_ADDRESS="10.0.0.7")
    assert behind.address(30007) == "10.0.0.7:30007"
    assert (transfer_config(behind).host, transfer_config(behind).listen) == ("10.0.0.7", "0.0.0.0")
    assert config(PDMESH_HOST="::", PDMESH_ADVERTISE_ADDRESS="[fd00::7]:9").address(30007) == "[fd00::7]:9"


def test_listening_everywhere_is_no_address() -> None:
    assert "--advertise-address says how" in refused(PDMESH_HOST="0.0.0.0")
    assert refused(PDMESH_ADVERTISE_ADDRESS="0.0.0.0:80").startswith("PDMESH_ADVERTISE_ADDRESS: others cannot reach")
    assert "loopback alone" in refused(PDMESH_ADVERTISE_ADDRESS="10.0.0.7"), "for want of --host"
