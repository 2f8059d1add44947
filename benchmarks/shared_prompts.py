"""Seconds of a teacher's pass where samples share a prompt, read once and in every row.

CPU time of `response_states` on a model with random weights, by turns; and the largest difference
of the states, over the largest value.

Run: python -m benchmarks.shared_prompts [--prompts 512 2048] [--samples 8] [--response 128]
"""

from __future__ import annotations

import argparse
import time
from statistics import median
from unittest.mock import patch

import torch

from benchmarks.peers.sizes import SIZES, make_model
from benchmarks.training_phase import random_rollout
from opd_lightning.data.collate import collate
from opd_lightning.models import causal_lm
from opd_lightning.models import shared_prompts as sharing
from opd_lightning.models.readout import measure
from opd_lightning.models.shared_prompts import check_sharing, shared_prompts
from opd_lightning.types import Rollout, StepTotals, Totals


def rollouts_of(prompt: int, samples: int, response: int, vocabulary: int) -> list[Rollout]:
    """Return samples of one prompt, with random tokens."""
    tokens = torch.randint(3, vocabulary, (prompt + samples * response,)).tolist()
    ends = (prompt + (i + 1) * response for i in range(samples))
    return [
        random_rollout(tokens[:prompt], tokens[end - response : end], [0.0] * response)
        for end in ends
    ]


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--prompts", type=int, nargs="+", default=[512, 2048])
    parser.add_argument("--samples", type=int, default=8)
    parser.add_argument("--response", type=int, default=128)
    parser.add_argument("--size", choices=list(SIZES), default="middle", help="its teacher")
    parser.add_argument("--repeats", type=int, default=2)
    options = parser.parse_args()
    size = SIZES[options.size]
    lm = make_model(size.teacher, size, seed=1)
    lm.opd_readout = measure(lm)
    check_sharing(lm, attention=None)
    for prompt in options.prompts:
        rows = rollouts_of(prompt, options.samples, options.response, size.vocabulary)
        totals = Totals(options.samples * options.response, options.samples)
        step = StepTotals(step=0, written=totals, demonstrated=Totals(0, 0))
        batch = collate(rows, totals=step, temperature=1.0, pad_id=0)
        seconds: dict[str, list[float]] = {"once": [], "in every row": []}
        states = {}
        for _ in range(options.repeats):
            for way, found in seconds.items():
                choose = shared_prompts if way == "once" else lambda *_: None
                with patch.object(sharing, "shared_prompts", choose):
                    began = time.process_time()
                    states[way] = causal_lm.response_states(lm, batch, "student").hidden
                    found.append(time.process_time() - began)
        once, every = (median(found) for found in seconds.values())
        gap = (states["once"] - states["in every row"]).abs().max() / states["once"].abs().max()
        print(
            f"prompt of {prompt} tokens: once {once:.2f} s, in every row {every:.2f} s, "
            f"{every / once:.1f} times; states differ by {gap:.1e}",
            flush=True,
        )


if __name__ == "__main__":
    main()
