"""The demonstration: a student before and after distillation, beside its teacher."""

from __future__ import annotations

import logging
import time
import warnings
from pathlib import Path

from lightning.pytorch import Trainer
from rich.console import Console
from rich.table import Table

from opd_lightning.data.datamodule import EvaluationSuite, RolloutDataModule
from opd_lightning.data.prompts import PromptSource
from opd_lightning.errors import UserError
from opd_lightning.lab.arithmetic import ANSWER_PATTERN
from opd_lightning.lab.build import Recipe, build_arithmetic
from opd_lightning.lab.plot import plot_run
from opd_lightning.methods import SFT
from opd_lightning.rollouts import HFEngine, Sampling
from opd_lightning.rollouts.vllm_process import vllm_unavailable
from opd_lightning.student import Student
from opd_lightning.verifiers import ExactMatch

CONFIG = Path("configs/lab/opd.yaml")
VLLM_CONFIG = Path("configs/engine/vllm.yaml")
LAB = Path("lab/arithmetic")


def demonstrate(run: Path) -> None:
    """Build the lab, train by `configs/lab/opd.yaml`, compare on held-out sums.

    Everything it does can be done by hand; each command is printed before it runs.
    """
    if not CONFIG.is_file():
        raise UserError(f"no {CONFIG} here; run the demo from the project's folder")
    if run.exists():
        raise UserError(f"run folder {str(run)!r} exists; remove it or name another with --run")
    console = Console()
    began = time.monotonic()

    reason = vllm_unavailable()
    engine = "Hugging Face generate" if reason else "vLLM"
    console.rule("engine")
    console.print(f"{engine}, because {reason or 'vLLM is installed'}")

    console.rule("opd lab build")
    build_arithmetic(Recipe(), LAB)

    console.rule("before")
    scores = {
        "student before": evaluate(LAB / "student", LAB / "held_out.jsonl"),
        "teacher": evaluate(LAB / "teacher", LAB / "held_out.jsonl"),
    }

    overrides = [] if reason else ["--config", str(VLLM_CONFIG)]
    logger = "--trainer.logger.init_args.save_dir"
    _run(console, "fit", "--config", str(CONFIG), *overrides, logger, str(run))
    exported = run / "student"
    _run(
        console, "export", "--config", str(run / "config.yaml"),
        "--ckpt_path", str(run / "checkpoints" / "last.ckpt"), "--out", str(exported),
    )  # fmt: skip
    scores["student after"] = evaluate(exported, LAB / "held_out.jsonl")

    picture = run / "demo.png"
    plot_run(run, scores["teacher"]["score"], picture)
    console.rule("result")
    console.print(_table(scores))
    console.print(f"{time.monotonic() - began:.0f} s after installation; engine: {engine}")
    console.print(f"picture:     {picture}")
    console.print(f"student:     {exported} (an ordinary Hugging Face folder)")
    console.print(f"TensorBoard: .venv/bin/tensorboard --logdir {run.parent}")


def evaluate(model: Path, prompts: Path, *, samples: int = 1) -> dict[str, float]:
    """Accuracy of any Hugging Face folder on a prompt file, "score" and by domain.

    Sampled at temperature 1 by Hugging Face generate, whatever engine trained it.
    """
    suite = EvaluationSuite(prompts=PromptSource(str(prompts)), samples=samples)
    data = RolloutDataModule(
        engine=HFEngine(),
        verifier=ExactMatch(ANSWER_PATTERN),
        validation={"suite": suite},
        sampling=Sampling(max_new_tokens=64),
    )
    trainer = Trainer(accelerator="cpu", logger=False, enable_checkpointing=False)
    (values,) = trainer.validate(SFT(Student(str(model))), datamodule=data, verbose=False)
    return {name.removeprefix("val/suite/"): value for name, value in values.items()}


def _run(console: Console, *args: str) -> None:
    from opd_lightning.cli import OPDCLI

    console.rule("opd " + " ".join(args))
    OPDCLI(list(args))


def _table(scores: dict[str, dict[str, float]]) -> Table:
    table = Table("held-out sums", *scores, title="accuracy")
    domains = sorted(k for k in scores["teacher"] if k.startswith("score/"))
    for key in [*domains, "score"]:
        row = (f"{values[key]:.3f}" for values in scores.values())
        label = "[bold]all" if key == "score" else key.removeprefix("score/")
        table.add_row(label, *row)
    return table


def quiet() -> None:
    """Silence hints of Lightning's that do not apply to this program's loaders."""
    logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)
    warnings.filterwarnings("ignore", message=".*does not have many workers.*")
