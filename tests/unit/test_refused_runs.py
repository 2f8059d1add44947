"""Data, models and trainers that do not go together are refused before any weight loads."""

import json
import shutil
from pathlib import Path

import pytest
from peft import LoraConfig

from opd_lightning.commands.trainer import Trainer
from opd_lightning.data.mix import RolloutMix
from opd_lightning.data.prompts import PromptSource
from opd_lightning.errors import UserError
from opd_lightning.evaluation.responses import EvaluationSuite
from opd_lightning.evaluation.tasks import HarnessTask
from opd_lightning.evaluation.texts import LikelihoodSuite
from opd_lightning.methods import OPD
from opd_lightning.models.student import Student
from opd_lightning.rollouts import HFEngine, Sampling
from opd_lightning.run.datamodule import RolloutDataModule
from opd_lightning.teachers import ByDomainTeacher, FrozenTeacher
from tests.conftest import TinyModelDir
from tests.harness_tasks import write_tasks
from tests.refusals import (
    STUDENT,
    TEACHER,
    TRAIN,
    Refusal,
    divergence,
    opd,
)


def written(folder: Path, *lines: str) -> str:
    """A file of prompts."""
    path = folder / "rows.jsonl"
    path.write_text("\n".join(lines))
    return str(path)


def test_suites_have_names_of_their_own() -> None:
    suites = {"sums": EvaluationSuite(prompts=PromptSource(TRAIN))}
    texts = {"sums": LikelihoodSuite(prompts=PromptSource(TRAIN))}
    tasks = {"sums": HarnessTask(task="choice")}
    for section, more in (("texts", {"texts": texts}), ("tasks", {"tasks": tasks})):
        with pytest.raises(UserError, match=f"data.{section}: got 'sums', the name of another"):
            RolloutDataModule(validation=suites, **more)


def test_a_task_that_cannot_be_had(refusal: Refusal, tmp_path: Path) -> None:
    folder = write_tasks(tmp_path)
    (tmp_path / "rows.jsonl").unlink()
    line = refusal(tasks={"quiz": HarnessTask(task="choice", include_path=str(folder))})
    assert "data.tasks.quiz: cannot load 'choice': FileNotFoundError" in line


def test_values_out_of_range() -> None:
    with pytest.raises(UserError, match="limit must be at least 1"):
        PromptSource(TRAIN, limit=0)
    with pytest.raises(UserError, match="max_batch_size: got 0"):
        HFEngine(max_batch_size=0)


def test_a_precision_that_rounds_weights(refusal: Refusal) -> None:
    assert "trainer.precision: got 'bf16-true'" in refusal(trainer={"precision": "bf16-true"})


def test_adapters_with_dropout(refusal: Refusal) -> None:
    lora = LoraConfig(lora_dropout=0.1)
    line = refusal(lambda: OPD(Student(STUDENT, lora=lora), FrozenTeacher(TEACHER)))
    assert "lora_dropout: got 0.1" in line


def test_validation_within_a_step(refusal: Refusal) -> None:
    line = refusal(trainer={"accumulate_grad_batches": 2, "val_check_interval": 5})
    assert "val_check_interval: got 5 micro-batches" in line
    line = refusal(trainer={"accumulate_grad_batches": 2, "val_check_interval": {"minutes": 1}})
    assert "val_check_interval: got a time" in line
    for option in ("val_check_interval", "max_time"):
        with pytest.raises(UserError, match=rf"^trainer\.{option}: got \{{'steps': 1\}}, expected"):
            Trainer(**{option: {"steps": 1}})  # type: ignore[arg-type]


def test_more_micro_batches_than_rollouts(refusal: Refusal) -> None:
    trainer = {"accumulate_grad_batches": 3, "val_check_interval": 6}
    line = refusal(trainer=trainer, prompts_per_step=2)
    assert "trainer.accumulate_grad_batches: got 3 for 2 rollouts" in line


