"""The training phase, the head and the engine's log-probs on one GPU, within minutes.

Models are built from configs (Qwen3 of 0.6B and 1.7B, 151,936 tokens) with random weights; nothing
is downloaded, and neither vLLM nor an installed project is needed. Three kinds of measurement:

- training: `benchmarks/training_phase.py`, bf16-mixed, sequences of 2k and 4k tokens, with and
  without activation checkpointing and torch.compile;
- head: the forward and backward pass of `benchmarks/head.py` in bfloat16: ours, plain logits with
  log_softmax, and TRL's kernels if TRL can be imported;
- engine: `benchmarks/engine_gap.py`, Hugging Face generate in bfloat16 and in float32.

An error in a measurement, out of memory included, is a row of the tables and of the JSON file,
which is rewritten after each measurement. Measurements beyond the time budget are left out, with a
row.

Run: python -m benchmarks.gpu --out gpu.json [--budget 460] [--only TEXT] [--dry_run]
"""

from __future__ import annotations

import argparse
import gc
import importlib.util
import json
import logging
import os
import platform
import time
import warnings
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TQDM_DISABLE", "1")

import torch
from safetensors.torch import save_file
from transformers import Qwen3Config

from benchmarks import engine_gap, training_phase
from benchmarks.guarded import Figures, Measurement, MissingError, attempt
from benchmarks.head import CASES, Problem, one_pass
from benchmarks.scaling.models import config as published
from benchmarks.scaling.tables import table
from benchmarks.training_phase import Case, Repeats
from opd_lightning.lab.tokenizer import build_tokenizer
from opd_lightning.preflight.operations import H100_PEAK
from opd_lightning.terminal.quiet import quiet_libraries

PACKAGES = ("torch", "triton", "transformers", "lightning", "peft", "trl")
RESERVE = 10.0  # seconds at the end of the budget in which no measurement begins


@dataclass(frozen=True, kw_only=True)
class Sizes:
    """Sizes of all measurements; `TINY` is for the dry run."""

    device: str = "cuda"
    models: tuple[str, str] = ("0.6B", "1.7B")  # small, large
    lengths: tuple[int, int] = (2048, 4096)
    prompt: int = 512
    tokens: int = 16_384  # positions of a micro-batch, padding included; approximate if padded
    repeats: Repeats = Repeats()  # noqa: RUF009 - frozen
    passes: int = 5  # of the head
    head: tuple[tuple[int, int], ...] = ((8192, 1024), (16_384, 2048))  # tokens, hidden size
    vocabulary: int = 151_936
    responses: tuple[int, int, int] = (64, 128, 128)  # rows, tokens of prompt and response
    backend: str = "inductor"
    flash: str = "flash_attention_2"  # kernel that packed rows are measured with
    expected: float = 1.0  # factor on the expected seconds


TINY = Sizes(
    device="cpu",
    lengths=(16, 32),
    prompt=4,
    tokens=32,
    repeats=Repeats(warm_up=1, whole=1, stages=1),
    passes=1,
    head=((8, 64),),
    vocabulary=512,
    responses=(2, 4, 4),
    backend="eager",  # inductor would call a C++ compiler
    flash="sdpa",
    expected=0.0,
)


def write_models(folder: Path, sizes: Sizes, dry_run: bool) -> dict[str, Path]:
    """Write config.json and a tokenizer of every model, and no weights; folders by name."""
    tiny = Qwen3Config(
        vocab_size=sizes.vocabulary,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=3,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=32,
    )
    folders = {name: folder / name for name in sizes.models}
    for name, place in folders.items():
        (tiny if dry_run else published(name)).save_pretrained(place)
        build_tokenizer(max(sizes.lengths)).save_pretrained(place)
        save_file({}, place / "model.safetensors")  # a folder without weights is refused
    return folders


