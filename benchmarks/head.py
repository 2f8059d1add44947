"""Time and memory of the chunked head, against plain autograd and against TRL's chunked losses.

Each measurement is a fresh process: one small warm-up, then one forward and backward pass. Time is
the CPU time of the process on a CPU (other load barely moves it), wall time on CUDA. Memory is the
peak above what was held before, less the gradients of hidden states and weight, which every
implementation has to return.

Run: python benchmarks/head.py [--tokens 2048 8192] [--threads 2] [--out head.json]
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import Tensor, nn

CASES = dict.fromkeys(("logprob", "reverse_kl", "reverse_kl_sum"), ("ours", "plain", "trl"))
TEMPERATURE = 0.7
MIB = 2**20
RESULT = "RESULT "


def reverse_kl(student: Tensor, teacher: Tensor | None) -> Tensor:
    assert teacher is not None
    return (student.exp() * (student - teacher)).sum(dim=-1)


class Problem:
    """Random weights and states; computes an `[n]` output with each implementation."""

    def __init__(self, options: argparse.Namespace) -> None:
        torch.manual_seed(0)
        self.dtype = getattr(torch, options.dtype)
        self.options = options
        tokens = max(options.tokens)
        self.student, self.teacher = self._weight(True), None
        self.hidden, self.theirs = self._states(tokens).requires_grad_(), None
        if options.case != "logprob":
            self.teacher, self.theirs = self._weight(False), self._states(tokens)
        self.targets = torch.randint(options.vocab, (tokens,), device=options.device)
        self.upstream = torch.rand(tokens, device=options.device)
        if options.case == "reverse_kl_sum":
            self.upstream.fill_(1 / tokens)

    def _weight(self, trained: bool) -> nn.Linear:
        o = self.options
        linear = nn.Linear(o.hidden, o.vocab, bias=False, device=o.device, dtype=self.dtype)
        nn.init.normal_(linear.weight, std=0.02)
        return linear.requires_grad_(trained)

    def _states(self, tokens: int) -> Tensor:
        o = self.options
        return torch.randn(tokens, o.hidden, device=o.device, dtype=self.dtype)

    def ours(self, n: int) -> Tensor:
        from opd_lightning.models.head import Comparison, Head, TokenStates, score

        def states(hidden: Tensor, linear: nn.Linear) -> TokenStates:
            vocab = self.options.vocab
            return TokenStates(
                hidden[:n], Head(project=linear, vocab_size=vocab, temperature=TEMPERATURE)
            )

        comparisons = {}
        if self.teacher is not None and self.theirs is not None:
            is_summed = self.options.case == "reverse_kl_sum"
            theirs = states(self.theirs, self.teacher)
            comparisons["kl"] = Comparison(theirs, reverse_kl, is_summed=is_summed)
        found = score(states(self.hidden, self.student), self.targets[:n], comparisons=comparisons)
        return found.values["kl"] if comparisons else found.student.logprobs

    def plain(self, n: int) -> Tensor:
        """Compute log-probs or divergence; no entropy, unlike `ours`."""
        mine = (self.student(self.hidden[:n]).float() / TEMPERATURE).log_softmax(dim=-1)
        if self.teacher is None or self.theirs is None:
            return mine.gather(1, self.targets[:n, None]).squeeze(1)
        with torch.no_grad():
            theirs = (self.teacher(self.theirs[:n]).float() / TEMPERATURE).log_softmax(dim=-1)
        return reverse_kl(mine, theirs)

    def trl(self, n: int) -> Tensor:
        from trl.kernels.chunked_divergence import ChunkedDivergenceFunction
        from trl.kernels.chunked_logprob import ChunkedLogProbFunction
        from trl.trainer.utils import _CHUNKED_LOGPROB_CHUNK_SIZE

        hidden, weight = self.hidden[:n], self.student.weight
        if self.teacher is None or self.theirs is None:
            width = _CHUNKED_LOGPROB_CHUNK_SIZE  # as in TRL's trainers
            outputs = ("entropy",)  # computed by `ours` too
            return ChunkedLogProbFunction.apply(
                hidden, weight, None, self.targets[:n], TEMPERATURE, width, None, 1.0, outputs
            )[0]
        return ChunkedDivergenceFunction.apply(
            hidden, weight, None, self.theirs[:n], self.teacher.weight, None, 1.0, TEMPERATURE
        )[0]

    def run(self, implementation: str, n: int) -> None:
        output: Tensor = getattr(self, implementation)(n)
        (output * self.upstream[:n]).sum().backward()

    def clear(self) -> None:
        self.student.weight.grad = self.hidden.grad = None


def measure(options: argparse.Namespace) -> dict[str, float]:
    """Return the measurement of this process: seconds and MiB."""
    if options.device == "cpu":
        torch.set_num_threads(options.threads)
    problem = Problem(options)
    problem.run(options.implementation, 8)
    return one_pass(problem, options.implementation, max(options.tokens))


def one_pass(problem: Problem, implementation: str, tokens: int) -> dict[str, float]:
    """Measure seconds and MiB of a forward and backward pass, after freeing gradients."""
    problem.clear()
    clock, held, peak = meters(problem.options.device)
    before, start, wall = held(), clock(), time.perf_counter()
    problem.run(implementation, tokens)
    seconds, walls, extra = clock() - start, time.perf_counter() - wall, peak() - before
    found = [problem.student.weight.grad, problem.hidden.grad]
    gradients = sum(x.numel() * x.element_size() for x in found if x is not None)
    return {
        "seconds": seconds,
        "wall_seconds": walls,
        "extra_mib": (extra - gradients) / MIB,
        "gradient_mib": gradients / MIB,
    }


def meters(device: str) -> tuple[Callable[[], float], Callable[[], int], Callable[[], int]]:
    """Return functions for the clock (seconds), allocated memory and peak memory (bytes).

    On a CPU: CPU time, resident size, and peak resident size since the start of the process. On
    CUDA: synchronised wall time, and the peak since this call.
    """
    if device == "cpu":
        pages = Path("/proc/self/statm")
        return (
            time.process_time,
            lambda: int(pages.read_text().split()[1]) * resource.getpagesize(),
            lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
        )

    def clock() -> float:
        torch.cuda.synchronize()
        return time.perf_counter()

    torch.cuda.reset_peak_memory_stats()
    return clock, torch.cuda.memory_allocated, torch.cuda.max_memory_allocated


def in_fresh_process(python: Path, options: argparse.Namespace, **chosen: Any) -> dict[str, float]:
    flags = {"hidden": options.hidden, "vocab": options.vocab, "dtype": options.dtype}
    flags |= {"device": options.device, "threads": options.threads, **chosen}
    arguments = [f"--{k}={v}" for k, v in flags.items()]
    done = subprocess.run(
        [str(python), __file__, *arguments], stdout=subprocess.PIPE, text=True, check=True
    )
    line = next(x for x in done.stdout.splitlines() if x.startswith(RESULT))
    result: dict[str, float] = json.loads(line.removeprefix(RESULT))
    return result


def environment_with_trl(folder: Path) -> Path:
    """Make an environment with TRL and this environment's torch; return its Python."""
    subprocess.run([sys.executable, "-m", "venv", folder], check=True)
    ours = [path for path in sys.path if path.endswith("site-packages")]
    site = next(folder.glob("lib/python3*/site-packages"))
    root = str(Path(__file__).resolve().parents[1])
    (site / "parent.pth").write_text("\n".join([*ours, root]))
    python = folder / "bin" / "python"
    # Captured: pip warns of requirements of this environment, which it does not see.
    install = [str(python), "-m", "pip", "install", "-q", "trl"]
    subprocess.run(install, check=True, capture_output=True)
    return python


