"""Parameter servers and all-reduces as a competent user would write them, one file each, and ours.

Each is a program: `python -m benchmarks.peers.NAME --parameters P --workers N --seconds S`, under mpirun where it says so.
It prints one line of JSON: exchanges per second of all workers together, and whether the weights are right.
"""
