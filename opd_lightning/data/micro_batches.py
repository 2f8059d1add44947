"""Splitting one optimiser step's rollouts into micro-batches of equal work."""

from collections.abc import Sequence

from opd_lightning.types import Rollout


def split_balanced(rollouts: Sequence[Rollout], parts: int) -> list[list[Rollout]]:
    """Exactly `parts` non-empty micro-batches with nearly equal token counts.

    In rounds: the longest rollouts left go to the parts that carry least so far, one each. Sizes
    differ by at most one rollout, so padding and activation memory stay even too.
    """
    if len(rollouts) < parts:
        raise ValueError(f"{len(rollouts)} rollouts cannot fill {parts} micro-batches")
    result: list[list[Rollout]] = [[] for _ in range(parts)]
    loads = [0] * parts
    longest_first = sorted(rollouts, key=_tokens, reverse=True)
    for start in range(0, len(rollouts), parts):
        lightest_first = sorted(range(parts), key=loads.__getitem__)
        for part, rollout in zip(
            lightest_first, longest_first[start : start + parts], strict=False
        ):
            result[part].append(rollout)
            loads[part] += _tokens(rollout)
    return result


def _tokens(rollout: Rollout) -> int:
    return len(rollout.prompt_ids) + len(rollout.response_ids)