def table(options: argparse.Namespace, python: Path, others: bool) -> list[dict[str, Any]]:
    rows = []
    for tokens in options.tokens:
        for case, implementations in CASES.items():
            for name in implementations:
                # Implementations that grow with the tokens run up to a limit only.
                too_many = name != "ours" and tokens > options.plain_up_to
                if too_many or (name == "trl" and not others):
                    continue
                runs = [
                    in_fresh_process(python, options, tokens=tokens, case=case, implementation=name)
                    for _ in range(options.repeats)
                ]
                middle = {k: median(run[k] for run in runs) for k in runs[0]}
                spread = [min(r["seconds"] for r in runs), max(r["seconds"] for r in runs)]
                rows.append(
                    {"tokens": tokens, "case": case, "implementation": name, **middle}
                    | {"seconds_range": spread}
                )
                print(
                    f"{tokens:6} {case:11} {name:6} {middle['seconds']:8.2f} s "
                    f"({spread[0]:.2f} to {spread[1]:.2f}) {middle['extra_mib']:8.0f} MiB",
                    flush=True,
                )
    return rows


def ratios(rows: list[dict[str, Any]]) -> list[str]:
    lines = []
    for mine in (row for row in rows if row["implementation"] == "ours"):
        for other in rows:
            same = all(other[k] == mine[k] for k in ("tokens", "case"))
            if same and other is not mine:
                lines.append(
                    f"{mine['tokens']} tokens, {mine['case']}, ours / {other['implementation']}: "
                    f"time {mine['seconds'] / other['seconds']:.2f}, "
                    f"memory 1/{other['extra_mib'] / mine['extra_mib']:.1f}"
                )
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tokens", type=int, nargs="+", default=[2048])
    parser.add_argument("--hidden", type=int, default=1024)
    parser.add_argument("--vocab", type=int, default=151_936)
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--repeats", type=int, default=1, help="processes per measurement")
    parser.add_argument("--plain-up-to", type=int, default=4096, help="tokens; above: ours only")
    parser.add_argument("--without-trl", action="store_true")
    parser.add_argument("--out", type=Path, help="JSON file")
    parser.add_argument("--case", choices=list(CASES), help=argparse.SUPPRESS)
    parser.add_argument("--implementation", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.case:
        print(RESULT + json.dumps(measure(options)))
        return
    with tempfile.TemporaryDirectory() as folder:
        python = Path(sys.executable)
        if not options.without_trl:
            python = environment_with_trl(Path(folder))
        rows = table(options, python, others=not options.without_trl)
    lines = ratios(rows)
    print("\n".join(lines))
    if options.out:
        conditions = {k: v for k, v in vars(options).items() if isinstance(v, (int, str, list))}
        report = {"conditions": conditions, "torch": torch.__version__, "rows": rows}
        options.out.write_text(json.dumps(report | {"ratios": lines}, indent=2) + "\n")


if __name__ == "__main__":
    main()
