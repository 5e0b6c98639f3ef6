"""The workers this router can reach, and the choice of those that serve a sequence."""

from __future__ import annotations

import asyncio
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TypeVar, cast

from common.config.tls import Credentials
from common.mesh.credit import Credit
from common.mesh.fit import difference
from pdmesh.v1 import types_pb2
from services.router.credits import Spend
from services.router.passing import Need
from services.router.policy.base import Policy
from services.router.request import GenerationRequest
from services.router.worker_link import DecodeLink, PrefillLink

RETRY_AFTER_S = 1.0

Pairing = tuple[str, str, bytes]
Link = PrefillLink | DecodeLink
LinkT = TypeVar("LinkT", PrefillLink, DecodeLink)


@dataclass(frozen=True)
class Route:
    """Who serves a sequence, and the credit that it took. Without `prefill`, `decode` is a unified worker."""

    prefill: PrefillLink | None
    decode: DecodeLink
    spend: Spend


class WorkerPool:
    """A link to every worker in bootstrap's view, and the policies that choose among them.

    `on_change` is called whenever a route may have come or gone, `on_credit` when a worker has published credit.
    """

    on_credit: Callable[[], None] | None = None

    def __init__(
        self,
        prefill_policy: Policy,
        decode_policy: Policy,
        on_change: Callable[[], None],
        tls: Credentials | None = None,
    ) -> None:
        self._prefill_policy = prefill_policy
        self._decode_policy = decode_policy
        self._on_change = on_change
        self._tls = tls
        self._links: dict[str, Link] = {}
        self._pairings: dict[str, Pairing] = {}
        # Until a change of the workers: candidates and offers by model, prefill workers by what they pair with.
        self._candidates: dict[str, tuple[list[PrefillLink], list[DecodeLink]]] = {}
        self._offers: dict[str, dict[str, Credit | None]] = {}
        self._partners: dict[Pairing, list[PrefillLink]] = {}
        self._closing: set[asyncio.Task[None]] = set()

    def update(self, workers: Mapping[str, types_pb2.Worker]) -> None:
        """Follow bootstrap's view. A worker that is gone or registered anew loses its link and what is on it."""
        for worker_id, link in list(self._links.items()):
            record = workers.get(worker_id)
            if record is None or not alive(record) or registration(record) != registration(link.record):
                self._close(self._links.pop(worker_id))
                del self._pairings[worker_id]
            else:
                link.record = record
        for worker_id, record in workers.items():
            if alive(record) and worker_id not in self._links:
                self._links[worker_id] = self._connect(record)
                self._pairings[worker_id] = pairing(record)
        self._changed()

    def decodes(self, model: str) -> list[DecodeLink]:
        """Decode and unified workers that can take a sequence of a model."""
        return self.candidates(model)[1]

    def offers(self, model: str) -> dict[str, Credit | None]:
        """What each of them can still be given, as it changes."""
        if (known := self._offers.get(model)) is None:
            known = self._offers[model] = {link.worker_id: link.account.credit for link in self.decodes(model)}
        return known

    def free_sequences(self) -> float:
        """Places that all decode and unified workers still have; infinite where one does not tell, or none is there."""
        credits = [
            link.account.credit for link in self._links.values() if isinstance(link, DecodeLink) and link.available
        ]
        if not credits or None in credits:
            return math.inf
        return sum(credit.sequences for credit in credits if credit and credit.fits(1))

    def route(self, request: GenerationRequest, need: Need, decodes: Sequence[str]) -> Route:
        """A pair, or a unified worker: one of `decodes`, which were offered, its credit spent for `need`."""
        offered = cast(list[DecodeLink], [self._links[worker_id] for worker_id in decodes])
        decode = self._decode_policy.choose(offered, request)
        spend = decode.account.spend(need.tokens, need.remaining)
        if is_unified(decode.record):
            return Route(None, decode, spend)
        partners = self._partners_of(decode)
        if need.avoid:
            partners = [link for link in partners if link.worker_id not in need.avoid] or partners
        return Route(self._prefill_policy.choose(partners, request), decode, spend)

    def _partners_of(self, decode: DecodeLink) -> list[PrefillLink]:
        """Available prefill workers that fit a decode worker."""
        fit = self._pairings[decode.worker_id]
        if (known := self._partners.get(fit)) is None:
            prefills, _ = self.candidates(decode.record.model.served_model_name)
            known = self._partners[fit] = [link for link in prefills if self._pairings[link.worker_id] == fit]
        return known

    def candidates(self, model: str) -> tuple[list[PrefillLink], list[DecodeLink]]:
        """Available workers of a model: prefill workers, and such decode workers as have one or need none."""
        if (known := self._candidates.get(model)) is None:
            prefills = self._available(PrefillLink, model)
            pairs = {self._pairings[link.worker_id] for link in prefills}
            decodes = self._available(DecodeLink, model)
            usable = [link for link in decodes if is_unified(link.record) or self._pairings[link.worker_id] in pairs]
            known = self._candidates[model] = prefills, usable
        return known

    def lacking(self, model: str) -> str:
        """What keeps a model from being served, in a few words; empty when nothing does."""
        prefills, decodes = self.candidates(model)
        if decodes:
            return ""
        lonely = self._available(DecodeLink, model)
        if not lonely:
            return "no decode or unified worker is ready"
        if not prefills:
            return "no prefill worker is ready"
        prefill, decode = prefills[0].record, lonely[0].record
        field, here, there = difference(prefill, decode) or ("model", "", "")
        return (
            f"no two workers fit each other: {prefill.worker_id} and {decode.worker_id} differ in {field}: "
            f"{here!r} and {there!r}"
        )

    def in_flight(self) -> int:
        """Sequences on decode and unified workers."""
        return sum(link.in_flight for link in self._links.values() if isinstance(link, DecodeLink))

    async def close(self) -> None:
        """Close all links. Idempotent."""
        self._forget_choices()
        while self._links:
            self._close(self._links.popitem()[1])
        await asyncio.gather(*self._closing)

    def _available(self, kind: type[LinkT], model: str) -> list[LinkT]:
        return [
            link
            for link in self._links.values()
            if isinstance(link, kind) and link.available and link.record.model.served_model_name == model
        ]

    def _changed(self) -> None:
        self._forget_choices()
        self._on_change()

    def _forget_choices(self) -> None:
        self._candidates.clear()
        self._offers.clear()
        self._partners.clear()

    def _credit_changed(self, link: DecodeLink, credit: Credit | None) -> None:
        offers = self._offers.get(link.record.model.served_model_name, {})
        if link.worker_id in offers:
            offers[link.worker_id] = credit

    def _connect(self, record: types_pb2.Worker) -> Link:
        if record.role == types_pb2.WORKER_ROLE_PREFILL:
            return PrefillLink(record, self._changed, self._tls)
        link = DecodeLink(record, self._changed, self._tls)
        link.on_credit = self.on_credit
        link.account.on_change = partial(self._credit_changed, link)
        return link

    def _close(self, link: Link) -> None:
        task = asyncio.create_task(link.close(), name=f"close {link.worker_id}")
        self._closing.add(task)
        task.add_done_callback(self._closing.discard)


def is_unified(record: types_pb2.Worker) -> bool:
    return record.role == types_pb2.WORKER_ROLE_UNIFIED


def alive(record: types_pb2.Worker) -> bool:
    return record.state != types_pb2.WORKER_STATE_OFFLINE


def registration(record: types_pb2.Worker) -> tuple[int, str, int]:
    """Changes when a worker was started anew under its old name."""
    return record.epoch, record.address, record.role


def pairing(record: types_pb2.Worker) -> Pairing:
    """What must be equal for two workers to pair: the model, its weights, and the shape of a page."""
    layout = record.kv_layout.SerializeToString(deterministic=True)
    return record.model.served_model_name, record.model.fingerprint, layout
