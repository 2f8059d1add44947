"""Program `measuring_ranks LAYOUT NAME...`: trains and evaluates in the working folder.

Runs `opd` commands in sequence in the processes of a layout. Each process writes its output by
command to LAYOUT-<rank>.json.
"""

from __future__ import annotations

import io
import json
import os
import sys
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path
from unittest import mock

import torch.distributed as dist

from opd_lightning.cli import main

CONFIGS = Path(__file__).parents[2] / "configs"
LAYOUTS = {
    "one": [],
    "ddp": ["--config", str(CONFIGS / "strategy" / "ddp.yaml")],
    "fsdp2": ["--config", str(CONFIGS / "strategy" / "fsdp2.yaml")],
}
CALLBACKS = [
    {"class_path": "lightning.pytorch.callbacks.ModelCheckpoint"},
    {"class_path": "callbacks.RolloutLog", "init_args": {"every_n_steps": 1}},
    {"class_path": "callbacks.SignalPlots", "init_args": {"every_n_steps": 1}},
    {"class_path": "callbacks.CollapseWatch"},
]
STEPS, PROMPTS = 2, 8


def commands(layout: str) -> dict[str, list[str]]:
    """Return the commands, which evaluate the checkpoint of one process."""
    common = ["--config", str(CONFIGS / "lab" / "opd.yaml"), "--config", "suites.yaml"]
    common += LAYOUTS[layout]
    run = "--trainer.logger.init_args.save_dir=runs/"
    saved = [*common, f"{run}one", "--ckpt_path=last"]
    nowhere = "nowhere.jsonl"
    return {
        "fit": ["fit", *common, f"{run}{layout}", f"--trainer.callbacks={json.dumps(CALLBACKS)}"],
        "validate": ["validate", *saved, "--json"],
        "test": ["test", *saved, "--out", f"{layout}-test.json"],
        # Mistakes
        "prompts": ["validate", *saved, f"--data.texts.worked.prompts.path={nowhere}"],
        "damaged": ["validate", *saved, "--ckpt_path=suites.yaml"],
        "none": ["test", *saved, f"{run}nobody"],
    }


def run(words: list[str]) -> dict[str, object]:
    out, err = io.StringIO(), io.StringIO()
    code: object = 0
    with redirect_stdout(out), redirect_stderr(err):
        try:
            main(words)
        except SystemExit as ended:
            code = ended.code
    return {"code": code, "out": out.getvalue(), "err": err.getvalue()}


if __name__ == "__main__":
    layout, *names = sys.argv[1:]
    # The next command uses the same processes.
    with mock.patch.object(dist, "destroy_process_group"):
        said = {name: run(commands(layout)[name]) for name in names}
    Path(f"{layout}-{os.environ.get('LOCAL_RANK', '0')}.json").write_text(json.dumps(said))
    if dist.is_initialized():  # gloo may abort a process that exits first
        dist.barrier()
        dist.destroy_process_group()
