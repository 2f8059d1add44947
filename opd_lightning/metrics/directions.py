"""Figures of which higher or lower values are better, by their names in docs/metrics.md.

Of other figures, such as lengths and rates of rules, neither is better.
"""

from __future__ import annotations

import re

HIGHER = (
    "reward",
    "reward/<part>",
    "tokens_per_second",
    "overlap/ratio",
    "overlap/student_mass",
    "overlap/teacher_mass",
    "overlap/advantage",
    "engine/importance_ess",
    "demonstration/reward",
    "<stage>/<suite>/score",
    "<stage>/<suite>/score/<domain>",
    "<stage>/<suite>/pass_at_<k>",
    "<stage>/<suite>/majority",
    "<stage>/<suite>/log_likelihood",
    "retention/gain",
    "retention/worst",
    "retention/delta/<suite>",
)
LOWER = (
    "loss",
    "optim/skipped_steps",
    "signal/log_ratio_abs_mean",
    "teacher/<domain>/log_ratio_abs_mean",
    "depth_log_ratio_abs/<tenth>",
    "entropy/gap",
    "engine/logprob_gap_mean",
    "engine/logprob_gap_max",
    "response/truncated",
    "response/repetitive",
    "response/unverified",
    "response/views_too_long",
    "response/degenerate_groups",
    "time/<stage>_seconds",
    "time/overhead",
    "cost/<stage>_us_per_token",
    "<stage>/<suite>/unverified",
    "<stage>/<suite>/truncated",
    "<stage>/<suite>/perplexity",
    "collapse/out_of_band",
    "collapse/step_backs",
)


def direction(tag: str) -> int:
    """Return 1 if higher values of a figure are better, -1 if lower ones are, else 0."""
    for names, sign in ((HIGHER, 1), (LOWER, -1)):
        if any(re.fullmatch(re.sub(r"<\w+>", "[^/]+", name), tag) for name in names):
            return sign
    return 0
