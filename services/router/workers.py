"""The workers this router can reach, and the choice of those that serve a sequence."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import TypeVar

from common.errors.base import MeshError, Reason
from common.obs.log import get_logger
from pdmesh.v1 import types_pb2
from services.router.policy.base import Policy
from services.router.request import GenerationRequest
from services.router.worker_link import DecodeLink, PrefillLink

RETRY_AFTER_S = 1.0

log = get_logger(__name__)
Pairing = tuple[str, str, bytes]
LinkT = TypeVar("LinkT", PrefillLink, DecodeLink)


@dataclass(frozen=True)
class Route:
    """Who serves a sequence. Without `prefill`, `decode` is a unified worker."""

    prefill: PrefillLink | None
    decode: DecodeLink


class WorkerPool:
    """A link to every worker in bootstrap's view, and the policies that choose among them.

    `on_change` is called whenever a route may have come or gone.
    """

    def __init__(self, prefill_policy: Policy, decode_policy: Policy, on_change: Callable[[], None]) -> None:
        self._prefill_policy = prefill_policy
        self._decode_policy = decode_policy
        self._on_change = on_change
        self._prefills: dict[str, PrefillLink] = {}
        self._decodes: dict[str, DecodeLink] = {}
        self._closing: set[asyncio.Task[None]] = set()

    def update(self, workers: Mapping[str, types_pb2.Worker]) -> None:
        """Follow bootstrap's view. A worker that is gone or registered anew loses its link and what is on it."""
        for links in (self._prefills, self._decodes):
            for worker_id, link in list(links.items()):
                record = workers.get(worker_id)
                if record is None or not alive(record) or registration(record) != registration(link.record):
                    del links[worker_id]
                    self._close(link)
                else:
                    link.record = record
        for worker_id, record in workers.items():
            if alive(record) and worker_id not in self._prefills and worker_id not in self._decodes:
                if record.role == types_pb2.WORKER_ROLE_PREFILL:
                    self._prefills[worker_id] = PrefillLink(record, self._on_change)
                else:
                    self._decodes[worker_id] = DecodeLink(record, self._on_change)
        self._on_change()

    def choose(self, request: GenerationRequest) -> Route:
        """A pair, or a unified worker, for one sequence. Raises `MeshError` (NO_WORKER) when there is none."""
        prefills, decodes = self.candidates(request.model.name)
        if not decodes:
            message = f"no worker is ready to serve {request.model.name}: {self.lacking(request.model.name)}"
            raise MeshError(Reason.NO_WORKER, message, retry_after_s=RETRY_AFTER_S)
        decode = self._decode_policy.choose(decodes, request)
        if decode.record.role == types_pb2.WORKER_ROLE_UNIFIED:
            return Route(None, decode)
        partners = [link for link in prefills if pairing(link.record) == pairing(decode.record)]
        return Route(self._prefill_policy.choose(partners, request), decode)

    def candidates(self, model: str) -> tuple[list[PrefillLink], list[DecodeLink]]:
        """Available workers of a model: prefill workers, and such decode workers as have one or need none."""
        prefills = available(self._prefills.values(), model)
        pairs = {pairing(link.record) for link in prefills}
        unified = types_pb2.WORKER_ROLE_UNIFIED
        decodes = [
            link
            for link in available(self._decodes.values(), model)
            if link.record.role == unified or pairing(link.record) in pairs
        ]
        return prefills, decodes

    def lacking(self, model: str) -> str:
        """What keeps a model from being served, in a few words; empty when nothing does."""
        prefills, decodes = self.candidates(model)
        if decodes:
            return ""
        if not available(self._decodes.values(), model):
            return "no decode or unified worker is ready"
        return "no two workers fit each other" if prefills else "no prefill worker is ready"

    def in_flight(self) -> int:
        """Sequences on decode and unified workers."""
        return sum(link.in_flight for link in self._decodes.values())

    async def close(self) -> None:
        """Close all links. Idempotent."""
        for links in (self._prefills, self._decodes):
            while links:
                self._close(links.popitem()[1])
        await asyncio.gather(*self._closing)

    def _close(self, link: PrefillLink | DecodeLink) -> None:
        task = asyncio.create_task(link.close(), name=f"close {link.worker_id}")
        self._closing.add(task)
        task.add_done_callback(self._closing.discard)


def available(links: Iterable[LinkT], model: str) -> list[LinkT]:
    return [link for link in links if link.available and link.record.model.served_model_name == model]


def alive(record: types_pb2.Worker) -> bool:
    return record.state != types_pb2.WORKER_STATE_OFFLINE


def registration(record: types_pb2.Worker) -> tuple[int, str, int]:
    return record.epoch, record.address, record.role


def pairing(record: types_pb2.Worker) -> Pairing:
    """What must be equal for two workers to pair: the model, its weights, and the shape of a page."""
    layout = record.kv_layout.SerializeToString(deterministic=True)
    return record.model.served_model_name, record.model.fingerprint, layout
