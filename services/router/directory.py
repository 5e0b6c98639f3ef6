"""The models that can be asked for, and their tokenizers."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property

from common.errors.base import MeshError, Reason
from common.obs.log import get_logger
from common.text.template import ChatTemplate
from common.text.tokenizer import Tokenizer
from pdmesh.v1 import types_pb2
from services.router.request import ServedModel

RETRY_LOADING_AFTER_S = 10.0

log = get_logger(__name__)


@dataclass(frozen=True)
class Texts:
    """What turns text into tokens and back; `problem` says why `tokenizer` is missing."""

    tokenizer: Tokenizer | None
    problem: MeshError | None = None
    loaded_at_s: float = 0.0

    def need_tokenizer(self) -> Tokenizer:
        """Raises `MeshError` when there is none."""
        if self.tokenizer is None:
            assert self.problem is not None
            raise MeshError(self.problem.reason, self.problem.message)
        return self.tokenizer

    def need_template(self) -> ChatTemplate:
        """Raises `MeshError` (UNSUPPORTED) when there is none."""
        return self._template

    @cached_property
    def _template(self) -> ChatTemplate:
        return ChatTemplate.of(self.need_tokenizer())  # compiling takes as long as all else of a short request


class Directory:
    """Served models by name, as the workers tell them.

    A model stays known when its last worker has gone: then it is not unknown but without workers. Tokenizers
    are read in a thread as soon as a model's first worker appears, from `tokenizer_path` or the workers' path.
    """

    def __init__(self, tokenizer_path: str | None = None) -> None:
        self._tokenizer_path = tokenizer_path
        self._models: dict[str, ServedModel] = {}
        self._texts: dict[str, asyncio.Task[Texts]] = {}

    def update(self, workers: Iterable[types_pb2.Worker]) -> None:
        """Follow bootstrap's view of the workers."""
        by_name: dict[str, list[types_pb2.Worker]] = {}
        for worker in workers:
            if worker.state != types_pb2.WORKER_STATE_OFFLINE:
                by_name.setdefault(worker.model.served_model_name, []).append(worker)
        for name, serving in by_name.items():
            model = served_model(name, serving)
            known, self._models[name] = self._models.get(name), model
            if known is None or known.model_path != model.model_path:
                self._start_loading(model)

    def get(self, name: str) -> ServedModel:
        """A model by name; an empty name is enough when there is one alone. Raises `MeshError` (UNKNOWN_MODEL)."""
        if not name and len(self._models) == 1:
            return next(iter(self._models.values()))
        if not self._models:
            raise MeshError(Reason.NO_WORKER, "no worker has registered yet", retry_after_s=1.0)
        if name not in self._models:
            known = ", ".join(sorted(self._models))
            problem = f"there is no model {name!r}" if name else "name a model"
            raise MeshError(Reason.UNKNOWN_MODEL, f"{problem}; served: {known}", parameter="model")
        return self._models[name]

    def models(self) -> list[ServedModel]:
        """All known models by name."""
        return [self._models[name] for name in sorted(self._models)]

    async def texts(self, model: ServedModel) -> Texts:
        """The model's tokenizer, once it is read. After a failure it is tried again, though not at once."""
        task = self._texts[model.name]
        if task.done():
            texts = task.result()
            if texts.problem is None or time.monotonic() - texts.loaded_at_s < RETRY_LOADING_AFTER_S:
                return texts
            task = self._start_loading(model)
        return await asyncio.shield(task)

    async def close(self) -> None:
        """Forget everything; a tokenizer that is being read is waited for."""
        await asyncio.gather(*self._texts.values(), return_exceptions=True)
        self._texts.clear()

    def _start_loading(self, model: ServedModel) -> asyncio.Task[Texts]:
        task = asyncio.create_task(self._load(model), name=f"tokenizer of {model.name}")
        self._texts[model.name] = task
        return task

    async def _load(self, model: ServedModel) -> Texts:
        path = self._tokenizer_path or model.model_path
        try:
            tokenizer = await asyncio.to_thread(Tokenizer.load, path)
        except MeshError as error:
            log.warning("no tokenizer", model=model.name, path=path, error=error.message)
            return Texts(None, error, time.monotonic())
        log.info("tokenizer loaded", model=model.name, path=path)
        return Texts(tokenizer)


def served_model(name: str, workers: list[types_pb2.Worker]) -> ServedModel:
    """What all workers of a model can take: the least of their limits; and the most that one of them holds."""
    infos = [worker.model for worker in workers]
    decodes = [worker for worker in workers if worker.role != types_pb2.WORKER_ROLE_PREFILL]
    return ServedModel(
        name=name,
        model_path=infos[0].model_path,
        context_length=min(info.context_length for info in infos),
        vocab_size=min(info.vocab_size for info in infos),
        ready_at_s=min(info.ready_at.ToNanoseconds() for info in infos) / 1e9,
        pool_tokens=max((worker.pool_pages * worker.kv_layout.page_size for worker in decodes), default=0),
    )
