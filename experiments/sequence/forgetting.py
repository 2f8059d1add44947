"""What a sequence of runs learnt, and what it forgot."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from statistics import mean


def over_the_sequence(
    *, chain: str, skills: Sequence[str], suite: str, seed: int
) -> dict[str, float]:
    """Return the scores of a chain of runs, each of which learnt one skill.

    They are `learnt`, the mean score of a skill after its own run; `forgotten`, the mean loss of
    all skills but the last from then to the end; and `kept`, the mean score of all at the end.

    Args:
        chain: Name of the chain, whose runs are done.
        skills: Domain that each run learnt, in order.
        suite: Name of the suite with these domains.
        seed: Not used: scores are read from the folder of the seed, which is the current one.
    """
    files = [Path("scores", f"{chain}-{number}.json") for number in range(1, len(skills) + 1)]
    scores = [json.loads(file.read_text(encoding="utf-8")) for file in files]
    names = [f"{suite}/{skill}" for skill in skills]
    learnt = [own[name] for own, name in zip(scores, names, strict=True)]
    last = [scores[-1][name] for name in names]
    lost = [then - now for then, now in zip(learnt[:-1], last[:-1], strict=True)]
    return {"learnt": mean(learnt), "forgotten": mean(lost), "kept": mean(last)}
