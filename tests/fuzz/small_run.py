"""Settings of one optimiser step on the lab's untrained models, for kinds that change files."""

from __future__ import annotations

from typing import Any

STUDENT, TEACHER = "student", "teacher"


def settings(prompts: str, *, method: str = "OPD", on_bad_row: str = "error") -> dict[str, Any]:
    """Return settings that read a prompt file and both model folders, and train one step.

    Args:
        prompts: The prompt file or folder.
        method: OPD, whose student writes and a verifier scores, and of whose prompts some are
            guided by their privileged text; or SFT, which reads recorded responses.
        on_bad_row: As `PromptSource` takes it.
    """
    model: dict[str, Any] = {"student": {"path": STUDENT}}
    data: dict[str, Any] = {
        "train": {"path": prompts, "on_bad_row": on_bad_row},
        "engine": {"class_path": "opd_lightning.rollouts.HFEngine"},
        "sampling": {"max_new_tokens": 4},
        "prompts_per_step": 2,
    }
    if method == "OPD":
        frozen = {"class_path": "opd_lightning.teachers.FrozenTeacher"}
        model["teacher"] = frozen | {"init_args": {"path": TEACHER}}
        data["verifier"] = {
            "class_path": "opd_lightning.verifiers.ExactMatch",
            "init_args": {"pattern": r";(-?\d+)$"},
        }
        data["mix"] = {"guided": 0.5}
    else:
        data["mix"] = {"recorded": 1}
    return {
        "seed_everything": 0,
        "model": {"class_path": f"opd_lightning.methods.{method}", "init_args": model},
        "data": data,
        "trainer": {
            "accelerator": "cpu",
            "max_steps": 1,
            "limit_val_batches": 0,
            "enable_checkpointing": False,
            "enable_progress_bar": False,
            "logger": {
                "class_path": "lightning.pytorch.loggers.CSVLogger",
                "init_args": {"save_dir": "run", "name": "", "version": ""},
            },
        },
    }


def write_models(student: str, teacher: str) -> None:
    """Write both model folders, which differ in nothing but their weights."""
    from pathlib import Path

    from opd_lightning.lab.models import new_model

    for seed, folder in enumerate((student, teacher)):
        Path(folder).mkdir()
        new_model(Path(folder), layers=1, hidden_size=32, seed=seed)