def training(folders: Mapping[str, Path], sizes: Sizes, peak: float) -> Iterator[Measurement]:
    small, large = sizes.models
    short, long = sizes.lengths
    plain = [(name, length, "padded") for name in sizes.models for length in sizes.lengths]
    full = [(small, short, "full"), (large, long, "full")]
    flash = {"attention": sizes.flash}
    chosen: list[tuple[tuple[str, int, str], float, dict[str, Any]]] = [
        *((one, 25, {}) for one in (*plain, *full)),
        # Packing on and off, with one kernel.
        *(((large, long, layout), 25, flash) for layout in ("padded", "packed")),
        *(((name, long, "padded"), 25, {"checkpointing": True}) for name in sizes.models),
        # Last, because compilation takes longest; fixed shapes before varying ones.
        ((small, short, "full"), 70, {"compiled": sizes.backend}),
        ((small, long, "padded"), 70, {"compiled": sizes.backend}),
        ((large, long, "padded"), 70, {"compiled": sizes.backend, "checkpointing": True}),
    ]
    for (name, length, layout), seconds, options in chosen:
        case = Case(
            student=folders[name],
            teacher=folders[large],
            length=length,
            prompt=sizes.prompt,
            # About as many positions, full or padded.
            rows=sizes.tokens * (2 if layout == "full" else 3) // (2 * length),
            layout=layout,
            device=sizes.device,
            **options,
        )
        words = [f"{name} of {large}", f"{case.rows} x {length} tokens, {layout}", *options]
        run = partial(training_phase.measure, case, sizes.repeats, peak)
        yield Measurement("training", ", ".join(words), seconds * sizes.expected, run)


def head(sizes: Sizes, case: str, implementation: str, tokens: int, hidden: int) -> Figures:
    if implementation == "trl" and importlib.util.find_spec("trl") is None:
        raise MissingError("TRL is not installed")
    problem = Problem(
        argparse.Namespace(
            tokens=[tokens],
            hidden=hidden,
            vocab=sizes.vocabulary,
            dtype="bfloat16",
            device=sizes.device,
            case=case,
        )
    )
    one_pass(problem, implementation, tokens)  # kernels are chosen, or compiled
    passes = [one_pass(problem, implementation, tokens) for _ in range(sizes.passes)]
    walls = [one["wall_seconds"] for one in passes]
    return {
        "seconds": median(walls),
        "seconds_range": [min(walls), max(walls)],
        "extra_mib": median(one["extra_mib"] for one in passes),
        "gradient_mib": passes[0]["gradient_mib"],
    }


def plan(folders: Mapping[str, Path], sizes: Sizes, peak: float) -> list[Measurement]:
    """Return all measurements, the most important first."""
    phases = list(training(folders, sizes, peak))
    heads = [
        Measurement(
            "head",
            f"{case}, {tokens} tokens, hidden {hidden}, {way}",
            (20 if way == "trl" else 6) * sizes.expected,
            partial(head, sizes, case, way, tokens, hidden),
        )
        for tokens, hidden in sizes.head
        for case, ways in CASES.items()
        for way in ways
    ]
    rows, prompt, tokens = sizes.responses
    engines = [
        Measurement(
            "engine",
            f"{sizes.models[0]}, {dtype}, {rows} responses of {tokens} tokens",
            20 * sizes.expected,
            partial(
                engine_gap.measure,
                folders[sizes.models[0]],
                dtype=dtype,
                rows=rows,
                prompt=prompt,
                tokens=tokens,
                device=sizes.device,
            ),
        )
        for dtype in ("bfloat16", "float32")
    ]
    compiled = [phase for phase in phases if "compiled" in phase.name]
    return [*(p for p in phases if p not in compiled), *heads, *engines, *compiled]


def conditions(sizes: Sizes, budget: float, peak: float) -> Figures:
    def installed(name: str) -> str | None:
        try:
            return version(name)
        except PackageNotFoundError:
            return None

    on_gpu = sizes.device == "cuda"
    return {
        "device": torch.cuda.get_device_name() if on_gpu else platform.machine(),
        "device_gib": torch.cuda.mem_get_info()[1] / training_phase.GIB if on_gpu else None,
        "cuda": torch.version.cuda,
        "python": platform.python_version(),
        "versions": {name: installed(name) for name in PACKAGES},
        "budget_seconds": budget,
        "peak_operations": peak,
        "formula": "(3 x student forward + teacher forward) / seconds of the step / peak; forward: "
        "opd_lightning/preflight/operations.py",
        "precision": "student bf16-mixed with float32 weights, teacher bfloat16",
        "optimizer": "AdamW as OPD's default",
        "vocabulary": sizes.vocabulary,
        "prompt_tokens": sizes.prompt,
        "repeats": vars(sizes.repeats) | {"head": sizes.passes},
    }


# Tables -----------------------------------------------------------------------------------


