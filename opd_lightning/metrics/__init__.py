"""torchmetrics logged every step, exact over micro-batches and ranks."""
