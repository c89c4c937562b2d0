"""All arithmetic of an update, the server's and the worker's. torch, no MPI."""
