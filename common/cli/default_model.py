"""The model in the box."""

from __future__ import annotations

from pathlib import Path

from common.config.flags import bad

INSTALLED = Path(__file__).resolve().parent / "models" / "adder"
CHECKOUT = Path(__file__).resolve().parents[2] / "examples" / "models" / "adder"


def default_model_path() -> Path:
    """The adder's checkpoint folder: inside the installed wheel, or the checkout's. Raises `MeshError`."""
    for folder in (INSTALLED, CHECKOUT):
        if (folder / "config.json").is_file():
            return folder
    raise bad("--model-path: the model in the box is missing from this installation; name a checkpoint folder")
