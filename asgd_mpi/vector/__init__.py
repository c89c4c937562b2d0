"""A network as one (P,) vector: its layout, how it is divided, and how it is written on the wire."""
