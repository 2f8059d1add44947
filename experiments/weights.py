"""How far training moved the weights of a model."""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors.torch import load_file


def changed(*, student: str, start: str, threshold: float, seed: int) -> dict[str, float]:
    """Return the share of weights that changed by more than a threshold, and the distance.

    Args:
        student: Folder of the trained model.
        start: Folder of the model that it was trained from.
        threshold: Smallest change that counts, of a weight, excluded.
        seed: Not used: the folders are in that of the seed, which is the current one.

    Returns:
        `changed`, in [0, 1], and `distance`, the Euclidean norm of all changes.
    """
    after, before = (load_file(Path(path, "model.safetensors")) for path in (student, start))
    moved = [(after[name].double() - before[name].double()).flatten() for name in before]
    change = torch.cat(moved)
    return {
        "changed": (change.abs() > threshold).double().mean().item(),
        "distance": change.norm().item(),
    }
