"""CPU time of GOLD's loss per response token, beside the JSD of models with the same tokens.

Heads with random weights, forward and backward pass, both models' heads included. The teacher's
head also computes the log-probs of its own tokens, as in a step of GOLD. A seventh of the student's
tokens do not end their group. The reference is the JSD between two heads of the student's
vocabulary. Times are CPU seconds of the process, which other load barely changes.

Run: python benchmarks/groups.py [--tokens 256] [--student 50000] [--teacher 32000] [--hidden 512]
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from functools import partial
from statistics import median

import torch
from torch import Tensor, nn

from opd_lightning.losses.alignment import HybridULD, Pairs
from opd_lightning.losses.divergence import JSD
from opd_lightning.models.groups import GroupComparison
from opd_lightning.models.head import Comparison, Head, MixedStates, TokenStates, score

EVERY = 7  # of so many tokens one does not end its group


def states(tokens: int, size: int, hidden: int, *, trained: bool) -> TokenStates:
    linear = nn.Linear(hidden, size, bias=False).requires_grad_(trained)
    nn.init.normal_(linear.weight, std=0.1)
    seen = torch.randn(tokens, hidden, requires_grad=trained)
    return TokenStates(seen, Head(project=linear, vocab_size=size, temperature=1.0))


def plain(student: TokenStates, teacher: TokenStates, targets: Tensor) -> Tensor:
    pair = Comparison(teacher, JSD())
    return score(student, targets, comparisons={"loss": pair}).values["loss"].square().sum()


def grouped(
    student: TokenStates, teacher: TokenStates, targets: Tensor, function: HybridULD, pairs: Pairs
) -> Tensor:
    number = torch.arange(len(targets))
    earlier = (number % EVERY == 0) & (number < len(number) - 1)
    ends = torch.where(earlier, number + 1, number)
    rows = (~earlier).nonzero()[:, 0]
    with torch.no_grad():
        own = score(teacher, targets % teacher.head.vocab_size).student.logprobs
    given = torch.zeros(len(targets)).index_add(0, ends[earlier], own[earlier])
    seen = MixedStates(((rows, TokenStates(teacher.hidden[rows], teacher.head)),))
    group = GroupComparison(seen, partial(function, pairs=pairs), ends, given)
    parts = group.comparisons("loss", student, targets)
    found = group.complete("loss", score(student, targets, comparisons=parts))
    return found.values["loss"].square().sum()


def milliseconds(run: Callable[[], Tensor], tokens: int, times: int) -> float:
    """Return the median CPU time per token of a forward and backward pass, after a first one."""
    run().backward()
    found = []
    for _ in range(times):
        start = time.process_time()
        run().backward()
        found.append(time.process_time() - start)
    return 1000 * median(found) / tokens


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--tokens", type=int, default=256)
    parser.add_argument("--student", type=int, default=50_000)
    parser.add_argument("--teacher", type=int, default=32_000)
    parser.add_argument("--hidden", type=int, default=512)
    parser.add_argument("--times", type=int, default=3)
    options = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    n, sizes = options.tokens, (options.student, options.teacher)
    student = states(n, sizes[0], options.hidden, trained=True)
    same = states(n, sizes[0], options.hidden, trained=False)
    other = states(n, sizes[1], options.hidden, trained=False)
    targets = torch.randint(min(sizes), (n,))
    reference = milliseconds(lambda: plain(student, same, targets), n, options.times)
    print(f"JSD, {sizes[0]:,} and {sizes[0]:,} tokens: {reference:.2f} ms a token")
    for share in (0.0, 0.3, 0.6, 0.9):
        ids = torch.arange(int(share * min(sizes)))
        pairs = Pairs.of(ids, ids, sizes)
        function = HybridULD(hybrid=share > 0)
        name = f"GOLD, {share:.0%} shared" if share else "ULD"
        run = partial(grouped, student, other, targets, function, pairs)
        found = milliseconds(run, n, options.times)
        print(
            f"{name}, {sizes[0]:,} and {sizes[1]:,} tokens: {found:.2f}, {found / reference:.2f}x"
        )


if __name__ == "__main__":
    main()
