"""What every process of ours does: start and end without delay, end by one way, and note the signals that ask it to."""
