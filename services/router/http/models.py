"""GET /v1/models."""

from __future__ import annotations

from typing import Any

from services.router.request import ServedModel

Json = dict[str, Any]


def model_json(model: ServedModel) -> Json:
    """OpenAI's model object, with the context length as vLLM and SGLang tell it."""
    return {
        "id": model.name,
        "object": "model",
        "created": int(model.ready_at_s),
        "owned_by": "pdmesh",
        "root": model.model_path,
        "max_model_len": model.context_length,
    }


def list_json(models: list[ServedModel]) -> Json:
    return {"object": "list", "data": [model_json(model) for model in models]}
