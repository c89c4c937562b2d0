"""A run in one process: replay, simulation and forecast."""
