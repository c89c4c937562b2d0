"""Asynchronous SGD over MPI: rank 0 serves the weights through one RMA window, every other rank trains.

Import nothing heavy here: the report reads run directories without torch or MPI.
"""

__version__ = "0.4.2"
