"""What a run costs until it reaches a score: responses, tokens and floating-point operations."""

from __future__ import annotations

from itertools import accumulate
from pathlib import Path

from safetensors.torch import load_file

from experiments.figures import events_of

FLOPS = 2  # of a weight, in a forward pass over a token


def reached(
    *, run: str, figure: str, level: float, window: int, samples: int, passes: int, seed: int
) -> dict[str, float]:
    """Return the cost up to the first weights for which the mean of a figure reaches a level.

    Where it is never reached, the cost is the whole run's: a lower bound.

    Args:
        run: Name of the run, which is done.
        figure: Name in the log of a score.
        level: Score to reach.
        window: Number of logged values that are averaged, up to each step.
        samples: Responses in a step.
        passes: Forward passes over a token's weights: 1 each for sampling, teacher and reference,
            3 for training. Prompts and attention are left out.
        seed: Not used: the log is in the folder of the seed, which is the current one.

    Returns:
        `samples`, `tokens` of responses, `flops`, and `reached`, 1 or 0.
    """
    events = events_of(run)
    scores = events.Scalars(figure)
    means = (
        (scores[end - 1].step, sum(e.value for e in scores[end - window : end]) / window)
        for end in range(window, len(scores) + 1)
    )
    lengths = [event.value for event in events.Scalars("response/tokens_per_step")]
    # The figures of step N are of weights that have taken N steps.
    steps = next((max(step, 1) for step, score in means if score >= level), None)
    count = steps or len(lengths)
    tokens = [*accumulate(lengths)][count - 1]
    weights = load_file(Path("runs", run, "student", "model.safetensors")).values()
    return {
        "samples": samples * count,
        "tokens": tokens,
        "flops": FLOPS * passes * tokens * sum(tensor.numel() for tensor in weights),
        "reached": float(steps is not None),
    }
