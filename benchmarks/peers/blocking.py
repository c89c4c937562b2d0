"""Plain blocking mpi4py: `mpirun -np N+1`. The server takes whoever comes, applies, and sends the weights back."""

import torch
from mpi4py import MPI

from benchmarks.peers import protocol

PUSH, STOP = 1, 2


def serve(comm: MPI.Comm, weights: torch.Tensor) -> int:
    """Serve until every worker has stopped; the number of pushes."""
    gradient, velocity = torch.empty_like(weights), torch.zeros_like(weights)
    into, out, status = gradient.numpy(), weights.numpy(), MPI.Status()
    pushes, working = 0, comm.size - 1
    while working:
        comm.Recv(into, MPI.ANY_SOURCE, MPI.ANY_TAG, status)
        if status.tag == STOP:
            working -= 1
            continue
        protocol.step_(weights, gradient, velocity)
        comm.Send(out, status.source, PUSH)
        pushes += 1
    return pushes


def work(comm: MPI.Comm, weights: torch.Tensor, clock: protocol.Clock) -> None:
    gradient, into = protocol.make_gradient(len(weights)).numpy(), weights.numpy()
    going = True
    while going:
        comm.Send(gradient, 0, PUSH)
        comm.Recv(into, 0, PUSH)
        going = clock.tick()
    comm.Send(gradient[:0], 0, STOP)


def main() -> None:
    options, comm = protocol.options(), MPI.COMM_WORLD
    torch.set_num_threads(options.threads if comm.rank == 0 else 1)
    weights, pushes, rate = torch.zeros(options.parameters), 0, 0.0
    comm.Barrier()
    if comm.rank == 0:
        pushes = serve(comm, weights)
    else:
        clock = protocol.Clock(options.warmup, options.seconds)
        work(comm, weights, clock)
        rate = clock.rate
    rates = comm.gather(rate)
    comm.Bcast(weights.numpy())
    pushes = comm.bcast(pushes)
    right = comm.gather(protocol.are_right(weights, pushes))
    if comm.rank == 0:
        protocol.report(rates, pushes, all(right))


if __name__ == "__main__":
    main()
