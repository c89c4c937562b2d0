"""Start and end of every process of ours: without delay, by one way, and when a signal asks for it."""