def test_a_budget_of_positions(refusal: Refusal, tmp_path: Path) -> None:
    name = "max_tokens_per_micro_batch"
    with pytest.raises(UserError, match=f"data.{name}: got 0"):
        RolloutDataModule(max_tokens_per_micro_batch=0)
    line = refusal(trainer={"accumulate_grad_batches": 2}, **{name: 100})
    assert f"trainer.accumulate_grad_batches: got 2 and data.{name}" in line
    path = written(tmp_path, json.dumps({"messages": "1+1=", "answer": "2"}))
    line = refusal(path=path, sampling=Sampling(max_new_tokens=64), **{name: 64})
    assert "rows.jsonl:1 with max_new_tokens 64 has" in line


def test_heads_of_different_size(refusal: Refusal, tmp_path: Path) -> None:
    teacher = tmp_path / "teacher"
    shutil.copytree(TEACHER, teacher)
    config = json.loads((teacher / "config.json").read_text())
    (teacher / "config.json").write_text(json.dumps(config | {"vocab_size": 128}))
    wide, known = FrozenTeacher(str(teacher)), FrozenTeacher(TEACHER)
    for given in (wide, ByDomainTeacher({"default": known, "other": wide})):
        line = refusal(lambda given=given: divergence(teacher=given))
        assert "heads of 64 and 128 tokens" in line


def test_a_role_the_template_refuses(refusal: Refusal, tmp_path: Path) -> None:
    student = tmp_path / "student"
    shutil.copytree(STUDENT, student)
    template = "{{ raise_exception('no system role') }}"
    (student / "chat_template.jinja").write_text(template)
    line = refusal(lambda: opd(str(student), teacher=FrozenTeacher(str(student))))
    assert "chat template refuses the messages: no system role" in line


def test_different_tokenizers(
    refusal: Refusal,
    tiny_model_dir: TinyModelDir,
) -> None:
    line = refusal(lambda: opd(teacher=FrozenTeacher(str(tiny_model_dir()))))
    assert "have different tokenizers" in line
    assert "use models of one family" in line


def test_missing_models(refusal: Refusal) -> None:
    line = refusal(lambda: opd("lab/arithmetic/pupil"))
    assert "student model: no config.json in 'lab/arithmetic/pupil'" in line
    assert "teacher model" in refusal(lambda: opd(teacher=FrozenTeacher("./nowhere")))


def test_a_malformed_row(refusal: Refusal, tmp_path: Path) -> None:
    rows = Path(TRAIN).read_text().splitlines()
    rows[2] = rows[2][:-5]
    assert "rows.jsonl:3:" in refusal(path=written(tmp_path, *rows))


def test_an_empty_prompt_file(refusal: Refusal, tmp_path: Path) -> None:
    assert "rows.jsonl" in refusal(path=written(tmp_path))


def test_a_prompt_longer_than_the_context(
    refusal: Refusal,
    tmp_path: Path,
) -> None:
    path = written(tmp_path, json.dumps({"messages": "1+" * 150, "answer": "1"}))
    line = refusal(path=path, sampling=Sampling(max_new_tokens=64))
    assert "rows.jsonl:1: prompt of 303 tokens + max_new_tokens 64 exceeds" in line
    assert "context of 256" in line


def test_an_answer_missing_for_the_verifier(
    refusal: Refusal,
    tmp_path: Path,
) -> None:
    path = written(tmp_path, json.dumps({"messages": "1+1="}))
    assert "rows.jsonl:1" in refusal(path=path)


def test_recorded_responses(refusal: Refusal) -> None:
    mix = RolloutMix(recorded=1)
    assert "set model.init_args.imitation" in refusal(mix=mix)
    line = refusal(lambda: opd(imitation=1.0), mix=mix)
    assert "no 'response' or 'response_ids'" in line


def test_no_engine(refusal: Refusal) -> None:
    assert "data.engine: got nothing" in refusal(engine=None)


def test_a_run_folder_that_cannot_be_written(
    refusal: Refusal, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("opd_lightning.run.outputs._may_create_in", lambda folder: False)
    line = refusal(trainer={"default_root_dir": str(tmp_path)})
    assert line.startswith(f"trainer.default_root_dir: got '{tmp_path}', which cannot be written")
