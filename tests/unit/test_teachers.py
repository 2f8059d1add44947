"""Teachers: updates, fixed weights, and delegation."""

import hashlib
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig
from torch import Tensor

from opd_lightning.errors import UserError
from opd_lightning.lab.models import new_model
from opd_lightning.methods import GKD, OPD, OPSD
from opd_lightning.models.lora import moves_base, starts_elsewhere
from opd_lightning.models.student import Student
from opd_lightning.rules import EntropyBonus, PrefixWindow
from opd_lightning.teachers import AdapterOffTeacher, ByDomainTeacher, EMATeacher, FrozenTeacher
from opd_lightning.teachers.frozen import _copy_to
from opd_lightning.teachers.local import LocalTeacher
from opd_lightning.teachers.start import start_of
from opd_lightning.types import RolloutBatch
from tests.batches import make_batch, make_rollout
from tests.conftest import TinyModelDir
from tests.families import write_family

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    paths = [tmp_path_factory.mktemp("model") for _ in range(2)]
    for seed, path in enumerate(paths):
        new_model(path, layers=1, hidden_size=32, seed=seed)
    return paths


def loaded(path: Path, lora: bool = False) -> Student:
    student = Student(str(path), lora=LoraConfig(r=2, target_modules=["q_proj"]) if lora else None)
    student.load()
    move_adapters(student)
    return student


def move_adapters(student: Student) -> None:
    with torch.random.fork_rng(), torch.no_grad():
        torch.manual_seed(0)
        for name, parameter in student.named_parameters():
            if ".lora_B." in name:
                parameter.normal_()


def batch() -> RolloutBatch:
    return make_batch(
        [
            make_rollout([7, 8, 1], prompt_ids=[9, 10], domain="math"),
            make_rollout([11, 1], prompt_ids=[12], domain="code"),
            make_rollout([13, 14, 15, 1], prompt_ids=[9], domain="math"),
        ]
    )


def nudge(student: Student, by: float = 0.01) -> None:
    with torch.no_grad():
        for parameter in student.parameters():
            if parameter.requires_grad:
                parameter.add_(by)


def trained(student: Student) -> dict[str, Tensor]:
    return {n: p.clone() for n, p in student.model.named_parameters() if p.requires_grad}


@pytest.mark.parametrize("lora", [False, True], ids=["whole", "lora"])
@pytest.mark.parametrize("rate", [0.0, 0.25, 1.0])
def test_u19_ema_moves_by_its_rate(folders: list[Path], rate: float, lora: bool) -> None:
    student, teacher = loaded(folders[0], lora), EMATeacher(rate=rate)
    teacher.load(CPU, student)
    before = trained(student)
    nudge(student)
    teacher.follow(student, step=1)
    after = trained(student)
    for name, value in teacher.state_dict(student).items():
        expected = before[name] + rate * (after[name] - before[name])
        torch.testing.assert_close(value, expected, atol=1e-7, rtol=0)
    theirs, ours = teacher.score(batch(), "student"), student.score(batch())
    same = bool((theirs.logprobs == ours.logprobs).all())
    assert same is (rate == 1)


def test_u19_hard_copy_is_constant_within_its_window(folders: list[Path]) -> None:
    student, teacher = loaded(folders[0]), EMATeacher(rate=1.0, every=3)
    teacher.load(CPU, student)
    scores = []
    for step in range(1, 8):
        nudge(student)
        teacher.follow(student, step)
        scores.append(teacher.score(batch(), "student").logprobs)
    changes = [bool((a != b).any()) for a, b in pairwise(scores)]
    assert changes == [False, True, False, False, True, False]


@pytest.mark.parametrize("every", [1, 3])
def test_ema_warms_up_as_a_plain_mean(folders: list[Path], every: int) -> None:
    student, teacher = loaded(folders[0]), EMATeacher(rate=0.1, every=every, warmup=4)
    teacher.load(CPU, student)
    seen = [trained(student)]
    for step in range(1, 4 * every + 1):
        nudge(student, by=0.01 * step)
        teacher.follow(student, step)
        if step % every == 0:
            seen.append(trained(student))
    for name, value in teacher.state_dict(student).items():
        mean = torch.stack([student[name] for student in seen]).mean(0)
        torch.testing.assert_close(value, mean, atol=1e-6, rtol=0)
    before = {name: value.clone() for name, value in teacher.state_dict(student).items()}
    teacher.follow(student, 5 * every)  # warm: the rate of 1 / 6 is over
    for name, value in teacher.state_dict(student).items():
        expected = before[name] + 0.1 * (seen[-1][name] - before[name])
        torch.testing.assert_close(value, expected, atol=1e-6, rtol=0)


