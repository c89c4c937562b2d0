"""What travels between ranks and what is decided about it, on both sides. Pure: no torch, no clock, no MPI."""
