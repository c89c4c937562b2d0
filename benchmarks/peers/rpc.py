"""A parameter server over torch.distributed.rpc (TensorPipe), which starts its own N + 1 processes.

One flat tensor each way; TensorPipe carries tensors beside the pickled call, over shared memory on one host. The reply is
the live weights, without a copy: a fetch may be torn, which spares the server a pass over memory.
"""

import os
import tempfile
import threading

import torch
from torch import multiprocessing
from torch.distributed import rpc

from benchmarks.peers import protocol

SERVER = "server"


class Server:
    """The state of the server's process."""

    def __init__(self, num_parameters: int):
        self.lock = threading.Lock()
        self.weights, self.velocity = torch.zeros(num_parameters), torch.zeros(num_parameters)

    def push_fetch(self, gradient: torch.Tensor) -> torch.Tensor:
        with self.lock:
            protocol.step_(self.weights, gradient, self.velocity)
        return self.weights


def push_fetch(gradient: torch.Tensor) -> torch.Tensor:
    return Server.here.push_fetch(gradient)


def fetch() -> torch.Tensor:
    return Server.here.weights


def work(options) -> tuple[float, int]:
    """A worker's exchanges; called by the server, so that all start and none ends before its answer is there."""
    gradient = protocol.make_gradient(options.parameters)
    clock, going = protocol.Clock(options.warmup, options.seconds), True
    while going:
        rpc.rpc_sync(SERVER, push_fetch, (gradient,))
        going = clock.tick()
    return clock.rate, clock.exchanges


def check(num_steps: int) -> bool:
    return protocol.are_right(rpc.rpc_sync(SERVER, fetch), num_steps)


def run(rank: int, options, store: str) -> None:
    torch.set_num_threads(options.threads if rank == 0 else 1)
    if rank == 0:
        Server.here = Server(options.parameters)
    rpc.init_rpc(
        SERVER if rank == 0 else f"worker{rank}",
        rank=rank,
        world_size=options.workers + 1,
        rpc_backend_options=rpc.TensorPipeRpcBackendOptions(
            num_worker_threads=options.workers + 2, rpc_timeout=0, init_method=f"file://{store}"
        ),
    )
    if rank == 0:
        workers = [f"worker{number}" for number in range(1, options.workers + 1)]
        results = [
            call.wait() for call in [rpc.rpc_async(worker, work, (options,)) for worker in workers]
        ]
        exchanges = sum(count for _, count in results)
        right = all(rpc.rpc_sync(worker, check, (exchanges,)) for worker in workers)
        protocol.report([rate for rate, _ in results], exchanges, right)
    rpc.shutdown()


def main() -> None:
    options = protocol.options()
    os.environ.setdefault("TP_SOCKET_IFNAME", "lo")
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    with tempfile.TemporaryDirectory() as place:
        multiprocessing.spawn(run, (options, f"{place}/store"), nprocs=options.workers + 1)


if __name__ == "__main__":
    main()
