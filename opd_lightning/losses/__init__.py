"""Pure functions of tensors in response space `[B, R]`: no model, no trainer, no logging."""
