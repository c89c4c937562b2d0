"""A network over several devices: how it is cut, and in which order its stages compute. No MPI."""