def test_a_warm_up_never_slows_an_average_down(folders: list[Path]) -> None:
    student = loaded(folders[0])
    plain, warm = EMATeacher(rate=0.5), EMATeacher(rate=0.5, warmup=4)
    for teacher in (plain, warm):
        teacher.load(CPU, student)
    for step in range(1, 4):
        nudge(student)
        for teacher in (plain, warm):
            teacher.follow(student, step)
    for name, value in plain.state_dict(student).items():
        assert torch.equal(warm.state_dict(student)[name], value)


def test_what_never_moves_has_no_warm_up() -> None:
    with pytest.raises(UserError, match="got 3 updates for rate 0"):
        EMATeacher(rate=0, warmup=3)


def test_ema_state_comes_back(folders: list[Path]) -> None:
    student, teacher = loaded(folders[0]), EMATeacher(rate=0.5)
    teacher.load(CPU, student)
    nudge(student)
    teacher.follow(student, 1)
    state = {name: value.clone() for name, value in teacher.state_dict(student).items()}
    again = EMATeacher(rate=0.5)
    again.load(CPU, student)
    again.load_state_dict(state)
    one, other = (t.score(batch(), "student").logprobs for t in (teacher, again))
    assert (one == other).all()


def test_u19_a_frozen_teacher_does_not_move(folders: list[Path]) -> None:
    student, teacher = loaded(folders[0]), FrozenTeacher(str(folders[0]))
    teacher.load(CPU, student)

    def digest() -> str:
        data = b"".join(p.numpy().tobytes() for p in teacher.model().parameters())
        return hashlib.sha256(data).hexdigest()

    before = digest()
    ratio = teacher.score(batch(), "student").logprobs - student.score(batch()).logprobs.detach()
    (student.score(batch()).logprobs * ratio).sum().backward()
    nudge(student)
    assert digest() == before


def test_padding_of_a_larger_head_is_impossible_for_a_frozen_teacher(folders: list[Path]) -> None:
    teacher = FrozenTeacher(str(folders[1]))
    teacher.load(CPU, loaded(folders[0]))
    size = teacher.source.config.vocab_size
    known, sampled = ([7, i, 9, 1] for i in (size - 1, size + 3))
    scored, other = (
        teacher.score(make_batch([make_rollout(ids), make_rollout([11, 1])]), "student", top_k=2)
        for ids in (sampled, known)
    )
    assert scored.logprobs[0, 1] == -torch.inf
    expected = other.logprobs.clone()
    expected[0, 1] = -torch.inf
    assert torch.equal(scored.logprobs, expected)
    assert torch.equal(scored.entropy, other.entropy)
    assert torch.equal(scored.top_ids, other.top_ids)


def test_adapter_off_is_the_base(folders: list[Path]) -> None:
    student, base = loaded(folders[0], lora=True), FrozenTeacher(str(folders[0]))
    teacher = AdapterOffTeacher()
    for one in (teacher, base):
        one.load(CPU, student)
    expected = base.score(batch(), "student").logprobs
    torch.testing.assert_close(teacher.score(batch(), "student").logprobs, expected)
    assert (student.score(batch()).logprobs - expected).abs().max() > 1e-3  # and it is on again


def test_adapter_off_is_the_base_in_the_head_too(tiny_model_dir: TinyModelDir) -> None:
    folder = tiny_model_dir(tie=False)
    student = Student(str(folder), lora=LoraConfig(r=2, target_modules=["lm_head"]))
    student.load()
    move_adapters(student)
    base, teacher = FrozenTeacher(str(folder)), AdapterOffTeacher()
    for one in (teacher, base):
        one.load(CPU, student)
    expected = base.score(batch(), "student").logprobs
    torch.testing.assert_close(teacher.score(batch(), "student").logprobs, expected)
    assert (student.score(batch()).logprobs - expected).abs().max() > 1e-3


