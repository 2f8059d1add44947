"""The demonstration: a student before and after distillation, beside its teacher."""

from __future__ import annotations

import sys
import time
from pathlib import Path
from typing import Literal

from lightning.pytorch import Trainer
from rich.console import Console
from rich.table import Table

from opd_lightning.commands.lightning_cli import OPDCLI
from opd_lightning.data.prompts import PromptSource
from opd_lightning.errors import UserError
from opd_lightning.evaluation.responses import EvaluationSuite
from opd_lightning.lab.arithmetic import ANSWER_PATTERN
from opd_lightning.lab.build import ArithmeticRecipe, build
from opd_lightning.lab.plot import plot_run
from opd_lightning.methods import SFT
from opd_lightning.models.student import Student
from opd_lightning.rollouts import HFEngine, Sampling
from opd_lightning.run.datamodule import RolloutDataModule
from opd_lightning.run.step_progress import StepProgressBar
from opd_lightning.serving.vllm_process import vllm_unavailable
from opd_lightning.verifiers import ExactMatch

CONFIG = Path("configs/lab/opd_full_vocabulary.yaml")
VLLM_CONFIG = Path("configs/engine/vllm.yaml")
LAB = Path("lab/arithmetic")

Engine = Literal["hf", "vllm"]
ENGINES: dict[Engine, str] = {"hf": "Hugging Face generate", "vllm": "vLLM"}


def demonstrate(run: Path, require: float, engine: Engine) -> None:
    """Build the lab, train by `CONFIG`, compare on held-out sums.

    Each command is printed before it runs. The loss is the reverse KL over the whole vocabulary,
    which needs half as many responses as sampled tokens alone.

    Args:
        run: Run folder to write.
        require: Accuracy that the student must reach.
        engine: Sampler of the rollouts. Models of this size cost vLLM's CPU build more than
            Hugging Face generate.
    """
    if not CONFIG.is_file():
        raise UserError(f"no {CONFIG} here; run the demo from the project's folder")
    if run.exists():
        raise UserError(f"run folder {str(run)!r} exists; remove it or name another with --run")
    if engine == "vllm" and (reason := vllm_unavailable()):
        raise UserError(f"--engine: got vllm, but {reason}; install it or take hf")
    console = Console()
    began = time.monotonic()

    console.print("$ opd lab build", style="bold")
    build(ArithmeticRecipe(), LAB)

    scores = {
        "student before": evaluate(LAB / "student", LAB / "held_out.jsonl"),
        "teacher": evaluate(LAB / "teacher", LAB / "held_out.jsonl"),
    }

    overrides = ["--config", str(VLLM_CONFIG)] if engine == "vllm" else []
    logger = "--trainer.logger.init_args.save_dir"
    _run(console, "fit", "--config", str(CONFIG), *overrides, logger, str(run))
    exported = run / "student"
    _run(
        console, "export", "--config", str(run / "config.yaml"),
        "--ckpt_path", str(run / "checkpoints" / "last.ckpt"), "--out", str(exported),
    )  # fmt: skip
    scores["student after"] = evaluate(exported, LAB / "held_out.jsonl")

    picture = run / "demo.png"
    plot_run(run, scores["student before"], scores["teacher"], picture)
    console.print(_table(scores))
    console.print(f"{time.monotonic() - began:.0f} s after installation; engine: {ENGINES[engine]}")
    console.print(f"picture:     {picture}")
    console.print(f"student:     {exported} (an ordinary Hugging Face folder)")
    console.print(f"TensorBoard: {Path(sys.prefix, 'bin', 'tensorboard')} --logdir {run.parent}")
    if scores["student after"]["score"] < require:
        raise UserError(
            f"the student ended at {scores['student after']['score']:.3f}, below --require "
            f"{require}; {run} shows where it went wrong"
        )


def evaluate(model: Path, prompts: Path) -> dict[str, float]:
    """Return the accuracy of a Hugging Face folder on a prompt file, "score" and by domain.

    Samples with `HFEngine` at temperature 1, independent of the engine in training.
    """
    suite = EvaluationSuite(prompts=PromptSource(str(prompts)))
    data = RolloutDataModule(
        engine=HFEngine(),
        verifier=ExactMatch(ANSWER_PATTERN),
        validation={"suite": suite},
        sampling=Sampling(max_new_tokens=64),
    )
    trainer = Trainer(
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_model_summary=False,
        callbacks=[StepProgressBar()],
    )
    (values,) = trainer.validate(SFT(Student(str(model))), datamodule=data, verbose=False)
    return {name.removeprefix("val/suite/"): value for name, value in values.items()}


def _run(console: Console, *args: str) -> None:
    console.print("$ opd " + " ".join(args), style="bold", soft_wrap=True)
    OPDCLI(list(args))


def _table(scores: dict[str, dict[str, float]]) -> Table:
    table = Table("held-out sums", *scores, title="accuracy")
    domains = sorted(k for k in scores["teacher"] if k.startswith("score/"))
    for key in [*domains, "score"]:
        row = (f"{values[key]:.3f}" for values in scores.values())
        label = "[bold]all" if key == "score" else key.removeprefix("score/")
        table.add_row(label, *row)
    return table
