"""Duration of a push of the student's weights to a vLLM server, by folder and over gloo.

Pushes the same weights repeatedly, by both transports in turn, to a server on this machine started
with `opd serve`. The time includes reading and summing the weights, the transfer, loading in the
server and resetting its prefix cache; the proof that the weights arrived is timed separately. The
first push is reported separately too, since over gloo it forms the group.

Run: python benchmarks/pushes.py [--repeats 5] [--dtype float32] [--folder DIR] [--out pushes.json]
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from typing import Any

from transformers import AutoModelForCausalLM

from opd_lightning.lab.models import new_model
from opd_lightning.models.source import ModelSource
from opd_lightning.models.weight_sums import PushedWeights
from opd_lightning.rollouts import Request, Sampling, VLLMServerEngine

MODELS = {"lab student": (2, 128), "105M": (10, 1024)}  # layers, hidden size
LENGTH = 64


@contextmanager
def server(model: Path, work: Path, dtype: str) -> Iterator[str]:
    """Run `opd serve` for a model and yield its address."""
    arguments = ["--model", model, "--key_file", work / "key", "--address_file", work / "address"]
    arguments += ["--weights", "pushed", "--dtype", dtype, "--max_length", LENGTH]
    command = [sys.executable, "-m", "opd_lightning", "serve", *map(str, arguments)]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    try:
        while not (work / "address").exists():
            if process.poll() is not None:
                raise SystemExit("the server did not start; run it by hand to see why")
            time.sleep(0.5)
        yield (work / "address").read_text().strip()
    finally:
        process.terminate()
        process.wait()


def measure(name: str, work: Path, dtype: str, repeats: int) -> list[dict[str, Any]]:
    """Return a row for each transport, with the seconds of every push."""
    layers, hidden_size = MODELS[name]
    new_model(work / "model", layers=layers, hidden_size=hidden_size, seed=0)
    model = AutoModelForCausalLM.from_pretrained(work / "model")
    size = sum(parameter.numel() for parameter in model.parameters())
    with server(work / "model", work, dtype) as address:
        common: dict[str, Any] = {"key_file": str(work / "key"), "dtype": dtype}
        engines = {
            "folder": VLLMServerEngine([address], push_folder=str(work / "push"), **common),
            "gloo": VLLMServerEngine([address], push="gloo", **common),
        }
        for engine in engines.values():
            engine.start(ModelSource(str(work / "model")), max_length=LENGTH)
        times: dict[str, list[tuple[float, float]]] = {way: [] for way in engines}
        for version in range(1 + repeats):
            for way, engine in engines.items():
                weights = PushedWeights(model.named_parameters, engine.weights_dtype)
                began = time.perf_counter()
                engine.load_weights(version, weights)
                pushed = time.perf_counter()
                assert weights.check(version, engine.weight_sums()) == 1.0
                times[way].append((pushed - began, time.perf_counter() - pushed))
                engine.generate([Request([1, 2, 3], seed=0)], Sampling(max_new_tokens=4))
        for engine in engines.values():
            engine.close()
    return [
        {
            "model": name,
            "parameters": size,
            "dtype": dtype,
            "way": way,
            "first": found[0][0],
            "seconds": [push for push, _ in found[1:]],
            "median": median(push for push, _ in found[1:]),
            "proof": median(proof for _, proof in found[1:]),
        }
        for way, found in times.items()
    ]


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16"))
    parser.add_argument("--folder", help="folder for models and pushes; default: a temporary one")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    rows = []
    for name in MODELS:
        with TemporaryDirectory(dir=options.folder) as work:
            rows += measure(name, Path(work), options.dtype, options.repeats)
    print(f"load {os.getloadavg()[0]:.1f} at the end")
    for row in rows:
        low, high = min(row["seconds"]), max(row["seconds"])
        print(
            f"{row['model']}, {row['parameters']:,} parameters, {row['dtype']}, {row['way']}: "
            f"{row['median']:.3f} s ({low:.3f} to {high:.3f}), the first {row['first']:.3f} s, "
            f"proof {row['proof']:.3f} s"
        )
    if options.out:
        options.out.write_text(json.dumps(rows, indent=2))


if __name__ == "__main__":
    main()
