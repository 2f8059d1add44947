"""From prompt files to micro-batches of rollouts."""
