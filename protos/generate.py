"""Generates protos/gen from protos/pdmesh, or checks that it is fresh (--check).

The generators are pinned and run in environments of their own (.venv-protoc, .venv-mypy-protobuf): stubs made by
grpcio-tools 1.71.2 load on protobuf 5.29 to 7.x, and mypy-protobuf, as a plugin, writes their types.
"""

from __future__ import annotations

import argparse
import filecmp
import subprocess
import sys
import tempfile
import venv
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PROTOS = ROOT / "protos"
GENERATED = PROTOS / "gen"
PROTOC_PACKAGES = ["grpcio-tools==1.71.2", "protobuf==5.29.6", "setuptools<82"]
MYPY_PACKAGES = ["mypy-protobuf==5.1.0"]


def environment(name: str, packages: list[str]) -> Path:
    """Make (once) an environment that holds exactly `packages`; return its bin folder."""
    folder = ROOT / name
    stamp = folder / "packages.txt"
    if not stamp.exists() or stamp.read_text() != "\n".join(packages):
        venv.create(folder, with_pip=True, clear=True)
        subprocess.run([folder / "bin/pip", "install", "-q", *packages], check=True)
        stamp.write_text("\n".join(packages))
    return folder / "bin"


def generate(target: Path) -> None:
    protoc = environment(".venv-protoc", PROTOC_PACKAGES)
    mypy = environment(".venv-mypy-protobuf", MYPY_PACKAGES)
    files = sorted(str(path.relative_to(PROTOS)) for path in (PROTOS / "pdmesh").rglob("*.proto"))
    target.mkdir(parents=True, exist_ok=True)
    subprocess.run(
        [
            *(protoc / "python", "-W", "ignore", "-m", "grpc_tools.protoc", f"-I{PROTOS}"),
            f"--plugin=protoc-gen-mypy={mypy / 'protoc-gen-mypy'}",
            f"--plugin=protoc-gen-mypy_grpc={mypy / 'protoc-gen-mypy_grpc'}",
            *(f"--python_out={target}", f"--grpc_python_out={target}"),
            *(f"--mypy_out={target}", f"--mypy_grpc_out={target}"),
            *files,
        ],
        check=True,
        cwd=ROOT,
    )
    for folder in {(target / file).parent for file in files}:
        while folder != target:
            (folder / "__init__.py").touch()
            folder = folder.parent
    (target / "pdmesh" / "py.typed").touch()


def stale(fresh: Path) -> list[str]:
    """Files of the two trees that differ or stand in one of them only."""

    def names(tree: Path) -> set[str]:
        return {str(p.relative_to(tree)) for p in tree.rglob("*") if p.is_file() and "__pycache__" not in p.parts}

    both = names(fresh) & names(GENERATED)
    differ = {name for name in both if not filecmp.cmp(fresh / name, GENERATED / name, shallow=False)}
    return sorted(differ | (names(fresh) ^ names(GENERATED)))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--check", action="store_true", help="compare only; exit 1 when protos/gen is not fresh")
    if not parser.parse_args().check:
        generate(GENERATED)
        return 0
    with tempfile.TemporaryDirectory() as folder:
        generate(Path(folder))
        differ = stale(Path(folder))
    for name in differ:
        print(f"protos/gen/{name} is not fresh: run `make protos`", file=sys.stderr)
    return 1 if differ else 0


if __name__ == "__main__":
    sys.exit(main())
