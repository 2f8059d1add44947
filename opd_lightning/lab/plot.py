"""A picture of a run, from its TensorBoard files."""

from __future__ import annotations

from pathlib import Path

import matplotlib

matplotlib.use("agg")
import matplotlib.pyplot as plt
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator


def plot_run(run: Path, teacher_score: float, picture: Path) -> None:
    """Held-out accuracy by domain, and the loss, over optimiser steps.

    Args:
        run: Folder with the run's TensorBoard event files.
        teacher_score: The teacher's accuracy, drawn as a line.
        picture: PNG to write.
    """
    events = EventAccumulator(str(run))
    events.Reload()

    def curve(tag: str) -> tuple[list[int], list[float]]:
        points = events.Scalars(tag)
        return [p.step for p in points], [p.value for p in points]

    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 4), layout="constrained")
    for tag in sorted(t for t in events.Tags()["scalars"] if t.startswith("val/")):
        if "/score/" in tag:
            left.plot(*curve(tag), lw=1, alpha=0.7, label=tag.rsplit("/", 1)[1])
        elif tag.endswith("/score"):
            left.plot(*curve(tag), lw=3, color="black", label="all")
    left.axhline(teacher_score, ls="--", color="gray", label="teacher, all")
    left.set(xlabel="optimiser step", ylabel="accuracy on held-out sums", ylim=(0, 1.02))
    left.legend(fontsize=8)
    right.plot(*curve("loss"), lw=1)
    right.set(xlabel="optimiser step", ylabel="reverse KL on student samples, nats per token")
    figure.savefig(picture, dpi=120)
    plt.close(figure)