def test_adapter_off_needs_an_adapter(folders: list[Path]) -> None:
    with pytest.raises(UserError, match="no LoRA adapter to switch off"):
        AdapterOffTeacher().check_model(Student(str(folders[0])))


SETTINGS = [
    {"init_lora_weights": "gaussian"},
    {"init_lora_weights": "orthogonal"},
    {"init_lora_weights": "mica"},
    {"modules_to_save": ["input_layernorm"]},
    {"init_lora_weights": "pissa"},
    {"init_lora_weights": "pissa_niter_4"},
    {"init_lora_weights": "olora"},
    {"init_lora_weights": False},
    {"bias": "all"},
    {"bias": "lora_only"},
]


@pytest.mark.parametrize("settings", SETTINGS, ids=str)
def test_the_start_is_the_student_as_loaded_or_refused(
    tmp_path: Path, settings: dict[str, object]
) -> None:
    """Adapter off, and what measurements compare with; after training, which moves biases too."""
    folder = write_family(tmp_path, "qwen2")
    config = LoraConfig(r=2, target_modules=["q_proj", "k_proj"], **settings)
    student = Student(str(folder), lora=config)
    student.check()
    student.load()
    at_start = student.score(batch()).logprobs.detach()
    nudge(student, by=0.1)
    assert (student.score(batch()).logprobs - at_start).abs().max() > 1e-2
    teachers: list[LocalTeacher] = []
    if moves_base(config):
        with pytest.raises(UserError, match=r"got student\.lora\.(bias|init_lora_weights): "):
            AdapterOffTeacher().check_model(student)
    else:
        teachers.append(AdapterOffTeacher())
    if starts_elsewhere(config):
        with pytest.raises(UserError, match="does not start as the model in its folder"):
            start_of(student, None)
    else:
        teachers.append(start_of(student, None))
    for teacher in teachers:
        teacher.load(CPU, student)
        found = teacher.score(batch(), "student").logprobs
        torch.testing.assert_close(found, at_start, atol=1e-5, rtol=0)
    assert len(teachers) == 2 - (moves_base(config) is not None) - starts_elsewhere(config)


def check_student(folder: Path, config: LoraConfig) -> None:
    Student(str(folder), lora=config).check()


@pytest.mark.parametrize(
    ("settings", "field"),
    [
        ({"r": 0}, r"student\.lora\.r"),
        ({"rank_pattern": {"q_proj": 0}}, "rank_pattern"),
        ({"init_lora_weights": "corda"}, "init_lora_weights"),
        ({"init_lora_weights": "eva"}, "init_lora_weights"),
        ({"init_lora_weights": "lora_ga"}, "init_lora_weights"),
        ({"init_lora_weights": "nonsense"}, "init_lora_weights"),
        ({"target_modules": ["nowhere"]}, "nowhere"),
        ({"target_modules": ["layers"]}, "ModuleList"),
        ({"exclude_modules": ["q_proj"]}, "exclude_modules"),
        ({"modules_to_save": ["nowhere"]}, "nowhere"),
        ({"layers_to_transform": [7]}, "layers_to_transform|q_proj"),
    ],
    ids=str,
)
def test_adapters_that_cannot_be_built_are_refused_before_weights_load(
    folders: list[Path], settings: dict[str, object], field: str
) -> None:
    config = LoraConfig(**{"r": 2, "target_modules": ["q_proj"], **settings})
    with pytest.raises(UserError, match=field) as refused:
        check_student(folders[0], config)
    assert "\n" not in str(refused.value)
    assert len(str(refused.value)) <= 400


def test_u21_domains_are_answered_by_their_own_teacher(folders: list[Path]) -> None:
    student = loaded(folders[0])
    math, code = (FrozenTeacher(str(folder)) for folder in folders)
    both = ByDomainTeacher({"math": math, "code": code})
    both.load(CPU, student)
    whole = batch()
    scores = both.score(whole, "student", top_k=3)
    for row, teacher in enumerate((math, code, math)):
        alone = teacher.score(whole, "student", top_k=3)
        torch.testing.assert_close(scores.logprobs[row], alone.logprobs[row])
        torch.testing.assert_close(scores.entropy[row], alone.entropy[row])
        assert (scores.top_ids[row] == alone.top_ids[row]).all()
    assert both.parts() == [math, code]


