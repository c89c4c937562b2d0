"""Everything that knows MPI: windows, packets, waits. No other room imports mpi4py."""
