"""Check that the engine samples from the weights that are pushed to it.

At the start of a run engine and trainer hold the same weights, so a push that does nothing is
invisible. The check adds noise to the student, pushes it, samples from the engine, and compares
the log-probs of the samples with those of both students.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Literal, NamedTuple

import torch
from torch import Tensor, nn

from opd_lightning.data.engines import push
from opd_lightning.preflight.finding import Finding, Level
from opd_lightning.preflight.probe import Probe
from opd_lightning.types import Rollout

# The noise has to move the log-probs by so many times the rounding between engine and trainer, and
# by at least so many nats. More noise would raise the rounding itself: weights far from trained
# ones make large logits.
MOVE = 20
LEAST_MOVE = 0.05
EXACT = 1e-4  # nats; float32 on both sides differs by less
SHOWS = 10  # a smaller multiple of the rounding cannot distinguish old weights from new ones
ROUNDING = 4  # gaps up to so many times the rounding before the push are rounding, too
# Gap to the pushed weights as a share of that to the old ones: 1 / MOVE if all weights arrive,
# 0.3 to 1.6 if half of the layers do, above 1 if none does.
NEAR, FAR = 0.25, 0.5

# The noise is a share of each tensor's standard deviation.
FIRST_NOISE, TRIES = 0.01, 10
LARGEST_STEP = 30.0  # from one try to the next
TOO_FAR = 3
MAX_TOKENS = 64  # per response; a model with noisy weights never ends it


Verdict = Literal["arrives", "not proved", "hidden", "in part", "old", "not renewed"]

CHECK_ENGINE = "check that the engine is this run's alone, and that its server reads what is pushed"
COMPARE = "compare engine and trainer in float32 on both sides"
# Level, meaning and what to change.
EXPLAINED: dict[Verdict, tuple[Level, str, str]] = {
    "arrives": ("ok", "", ""),
    "not proved": (
        "info",
        "the engine keeps its weights in parts, or in another precision than its dtype says: one "
        "push that misses it would show in the gap alone",
        "give a server's own precision in engine.dtype",
    ),
    "hidden": (
        "warning",
        "rounding hides whether weights arrive: the log-probs of old ones would look the same",
        COMPARE,
    ),
    "in part": (
        "warning",
        "more than the usual gap: perhaps some of the weights do not arrive",
        CHECK_ENGINE,
    ),
    "old": (
        "error",
        "the engine samples from old weights, or from others: training would not be on-policy",
        CHECK_ENGINE,
    ),
    "not renewed": (
        "error",
        "all weights arrive, but the engine computes with others: with a copy or a buffer that a "
        "push does not renew, or without a part of the student that is not pushed",
        COMPARE + "; with LoRA, try plain LoRA",
    ),
}


class PushGaps(NamedTuple):
    """Mean absolute differences of log-probs, in nats, and the proof by sums."""

    usual: float  # engine and trainer at the same weights, before the push
    move: float  # trainer with and without noise, on responses from before the push
    to_pushed: float  # engine after the push and trainer with noise
    to_old: float  # engine after the push and trainer without noise
    proved: float  # share of the weights whose arrival the sums prove

    def judge(self) -> Verdict:
        """Decide what the push did.

        Where sums prove all weights, the gaps only have to be nearer to the pushed weights than
        to the old ones. Otherwise the gap to the pushed weights has to be rounding.
        """
        rounding = max(self.usual, EXACT)
        small = self.to_pushed <= ROUNDING * rounding  # false for NaN
        all_proved = self.proved == 1
        if small and not self.move >= SHOWS * rounding:
            return "arrives" if all_proved else "hidden"
        if self.to_pushed <= NEAR * self.to_old and (small or all_proved):
            return "arrives" if self.proved else "not proved"
        if all_proved:
            return "not renewed"
        return "in part" if self.to_pushed <= FAR * self.to_old else "old"


def check_push(probe: Probe) -> Iterator[Finding]:
    """Push a student with noise, sample from the engine, and judge; then push the student again.

    Raises:
        EngineMismatchError: Sums show other weights in the engine than were pushed.
    """
    engine, student = probe.engine, probe.module.student
    assert engine is not None
    usual, before = float(probe.gaps(probe.own).mean()), engine.version
    short = [_cut(rollout) for rollout in probe.own]
    old = _logprobs(probe, short)
    with noise_on(student) as set_noise:

        def move_by(noise: float) -> float:
            set_noise(noise)
            return float((_logprobs(probe, short) - old).abs().mean())

        noise, move = least_noise(move_by, max(MOVE * max(usual, EXACT), LEAST_MOVE))
        proved = push(student, engine, version=before + 1)
        completions = probe.generate(probe.requests, at_most=MAX_TOKENS)
        rollouts = [
            replace(rollout, response_ids=completion[0], behaviour_logprobs=completion[1])
            for rollout, completion in zip(probe.own, completions, strict=True)
        ]
        to_pushed = float(probe.gaps(rollouts).mean())
    to_old = float(probe.gaps(rollouts).mean())
    with probe.clock("push"):
        push(student, engine, version=before)
    yield report(PushGaps(usual, move, to_pushed, to_old, proved), noise)


def report(gaps: PushGaps, noise: float) -> Finding:
    """Return the finding of a push of weights with `noise`."""
    level, meaning, change = EXPLAINED[gaps.judge()]
    found = (
        f"gap {gaps.to_pushed:.2g} nats to weights just pushed, {gaps.to_old:.2g} to the old, "
        f"{gaps.usual:.2g} before (noise {noise:.2g}); sums prove {gaps.proved:.0%} of them"
    )
    values = {
        "gap_to_pushed": gaps.to_pushed,
        "gap_to_old": gaps.to_old,
        "gap_before": gaps.usual,
        "move": gaps.move,
        "noise": noise,
        "proved": gaps.proved,
    }
    return Finding(level, "weight push", found, meaning, change, values)


def least_noise(move_by: Callable[[float], float], target: float) -> tuple[float, float]:
    """Find about the least noise that moves log-probs by `target` nats.

    Each try extrapolates linearly from the last. The move may grow faster, as where both matrices
    of a LoRA get noise; a noise that moves too much is reduced.

    Args:
        move_by: Sets a noise and returns its move.
        target: Move to reach, exceeded by at most a factor `TOO_FAR` if few tries suffice.

    Returns:
        The noise that was set last, and its move; less than `target` if no noise is enough.
    """
    noise, below, above = FIRST_NOISE, 0.0, 0.0
    for _ in range(TRIES):
        move = move_by(noise)
        if move < target:
            below = noise
            step = min(max(1.1 * target / max(move, 1e-12), 1.5), LARGEST_STEP)
            noise = math.sqrt(below * above) if above else below * step
        elif move <= TOO_FAR * target or not below:
            return noise, move
        else:  # also NaN
            above = noise
            noise = math.sqrt(below * above)
    last = above or below
    return last, move_by(last)


def _cut(rollout: Rollout) -> Rollout:
    return replace(
        rollout,
        response_ids=rollout.response_ids[:MAX_TOKENS],
        behaviour_logprobs=rollout.behaviour_logprobs[:MAX_TOKENS],
    )


@torch.no_grad()
def _logprobs(probe: Probe, rollouts: list[Rollout]) -> Tensor:
    """Return the trainer's log-prob of every response token, `[N]`."""
    parts = [probe.logprobs(batch)[batch.response_mask] for batch in probe.batches(rollouts)]
    return torch.cat(parts)


@contextmanager
def noise_on(student: nn.Module) -> Iterator[Callable[[float], None]]:
    """Yield a function that sets the noise of the trainable weights; restore them on exit.

    Noise is normal, the same at every call, with a standard deviation of the given share of each
    tensor's own.
    """
    trained = [p for p in student.parameters() if p.requires_grad]
    kept = [p.detach().to("cpu", copy=True) for p in trained]
    spreads = [float(p.detach().float().std()) if p.numel() > 1 else 0.0 for p in trained]

    @torch.no_grad()
    def set_noise(share: float) -> None:
        generators: dict[torch.device, torch.Generator] = {}
        for parameter, before, spread in zip(trained, kept, spreads, strict=True):
            where = parameter.device
            if where not in generators:
                generators[where] = torch.Generator(where).manual_seed(0)
            noise = torch.randn(before.shape, generator=generators[where], device=where)
            # LoRA's B and constant norms have no spread.
            noise *= share * (spread or 0.1)
            parameter.copy_(before.to(where) + noise.to(before.dtype))

    try:
        yield set_noise
    finally:
        with torch.no_grad():
            for parameter, before in zip(trained, kept, strict=True):
                parameter.copy_(before)
