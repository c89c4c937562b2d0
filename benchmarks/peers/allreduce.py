"""Synchronous SGD over `MPI.Allreduce`: `mpirun -np N`. Every worker keeps the weights and makes the same step."""

import torch
from mpi4py import MPI

from benchmarks.peers import protocol


def main() -> None:
    options, comm = protocol.options(), MPI.COMM_WORLD
    torch.set_num_threads(options.threads)
    gradient = protocol.make_gradient(options.parameters)
    weights, velocity = torch.zeros_like(gradient), torch.zeros_like(gradient)
    buffer = gradient.numpy()

    def round_() -> None:
        comm.Allreduce(MPI.IN_PLACE, buffer)
        # leaves the mean in the gradient: as before
        protocol.step_(weights, gradient, velocity, comm.size)

    rounds, rate = protocol.in_step(round_, comm.bcast, options.warmup, options.seconds)
    right = comm.gather(protocol.are_right(weights, rounds))
    if comm.rank == 0:
        protocol.report([rate] * comm.size, rounds * comm.size, all(right))


if __name__ == "__main__":
    main()