def test_u21_an_unknown_domain_is_refused_with_the_known_ones(folders: list[Path]) -> None:
    teacher = ByDomainTeacher({"math": FrozenTeacher(str(folders[0]))})
    prompts = [rollout.prompt for rollout in batch().rollouts]
    with pytest.raises(UserError, match=r"no teacher for domain 'code'; the known ones are math"):
        teacher.check(prompts, 1.0)


def test_u21_asking_takes_all_ranks_if_it_does_of_anybody(
    folders: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    inner = ByDomainTeacher({"math": FrozenTeacher(str(folders[0]))})
    teacher = ByDomainTeacher({"math": inner, "code": FrozenTeacher(str(folders[1]))})
    assert not teacher.is_collective
    monkeypatch.setattr(FrozenTeacher, "is_collective", True)
    assert inner.is_collective
    assert teacher.is_collective


def test_u20_cached_teacher_scores_give_a_live_advantage(folders: list[Path]) -> None:
    """Lightning-OPD (2604.13010): the teacher's half may be old, the student's never is."""
    student, teacher = loaded(folders[0]), FrozenTeacher(str(folders[1]))
    teacher.load(CPU, student)
    cached = teacher.score(batch(), "student").logprobs.clone()

    def advantage(theirs: Tensor) -> Tensor:
        return theirs - student.score(batch()).logprobs.detach()

    at_first = advantage(cached)
    assert (at_first == advantage(teacher.score(batch(), "student").logprobs)).all()
    nudge(student)
    assert (advantage(cached) - at_first).abs().max() > 1e-4
    assert (advantage(cached) == advantage(teacher.score(batch(), "student").logprobs)).all()


def test_an_offloaded_teacher_is_on_the_device_from_its_first_answer_to_its_rest(
    folders: list[Path],
) -> None:
    student = loaded(folders[0])
    plain, offloaded = FrozenTeacher(str(folders[0])), FrozenTeacher(str(folders[0]), offload=True)
    for teacher in (plain, offloaded):
        teacher.load(CPU, student)
    expected = plain.score(batch(), "student").logprobs
    for _ in range(2):
        torch.testing.assert_close(offloaded.score(batch(), "student").logprobs, expected)
        offloaded.release()
    assert offloaded._reader is not None
    assert offloaded._device_copy is None
    away = _copy_to(torch.device("meta"), offloaded._reader)  # stands for a GPU: memory elsewhere
    assert {x.device.type for x in (*away.parameters(), *away.buffers())} == {"meta"}
    assert {x.device.type for x in offloaded._reader.parameters()} == {"cpu"}


def test_an_offloaded_teacher_is_read_to_memory(folders: list[Path]) -> None:
    offloaded = FrozenTeacher(str(folders[0]), offload=True)
    with torch.device("meta"):  # stands for a GPU, where Lightning has new tensors made
        offloaded.load(CPU, Student("unused"))
    parameters = offloaded.model().parameters()
    assert {x.device.type for x in parameters} == {"cpu"}


@pytest.mark.parametrize(
    ("method", "settings", "sums"),
    [
        (GKD, {}, True),
        (GKD, {"rules": [PrefixWindow(3)]}, False),
        (GKD, {"terms": [EntropyBonus()]}, False),
        (GKD, {"imitation": 0.0}, False),
        (GKD, {"aggregation": "seq-mean-token-mean"}, False),
        (OPD, {}, False),
        (OPSD, {}, True),
        (OPSD, {"views": {"privileged": None}}, False),
    ],
)
def test_losses_that_sum_a_divergence(
    method: Any, settings: dict[str, Any], sums: bool, folders: list[Path]
) -> None:
    """Only their gradients are computed with their values."""
    seen = settings.pop("views", {"privileged": [4, 5]})
    batch = make_batch([make_rollout([6, 7], views=seen), make_rollout([8], views={**seen})])
    module = method(Student(str(folders[0])), FrozenTeacher(str(folders[1])), **settings)
    assert module.sums_loss(batch) is sums
