"""The student: response-space scores, and weights as an engine wants them."""

from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from peft import LoraConfig
from transformers import AutoModelForCausalLM

from opd_lightning.commands.export import write_hf_folder
from opd_lightning.errors import UserError
from opd_lightning.lab.models import new_model
from opd_lightning.losses.divergence import ReverseKL
from opd_lightning.models.head import Comparison
from opd_lightning.models.student import Student
from opd_lightning.processes import gather
from opd_lightning.teachers import EMATeacher, FrozenTeacher
from tests.processes import call_ranks
from tests.unit.test_head import two_rows


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("model")
    new_model(path, layers=2, hidden_size=64, seed=0)
    return path


def loaded(path: Path, lora: LoraConfig | None = None) -> Student:
    student = Student(str(path), lora=lora)
    student.load()
    return student


def lora(**changes: object) -> LoraConfig:
    return LoraConfig(**{"r": 4, "target_modules": ["q_proj", "down_proj"], **changes})


def test_nothing_heavy_before_load(tmp_path: Path) -> None:
    assert Student(str(tmp_path / "nowhere")).model is None


def test_u3_student_as_its_own_teacher_gives_zero(folder: Path) -> None:
    student, teacher = loaded(folder), FrozenTeacher(str(folder))
    teacher.load(torch.device("cpu"), student)
    batch = two_rows()
    states = teacher.states(batch, "student")
    answers = student(batch, top_k=4, comparisons={"loss": Comparison(states, ReverseKL())})
    mine, theirs, distance = answers.student, answers.teachers["loss"], answers.values["loss"]
    distance.sum().backward()
    assert distance.abs().max() < 1e-6
    assert (mine.logprobs - theirs.logprobs).abs().max() == 0
    again = teacher.score(batch, "student").logprobs[batch.response_mask]
    assert (mine.logprobs - again).abs().max() == 0
    gradients = [p.grad for p in student.parameters() if p.grad is not None]
    assert gradients
    assert max(g.abs().max() for g in gradients) < 1e-6


def test_u4_other_rows_and_padding_do_not_change_a_row(folder: Path) -> None:
    student = loaded(folder)
    batch = two_rows()
    both = student.score(batch).logprobs
    for row, rollout in enumerate(batch.rollouts):
        ids = torch.tensor([rollout.prompt_ids + rollout.response_ids])
        logprobs = (student.model(ids).logits[0] / batch.temperature).log_softmax(-1)
        first = len(rollout.prompt_ids) - 1
        for t, token in enumerate(rollout.response_ids):
            torch.testing.assert_close(both[row, t], logprobs[first + t, token])
        assert (both[row, len(rollout.response_ids) :] == 0).all()


def test_weights_have_hugging_face_names_and_come_once(folder: Path) -> None:
    student = loaded(folder)
    names = [name for name, _ in student.weights()]
    assert names == [n for n, _ in AutoModelForCausalLM.from_pretrained(folder).named_parameters()]
    assert len(names) == len(set(names))


@pytest.mark.parametrize(
    "config",
    [
        lora(init_lora_weights=False),
        lora(init_lora_weights=False, use_rslora=True, lora_alpha=3),
        lora(init_lora_weights=False, modules_to_save=["input_layernorm"]),
        lora(init_lora_weights=False, trainable_token_indices=[3, 5]),
        lora(init_lora_weights="mica"),
    ],
    ids=["plain", "rslora", "modules_to_save", "token rows", "mica"],
)
def test_lora_is_merged_on_the_fly(folder: Path, config: LoraConfig) -> None:
    student = loaded(folder, config)
    with torch.no_grad():  # trained modules differ from the base
        for name, parameter in student.model.named_parameters():
            if any(part in name for part in ("modules_to_save", "trainable_tokens", "lora_A")):
                parameter.add_(0.5)
    streamed = dict(student.weights())
    merged = dict(student.model.merge_and_unload().named_parameters())
    base = dict(AutoModelForCausalLM.from_pretrained(folder).named_parameters())
    assert streamed.keys() == merged.keys() == base.keys()
    for name, tensor in merged.items():
        torch.testing.assert_close(streamed[name], tensor, atol=1e-6, rtol=0)
    assert any((streamed[name] - base[name]).abs().max() > 1e-3 for name in base)


