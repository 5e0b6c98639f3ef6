"""Where a checkpoint is."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from common.models.config import bad_checkpoint

TEXT_FILES = ("*.json", "*.jinja", "*.txt", "*.model")  # all but the weights
HUB_FILES = (*TEXT_FILES, "*.safetensors")


def find_checkpoint(model_path: str, files: Sequence[str] = HUB_FILES) -> Path:
    """The folder of a checkpoint: `model_path` itself, or the hub repository of that name, downloaded once.

    Of a repository only `files` are fetched.
    `HF_HUB_OFFLINE` and the other variables of huggingface_hub apply.

    Raises:
        MeshError: BAD_CHECKPOINT when there is neither a folder nor a repository that can be had.
    """
    folder = Path(model_path).expanduser()
    if folder.is_dir():
        return folder
    if not model_path or model_path.startswith(("/", ".", "~")) or model_path.count("/") > 1:
        raise bad_checkpoint(f"{model_path!r} is not a folder")
    from huggingface_hub import snapshot_download  # slow to import, and needed by few

    try:
        return Path(snapshot_download(model_path, allow_patterns=list(files)))
    except Exception as error:  # the hub's client raises errors of several libraries
        raise bad_checkpoint(f"{model_path!r} is not a folder, and the hub: {error}") from error
