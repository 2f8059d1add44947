"""Checks that the verifier distinguishes responses, and accepts some demonstrations."""

from __future__ import annotations

from statistics import fmean

from opd_lightning.preflight.finding import Finding
from opd_lightning.preflight.probe import Probe
from opd_lightning.types import Author, Rollout


def check_rewards(probe: Probe) -> list[Finding]:
    """Return findings on the student's and the teacher's rewards; none without a verifier."""
    if probe.data.verifier is None:
        return []
    mix, findings = probe.data.mix, []
    if probe.engine is not None and mix.samples:
        findings.append(_own(probe))
    if mix.only_correct:
        findings.append(_kept([r for r in probe.given if r.author is Author.TEACHER]))
    return findings


def _own(probe: Probe) -> Finding:
    rewards = [rollout.reward for rollout in probe.own if not rollout.unverified]
    if not rewards:
        return Finding(
            "error",
            "rewards",
            f"none of {len(probe.own)} responses could be checked",
            "the verifier gives no scores",
            "its warnings above say why",
        )
    found = f"{fmean(rewards):.2f} on average, over {len(rewards)} of the student's responses"
    values = {"reward_mean": fmean(rewards)}
    if not probe.module.needs_rewards or len(set(rewards)) > 1:
        return Finding("ok", "rewards", found, values=values)
    return Finding(
        "info",
        "rewards",
        f"{rewards[0]:.2f} for all of {len(rewards)} responses",
        f"{type(probe.module).__name__} learns from differences; few responses may just not show "
        "any, or the verifier's pattern finds no answer",
        "look at more with --samples",
        values,
    )


def _kept(written: list[Rollout]) -> Finding:
    kept = sum(not rollout.dropped for rollout in written)
    found = f"{kept} of {len(written)} of the teacher's responses are right"
    values = {"kept": kept, "written": len(written)}
    if kept:
        return Finding("ok", "demonstrations", found, values=values)
    return Finding(
        "warning",
        "demonstrations",
        found,
        "data.mix.only_correct leaves nothing to imitate",
        "check the verifier's pattern and the teacher's budget",
        values,
    )
