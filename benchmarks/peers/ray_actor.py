"""A Ray actor as the parameter server, and an actor for each worker; Ray starts its own processes.

Flat numpy arrays travel through the object store: one copy in, and read in place at the other end.
"""

import warnings

import numpy as np
import ray
import torch

from benchmarks.peers import protocol

# the store's memory: read only
warnings.filterwarnings("ignore", message="The given NumPy array is not writable")


@ray.remote(num_cpus=0)
class Server:
    def __init__(self, num_parameters: int, threads: int):
        torch.set_num_threads(threads)
        self.weights, self.velocity = torch.zeros(num_parameters), torch.zeros(num_parameters)

    def push_fetch(self, gradient: np.ndarray) -> np.ndarray:
        protocol.step_(self.weights, torch.from_numpy(gradient), self.velocity)
        return self.weights.numpy()

    def fetch(self) -> np.ndarray:
        return self.weights.numpy()


@ray.remote(num_cpus=0)
class Worker:
    def __init__(self, server, num_parameters: int):
        torch.set_num_threads(1)
        self.server, self.gradient = server, protocol.make_gradient(num_parameters).numpy()

    def ready(self) -> None: ...

    def work(self, warmup: float, seconds: float) -> tuple[float, int]:
        clock, going = protocol.Clock(warmup, seconds), True
        while going:
            weights = ray.get(self.server.push_fetch.remote(self.gradient))
            going = clock.tick()
            del weights  # the store gets its room back
        return clock.rate, clock.exchanges

    def check(self, num_steps: int) -> bool:
        return protocol.are_right(torch.from_numpy(ray.get(self.server.fetch.remote())), num_steps)


def main() -> None:
    options = protocol.options()
    # bytes: in, out, and some to come
    room = max(256 << 20, 4 * options.parameters * (3 * options.workers + 4))
    ray.init(
        num_cpus=options.workers + 1,
        object_store_memory=room,
        include_dashboard=False,
        log_to_driver=False,
        logging_level="ERROR",
    )
    server = Server.remote(options.parameters, options.threads)
    workers = [Worker.remote(server, options.parameters) for _ in range(options.workers)]
    ray.get([worker.ready.remote() for worker in workers])
    results = ray.get([worker.work.remote(options.warmup, options.seconds) for worker in workers])
    exchanges = sum(count for _, count in results)
    right = all(ray.get([worker.check.remote(exchanges) for worker in workers]))
    protocol.report([rate for rate, _ in results], exchanges, right)
    ray.shutdown()


if __name__ == "__main__":
    main()
