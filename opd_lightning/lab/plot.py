"""Plot of a run from its TensorBoard files."""

from __future__ import annotations

from pathlib import Path

import matplotlib

matplotlib.use("agg")
import matplotlib.pyplot as plt
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator


def plot_run(run: Path, before: dict[str, float], teacher: dict[str, float], picture: Path) -> None:
    """Plot held-out accuracy by domain and the loss over optimiser steps.

    Args:
        run: Folder with the run's TensorBoard event files.
        before: The student's accuracy at the start: "score" and "score/<domain>".
        teacher: The teacher's accuracy; its "score" is drawn as a line.
        picture: PNG to write.
    """
    events = EventAccumulator(str(run))
    events.Reload()
    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 4), layout="constrained")
    for key in ["score", *sorted(k for k in before if k.startswith("score/"))]:
        curve = events.Scalars(f"val/sums/{key}")
        steps = [0, *(point.step for point in curve)]
        values = [before[key], *(point.value for point in curve)]
        if key == "score":
            left.plot(steps, values, lw=3, color="black", label="all")
        else:
            left.plot(steps, values, lw=1, alpha=0.8, label=key.removeprefix("score/"))
    left.axhline(teacher["score"], ls="--", color="gray", label="teacher, all")
    left.set(xlabel="optimiser step", ylabel="accuracy on held-out sums", ylim=(0, 1.02))
    left.legend(fontsize=8)
    loss = events.Scalars("loss")
    right.plot([point.step for point in loss], [point.value for point in loss], lw=1)
    right.set(xlabel="optimiser step", ylabel="reverse KL on student samples, nats per token")
    figure.savefig(picture, dpi=120)
    plt.close(figure)