@pytest.mark.parametrize(
    "config",
    [
        lora(use_dora=True),
        lora(lora_bias=True),
        lora(target_modules=["q_proj", "embed_tokens"]),
        lora(target_modules=["lm_head"]),  # tied to the embedding
        lora(alora_invocation_tokens=[3, 4], task_type="CAUSAL_LM"),
        lora(layer_replication=[[0, 2], [1, 2]]),
    ],
    ids=["dora", "lora_bias", "embedding", "tied head", "alora", "more layers"],
)
def test_lora_that_cannot_be_merged_is_refused(folder: Path, config: LoraConfig) -> None:
    with pytest.raises(UserError, match="cannot merge"):
        loaded(folder, config)


@pytest.mark.parametrize("name", ["embed_tokens", "lm_head"])
def test_copies_of_a_shared_weight_are_refused(folder: Path, name: str) -> None:
    """The student would train one, and an export or engine use it as both."""
    with pytest.raises(UserError, match="head and embedding share one weight"):
        loaded(folder, lora(modules_to_save=[name]))


def test_lora_trains_only_adapters(folder: Path) -> None:
    student = loaded(folder, lora())
    student.score(two_rows()).logprobs.sum().backward()
    touched = [n for n, p in student.named_parameters() if p.grad is not None]
    assert touched
    assert all("lora_" in name for name in touched)


@pytest.mark.parametrize("rows", [None, [3, 5, 40]], ids=["", "token rows"])
def test_exported_folder_is_the_merged_student(
    folder: Path, tmp_path: Path, rows: list[int] | None
) -> None:
    student = loaded(folder, lora(init_lora_weights=False, trainable_token_indices=rows))
    with torch.no_grad():
        for name, parameter in student.model.named_parameters():
            if "trainable_tokens" in name:
                parameter.add_(0.5)
    write_hf_folder(student, tmp_path)
    again = loaded(tmp_path)
    torch.testing.assert_close(
        student.score(two_rows()).logprobs, again.score(two_rows()).logprobs, atol=1e-5, rtol=1e-6
    )
    assert again.source.tokenizer.chat_template == student.source.tokenizer.chat_template
    assert again.source.eos_ids == student.source.eos_ids


@pytest.mark.parametrize("config", [None, lora(init_lora_weights=False)], ids=["whole", "lora"])
def test_gradient_checkpointing_changes_no_gradient(
    folder: Path, config: LoraConfig | None
) -> None:
    gradients = []
    for checkpointing in (False, True):
        torch.manual_seed(0)  # of the adapters
        student = Student(str(folder), lora=config, gradient_checkpointing=checkpointing)
        student.load()
        assert student.model.is_gradient_checkpointing == checkpointing
        student.score(two_rows()).logprobs.sum().backward()
        gradients.append([p.grad for p in student.parameters() if p.requires_grad])
    for plain, checkpointed in zip(*gradients, strict=True):
        torch.testing.assert_close(plain, checkpointed)


def load_with_own_seed(rank: int, rendezvous: str, folder: str) -> None:
    """Run as one of two processes."""
    dist.init_process_group("gloo", init_method=rendezvous, rank=rank, world_size=2)
    torch.manual_seed(rank)
    student = Student(folder, lora=LoraConfig(r=4, target_modules=["q_proj"]))
    student.load()
    teacher = EMATeacher()
    teacher.load(torch.device("cpu"), student)
    first, second = gather({n: p.detach() for n, p in teacher.model().named_parameters()})
    torch.testing.assert_close(second, first, atol=0, rtol=0)
    dist.barrier()  # gloo's threads may abort a process that leaves first
    dist.destroy_process_group()


def test_processes_begin_with_one_adapter(folder: Path, tmp_path: Path) -> None:
    arguments = (f"file://{tmp_path}/rendezvous", str(folder))
    call_ranks(load_with_own_seed, *arguments, count=2, timeout=120)
