"""What the ranks of a run do: servers, workers, stages, and what is checked before they start."""
