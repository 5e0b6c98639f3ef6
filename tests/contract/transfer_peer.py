"""The other side of the transfer contract: a process with a pool that answers JSON commands.

    python transfer_peer.py BACKEND POOL_BYTES

Its answers are lines that begin with `@`, so that whatever an engine prints does not matter. The first is the
descriptor.
"""

from __future__ import annotations

import hashlib
import json
import sys
import threading
from typing import Any

import numpy as np

from common.transfer.base import Run, TransferConfig, TransferError
from common.transfer.registry import create


def answer(value: Any) -> None:
    print("@" + json.dumps(value), flush=True)


def main(backend: str, pool_bytes: int) -> None:
    news = threading.Event()
    endpoint = create(backend, TransferConfig(), news.set)
    pool = np.frombuffer(endpoint.allocate(pool_bytes), dtype=np.uint8)
    answer(endpoint.export().hex())
    backlog: list[bytes] = []
    for line in sys.stdin:
        match json.loads(line):
            case ["digest"]:
                answer(hashlib.blake2b(pool.tobytes()).hexdigest())
            case ["count", value]:
                answer(int(np.count_nonzero(pool == value)))
            case ["fill", value]:
                pool[:] = value
                answer(None)
            case ["receive", count]:
                while len(backlog) < count:
                    backlog += endpoint.received()
                    if len(backlog) < count:
                        news.wait()
                        news.clear()
                answer([payload.hex() for payload in backlog[:count]])
                del backlog[:count]
            case ["watch", count, page_bytes]:
                # Each payload names a page; tell what the page held in the moment it came.
                seen: list[list[int]] = []
                while len(seen) < count:
                    for payload in endpoint.received():
                        page = pool[payload[0] * page_bytes : (payload[0] + 1) * page_bytes]
                        seen.append([payload[0], int(page.min()), int(page.max())])
                    if len(seen) < count:
                        news.wait()
                        news.clear()
                answer(seen)
            case ["live", epoch]:
                endpoint.live(epoch)
                answer(None)
            case ["connect", descriptor]:
                # Whether it is welcome shows in the first transfer, which is empty.
                try:
                    peer = endpoint.connect(bytes.fromhex(descriptor))
                    endpoint.submit(peer, [], 30.0)
                except TransferError as error:
                    answer(str(error))
                    continue
                while not (ended := endpoint.poll()):
                    news.wait()
                    news.clear()
                answer(ended[0].error or peer)
            case ["write", peer]:
                endpoint.submit(peer, [Run(0, 0, pool_bytes)], 30.0)
                while not (ended := endpoint.poll()):
                    news.wait()
                    news.clear()
                answer(ended[0].state.value)
            case ["disconnect", peer]:
                endpoint.disconnect(peer)
                answer(None)
            case ["close"]:
                endpoint.close()
                endpoint.close()
                answer(sorted(thread.name for thread in threading.enumerate()))
    endpoint.close()


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]))
