"""Makes `.venv` and installs the project there, editable, with everything it needs. `make setup` runs it.

    python3.11 deploy/setup.py

Versions are those of deploy/constraints.txt; where packages come from is the machine's pip configuration. When
nothing that this depends on has changed since the last run, it returns at once; `--done` only asks whether that
is so. Standard library only.
"""

from __future__ import annotations

import hashlib
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
VENV = ROOT / ".venv"
STAMP = VENV / "pdmesh-setup"
CONSTRAINTS = ROOT / "deploy" / "constraints.txt"
LIBRARIES = ROOT / "deploy" / "system_libraries.py"
INPUTS = (ROOT / "pyproject.toml", CONSTRAINTS, LIBRARIES, Path(__file__).resolve())
MINIMUM = (3, 11)
GROUPS = ("dev", "etcd")


def fingerprint() -> str:
    """Digest of all that decides what the environment holds, and where it stands."""
    digest = hashlib.sha256(f"{sys.version} {ROOT}".encode())
    for path in INPUTS:
        digest.update(path.read_bytes())
    return digest.hexdigest()


def say(message: str) -> None:
    print(f"setup: {message}", flush=True)


def run(*command: str | Path) -> None:
    """Run one step. Raises CalledProcessError; the step itself says what went wrong."""
    subprocess.run(command, check=True, cwd=ROOT)


def install(*what: str) -> None:
    pip = ("-m", "pip", "--quiet", "--disable-pip-version-check", "--no-input", "install")
    run(VENV / "bin" / "python", *pip, "--constraint", CONSTRAINTS, *what)


def make_environment() -> None:
    """An environment of this Python; one that stands and works is kept, with whatever else is in it."""
    python = VENV / "bin" / "python"
    probe = [python, "-c", f"import sys, pip; sys.exit(sys.version_info[:2] != {sys.version_info[:2]})"]
    if python.exists() and subprocess.run(probe, capture_output=True).returncode == 0:
        return
    say(f"making {VENV} with Python {sys.version.split()[0]}")
    run(sys.executable, "-m", "venv", "--clear", VENV)


def cuda_major() -> str | None:
    """Major version of the CUDA that the installed torch was built for; None for a CPU build."""
    code = "import torch; print((torch.version.cuda or '').split('.')[0])"
    done = subprocess.run([VENV / "bin" / "python", "-c", code], check=True, capture_output=True, text=True)
    return done.stdout.strip() or None


def install_everything() -> None:
    make_environment()
    say("installing (some minutes the first time)")
    install("pip")
    install("torch")  # first and alone: nothing else shall choose its build
    cuda = cuda_major() if shutil.which("nvidia-smi") else None
    groups = [argument for group in GROUPS for argument in ("--group", group)]
    install("--editable", ".[mooncake-cuda]" if cuda else ".[mooncake]", *groups)
    # nixl asks for the engines of every CUDA version, 470 MB; one is enough, and it loads without CUDA too.
    install("--no-deps", "nixl", f"nixl-cu{cuda or 12}")
    run(VENV / "bin" / "python", LIBRARIES)


def main() -> int:
    if sys.version_info < MINIMUM:
        say(f"Python {'.'.join(map(str, MINIMUM))} or newer is needed; this is {sys.version.split()[0]}")
        return 1
    now = fingerprint()
    done = STAMP.exists() and STAMP.read_text() == now
    if done or "--done" in sys.argv[1:]:
        return 0 if done else 1
    try:
        install_everything()
    except subprocess.CalledProcessError as error:
        say(f"failed at: {' '.join(map(str, error.cmd))}")
        return 1
    STAMP.write_text(now)
    say("done")
    return 0


if __name__ == "__main__":
    sys.exit(main())
