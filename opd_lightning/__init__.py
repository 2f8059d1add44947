"""On-policy distillation of language models as a PyTorch Lightning application."""

__version__ = "0.1.0"
