"""What every process of ours does: end by one way, and note the signals that ask it to."""
