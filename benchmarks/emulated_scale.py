"""Many emulated workers on one bootstrap: what their heartbeats cost it, and how soon it misses one that is silent.

    make bench BENCH=emulated_scale ARGS="--workers 1000 --processes 2"

The workers are real to the mesh: each has its own connection, session, heartbeats, gRPC server and pages. Measured are
the time until all are registered, the CPU of bootstrap while nothing happens but heartbeats, the memory of a worker,
and the time from the moment when one worker is stopped (SIGSTOP) until bootstrap calls it offline.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack

import grpc
from processes import cpu_s, resident_mib, service

from pdmesh.v1 import bootstrap_service_pb2 as pb
from pdmesh.v1 import bootstrap_service_pb2_grpc as pb_grpc
from pdmesh.v1 import types_pb2

POLL_S = 0.02


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workers", type=int, default=1000)
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--seconds", type=float, default=20.0)
    parser.add_argument("--interval", type=float, default=5.0, help="seconds between heartbeats")
    parser.add_argument("--max-failure", type=int, default=2)
    arguments = parser.parse_args()
    with ExitStack() as stack:
        print(json.dumps(measure(arguments, stack), indent=2))


def measure(arguments: argparse.Namespace, stack: ExitStack) -> dict[str, float]:
    heartbeats = [
        f"--disaggregation-heartbeat-interval={arguments.interval}",
        f"--disaggregation-heartbeat-max-failure={arguments.max_failure}",
    ]
    bootstrap = stack.enter_context(service("bootstrap", "--port", "0", "--metrics-port", "0", *heartbeats))
    address = str(bootstrap.grpc)
    shared = ("--bootstrap", address, "--emulated-preset", "zero")

    def start(number: int) -> int:
        count = arguments.workers // arguments.processes + (number < arguments.workers % arguments.processes)
        name = f"--worker-id=group{number}"
        return stack.enter_context(service("emulate", "--workers", str(count), name, *shared)).pid

    started = time.monotonic()
    with ThreadPoolExecutor(arguments.processes) as pool:
        groups = list(pool.map(start, range(arguments.processes)))
    registered_s = time.monotonic() - started
    stub = pb_grpc.BootstrapServiceStub(stack.enter_context(grpc.insecure_channel(address)))
    workers = stub.ListWorkers(pb.ListWorkersRequest(), timeout=10).workers
    assert len(workers) == arguments.workers, f"{len(workers)} workers are registered"

    time.sleep(2 * arguments.interval)  # the start's work is over
    before, began = cpu_s(bootstrap.pid), time.monotonic()
    time.sleep(arguments.seconds)
    cores = (cpu_s(bootstrap.pid) - before) / (time.monotonic() - began)

    return {
        "workers": len(workers),
        "start_and_registration_s": round(registered_s, 2),
        "bootstrap_cores": round(cores, 4),
        "bootstrap_mib": round(resident_mib(bootstrap.pid)),
        "mib_per_worker": round(sum(map(resident_mib, groups)) / len(workers), 2),
        "offline_after_s": round(offline_after_s(stub, shared, stack), 2),
        "offline_bound_s": arguments.interval * arguments.max_failure + 1,
        "load_average": os.getloadavg()[0],
    }


def offline_after_s(stub: pb_grpc.BootstrapServiceStub, shared: tuple[str, ...], stack: ExitStack) -> float:
    """Stop one more worker; how long until it is offline."""
    single = stack.enter_context(service("emulate", "--workers", "1", "--role", "unified", *shared))
    request = pb.ListWorkersRequest(role=types_pb2.WORKER_ROLE_UNIFIED)
    os.kill(single.pid, signal.SIGSTOP)
    stopped = time.monotonic()
    while True:
        (worker,) = stub.ListWorkers(request, timeout=10).workers
        if worker.state == types_pb2.WORKER_STATE_OFFLINE:
            return time.monotonic() - stopped
        time.sleep(POLL_S)


if __name__ == "__main__":
    main()