def _seconds(middle: float, ends: list[float]) -> str:
    return f"{middle:.4g} ({ends[0]:.4g} to {ends[1]:.4g})"


def _training_cells(row: Figures) -> list[str]:
    stages = [f"{row['stage_seconds'][name]:.3g}" for name in training_phase.STAGES]
    return [
        _seconds(row["step_seconds"], row["step_seconds_range"]),
        f"{row['mfu']:.1%}",
        f"{row['tokens_per_second']:,.0f}",
        f"{row['padding_share']:.0%}",
        f"{row['peak_gib']:.1f} ({row['predicted_gib']:.1f})",
        *stages,
    ]


def _head_cells(row: Figures) -> list[str]:
    return [_seconds(row["seconds"], row["seconds_range"]), f"{row['extra_mib']:,.0f}"]


def _engine_cells(row: Figures) -> list[str]:
    return [
        f"{row['gap_mean']:.2e}",
        f"{row['gap_max']:.2e}",
        f"{row['entropy']:.2f}",
        f"{row['tokens_per_second']:,.0f}",
        f"{row['push_seconds']:.3g}",
    ]


TABLES: dict[str, tuple[list[str], Callable[[Figures], list[str]]]] = {
    "training": (
        ["student of teacher, micro-batch", "s per step (range)", "MFU", "tokens/s", "padding",
         "peak GiB (predicted)", *(f"{name}, s" for name in training_phase.STAGES)],
        _training_cells,
    ),
    "head": (["forward and backward", "s (range)", "extra MiB"], _head_cells),
    "engine": (
        ["engine", "mean gap, nats", "largest", "entropy", "tokens/s", "push, s"],
        _engine_cells,
    ),
}  # fmt: skip


def markdown(report: Figures) -> str:
    about = report["conditions"]
    versions = ", ".join(f"{k} {v}" for k, v in about["versions"].items() if v)
    parts = [
        f"{about['device']}; {versions}. MFU: {about['formula']}; peak "
        f"{about['peak_operations'] / 1e12:.0f} TFLOP/s. {about['precision']}."
    ]
    for kind, (heads, cells) in TABLES.items():
        rows = []
        for row in report["rows"]:
            if row["kind"] == kind:
                done = row["status"] == "measured"
                rest = cells(row) if done else [f"{row['status']}: {row['reason']}"]
                rows.append([row["name"], *rest, *[""] * (len(heads) - 1 - len(rest))])
        if rows:
            parts.append(table(heads, rows))
    return "\n\n".join(parts)


def _write(report: Figures, path: Path | None) -> None:
    if path is not None:
        whole = path.with_name(path.name + ".part")
        whole.write_text(json.dumps(report, indent=1) + "\n")
        whole.replace(path)


def main() -> None:
    began = time.perf_counter()
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, help="JSON file, written after every measurement")
    parser.add_argument("--budget", type=float, default=460.0, help="seconds of the whole command")
    parser.add_argument(
        "--only", default="", help="measure only rows that contain this in kind or name"
    )
    parser.add_argument("--peak", type=float, default=H100_PEAK, help="operations per second")
    parser.add_argument("--dry_run", action="store_true", help="tiny models on the CPU, once")
    options = parser.parse_args()
    warnings.filterwarnings("ignore")
    quiet_libraries()
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    sizes = TINY if options.dry_run else Sizes()
    if sizes.device == "cuda" and not torch.cuda.is_available():
        parser.error("no CUDA device; --dry_run tries everything on the CPU with tiny models")
    gc.freeze()  # excludes objects of libraries from later collections
    report: Figures = {"conditions": conditions(sizes, options.budget, options.peak), "rows": []}
    with TemporaryDirectory() as place:
        folders = write_models(Path(place), sizes, options.dry_run)
        for measurement in plan(folders, sizes, options.peak):
            if options.only not in f"{measurement.kind}: {measurement.name}":
                continue
            left = options.budget - RESERVE - (time.perf_counter() - began)
            row = attempt(measurement, left)
            report["rows"].append(row)
            _write(report, options.out)
            detail = row.get("reason", f"{row.get('took_seconds', 0.0):.1f} s")
            print(f"{row['kind']}: {row['name']}: {row['status']}, {detail}", flush=True)
    report["finished_seconds"] = time.perf_counter() - began
    _write(report, options.out)
    print("\n" + markdown(report))


if __name__ == "__main__":
    main()
