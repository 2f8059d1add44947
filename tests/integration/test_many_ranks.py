"""Several processes (DDP, FSDP2, HSDP over gloo) equal one: gradients, rollouts and figures."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from opd_lightning.commands.export import load_student, write_hf_folder
from opd_lightning.errors import UserError
from opd_lightning.models.causal_lm import load_causal_lm
from opd_lightning.models.source import ModelSource
from opd_lightning.models.student import Student
from opd_lightning.rollouts import Sampling, VLLMEngine
from opd_lightning.rollouts.base import Request
from tests import processes
from tests.conftest import build_tiny_model
from tests.harness_tasks import write_tasks
from tests.integration.many_ranks import SAVED_AS
from tests.integration.ways import ways

SCRIPT = "tests.integration.many_ranks"
CONFIGS = Path(__file__).parents[2] / "configs"
SHARDED = {"fsdp2": 0.5, "fsdp2, 1": 0.5, "hsdp": 0.5}  # share of the weights in a process
HELD = {"ddp": 1.0, "ddp, unused": 1.0, **SHARDED}
RANKS = {"one": 1, "ddp": 2, "ddp, unused": 2, "fsdp2": 2, "fsdp2, 1": 2, "hsdp": 4}
# Layouts by part. With DDP, runs of other tests are compared with those of one process: see
# test_collapse.py, test_checkpoint_ranks.py and test_measuring_ranks.py.
QUICK = {"core": ("one", "fsdp2"), "start": ("one", "fsdp2"), "shards": ("fsdp2",)}
TIMING = ("time/", "cost/", "tokens_per_second")

Found = dict[str, Any]


class Runs:
    """Starts the script for what nobody has asked for yet, and remembers the answer.

    The quick parts of a layout share its processes, which import the tasks' library once.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder  # where runs leave their checkpoints
        self._found: dict[str, dict[str, dict[str, Found]]] = {layout: {} for layout in RANKS}

    def __call__(self, layout: str, part: str) -> dict[str, Found]:
        """What was found by way."""
        found = self._found[layout]
        if part not in found:
            quick = [name for name, layouts in QUICK.items() if layout in layouts]
            parts = quick if part in quick else [part]
            words, count = (layout, "found.pt", *parts), RANKS[layout]
            processes.run_ranks(SCRIPT, *words, count=count, cwd=self.folder, timeout=500)
            found |= torch.load(self.folder / "found.pt", weights_only=True)
        return found[part]


@pytest.fixture(scope="module")
def runs(deep_lab: Path, tmp_path_factory: pytest.TempPathFactory) -> Runs:
    folder = tmp_path_factory.mktemp("many_ranks")
    (folder / "lab").symlink_to(deep_lab / "lab")
    (folder / "tasks").mkdir()
    write_tasks(folder / "tasks")
    build_tiny_model(folder / "untied", hidden_size=64, layers=2, seed=0, tie=False)
    return Runs(folder)


def of(layout: str, part: str, *way: str) -> Any:
    """Return parameters with their mark."""
    is_quick = layout in QUICK.get(part, ())
    return pytest.param(layout, part, *way, marks=[] if is_quick else pytest.mark.slow)


CORE = [of(layout, "core") for layout in HELD]
ALL = [
    of(layout, part, way)
    for layout in HELD
    for part, some in ways(1).items()
    for way in some
    if part not in ("bfloat16", "vllm")
    if part != "compiled" or layout in ("ddp", "fsdp2")  # a compilation takes minutes
]
WATCHED = [
    of(layout, part, way)
    for layout in ("one", *HELD)
    for part, way in (("core", "sampled"), ("watched", "adapters, watched"))
]


@pytest.mark.parametrize(("layout", "part", "way"), ALL)
def test_many_are_one(runs: Runs, layout: str, part: str, way: str) -> None:
    one, many = runs("one", part)[way], runs(layout, part)[way]
    assert many["held"] == pytest.approx(HELD[layout], abs=0.01)
    torch.testing.assert_close(many["weights"][0], one["weights"][0], atol=0, rtol=0)
    assert many["rollouts"] == one["rollouts"]
    assert way == "none" or len({len(ids) for _, _, ids, _ in one["rollouts"]}) > 1
    assert len(one["gradients"]) == len(many["gradients"]) > 1
    for alone, together in zip(one["gradients"], many["gradients"], strict=True):
        torch.testing.assert_close(together, alone, atol=1e-6, rtol=0)
    largest = max(g.abs().max() for g in one["gradients"][0].values())
    assert largest > 1e-2 or (way == "none" and largest == 0)
    torch.testing.assert_close(many["weights"][1], one["weights"][1], atol=1e-6, rtol=0)
    for alone, together in zip(one["logged"], many["logged"], strict=True):
        assert together.keys() == alone.keys()
        same = {name: value for name, value in alone.items() if not name.startswith(TIMING)}
        assert len(same) >= 10  # fewer where nobody wrote a token
        assert {name: together[name] for name in same} == pytest.approx(same, abs=1e-5)


@pytest.mark.parametrize(("layout", "part", "way"), WATCHED)
def test_they_know_how_far_they_are_from_their_start(
    runs: Runs, layout: str, part: str, way: str
) -> None:
    first, *_, last = runs(layout, part)[way]["logged"]
    assert first["val/add-2/kl"] == pytest.approx(0, abs=1e-6) or part == "watched"
    assert last["val/add-2/kl"] > 1e-5
    assert last["val/rolling/score"] != first["val/rolling/score"]
    deltas = [last[f"retention/delta/{name}"] for name in ("add-2", "rolling", "writing")]
    assert last["retention/worst"] == min(deltas)
    assert deltas[0] != 0


@pytest.mark.slow
@pytest.mark.vllm
@pytest.mark.parametrize("layout", ["ddp", "fsdp2"])
def test_every_rank_has_a_vllm_of_its_own(runs: Runs, layout: str) -> None:
    """In its own process: it writes what one would, by weights that arrived."""
    test_many_are_one(runs, layout, "vllm", "vllm")
    found = runs(layout, "vllm")["vllm"]
    assert all(version == step for step, _, _, version in found["rollouts"])
    assert set(found["proved"]) >= set(found["weights"][0])  # and a head that is tied


@pytest.mark.slow
@pytest.mark.vllm
@pytest.mark.parametrize("layout", ["fsdp2", "hsdp"])
def test_an_exported_folder_of_shards_is_one_model_to_transformers_and_vllm(
    runs: Runs, layout: str
) -> None:
    runs(layout, "shards")
    student = Student(str(runs.folder / "lab" / "arithmetic" / "student"))
    load_student(student, str(runs.folder / f"{layout}-shards"))
    folder = runs.folder / f"{layout}-exported"
    write_hf_folder(student, folder)
    ids = student.source.tokenizer("12+34=").input_ids
    requests, sampling = [Request(ids, seed) for seed in range(4)], Sampling(max_new_tokens=16)
    engine = VLLMEngine(max_num_seqs=4)
    engine.start(ModelSource(str(folder)), max_length=64)
    try:
        completions = engine.generate(requests, sampling)
    finally:
        engine.close()
    model = load_causal_lm(ModelSource(str(folder)), dtype="float32")
    for completion in completions:
        written = completion.response_ids
        with torch.no_grad():
            logits = model(torch.tensor([ids + written])).logits[0, len(ids) - 1 : -1]
        expected = logits.log_softmax(-1).gather(1, torch.tensor(written)[:, None])[:, 0]
        torch.testing.assert_close(torch.tensor(completion.logprobs), expected, atol=1e-4, rtol=0)


@pytest.mark.parametrize(("layout", "part"), CORE)
def test_micro_batches_without_a_token_take_part(runs: Runs, layout: str, part: str) -> None:
    """Those of all ranks but the first, and the second of the first's, in two steps."""
    assert runs("one", part)["few"]["empty"] == 0
    micro_batches = 1 if layout.endswith("1") else 2
    others = 3 if layout == "hsdp" else 1
    assert runs(layout, part)["few"]["empty"] == 2 * (others * micro_batches + micro_batches - 1)


@pytest.mark.parametrize(("layout", "part"), [of("one", "core"), *CORE])
def test_a_budget_gives_all_ranks_equally_many_micro_batches(
    runs: Runs, layout: str, part: str
) -> None:
    found = runs(layout, part)["budget"]
    assert len(found["parts"]) == 2  # as many as steps
    assert min(found["parts"]) > 2
    assert (found["fillers"] > 0) is (layout != "one")


@pytest.mark.slow
@pytest.mark.parametrize("way", ways(1)["bfloat16"])
@pytest.mark.parametrize("layout", SHARDED)
def test_layers_are_gathered_in_bfloat16_under_autocast(runs: Runs, layout: str, way: str) -> None:
    """Not to the bit: norms' weights are rounded too, and what a bare base is read with."""
    one, many = runs("one", "bfloat16")[way], runs(layout, "bfloat16")[way]
    assert set(many["dtypes"]) == {"torch.bfloat16"}
    assert {weight.dtype for weight in many["weights"][1].values()} == {torch.float32}
    assert many["logged"][0]["loss"] == pytest.approx(one["logged"][0]["loss"], rel=1e-2)
    largest = float(max(g.abs().max() for g in one["gradients"][0].values()))
    for name, gradient in one["gradients"][0].items():
        torch.testing.assert_close(
            many["gradients"][0][name], gradient, atol=2e-2 * largest, rtol=0
        )


CHECKPOINTS = [of(layout, kind) for layout in ("fsdp2", "hsdp") for kind in SAVED_AS]


@pytest.mark.parametrize(("layout", "kind"), CHECKPOINTS)
def test_resume_continues_bit_for_bit_with_an_ema_teacher(
    runs: Runs, layout: str, kind: str
) -> None:
    found = runs(layout, kind)
    unbroken, second = found["unbroken"], found["second"]
    assert len(unbroken["gradients"]) == 3
    torch.testing.assert_close(second["gradients"], unbroken["gradients"][2:], atol=0, rtol=0)
    torch.testing.assert_close(second["weights"][1], unbroken["weights"][1], atol=0, rtol=0)


@pytest.mark.parametrize(("layout", "kind"), CHECKPOINTS)
def test_a_checkpoint_of_shards_is_exported(runs: Runs, layout: str, kind: str) -> None:
    expected = runs(layout, kind)["first"]["weights"][1]
    student = Student(str(runs.folder / "lab" / "arithmetic" / "student"))
    assert load_student(student, str(runs.folder / f"{layout}-{kind}")).step == 2
    torch.testing.assert_close(dict(student.weights()), expected, atol=0, rtol=0)


def test_shards_of_another_student_are_refused(runs: Runs) -> None:
    runs("fsdp2", "shards")
    student = Student(str(runs.folder / "lab" / "arithmetic" / "teacher"))
    with pytest.raises(UserError, match="is not of the student in this config"):
        load_student(student, str(runs.folder / "fsdp2-shards"))
    with pytest.raises(UserError, match=r"is damaged or no checkpoint: .* is missing"):
        load_student(student, str(runs.folder))


@pytest.mark.slow
@pytest.mark.parametrize("strategy", ["fsdp2", "hsdp"])
def test_the_overlay_trains_validates_and_exports(runs: Runs, strategy: str) -> None:
    run = f"runs/{strategy}"
    overlay = ("lab/opd.yaml", f"strategy/{strategy}.yaml")
    configs = [word for name in overlay for word in ("--config", str(CONFIGS / name))]
    shorter = [
        "--trainer.max_steps=2",
        "--trainer.val_check_interval=2",
        f"--trainer.logger.init_args.save_dir={run}",
        "--trainer.enable_progress_bar=false",
        "--data.prompts_per_step=8",
        "--data.sampling.max_new_tokens=10",
    ]
    if strategy == "hsdp":  # all on this machine
        shorter += ["--trainer.num_nodes=1", "--trainer.devices=4"]
        shorter += ["--trainer.strategy.init_args.shard_size=2"]
    saved = ["--config", f"{run}/config.yaml", "--ckpt_path", f"{run}/checkpoints/last.ckpt"]
    for command in (
        ["fit", *configs, *shorter],
        ["validate", *saved],
        ["export", *saved, "--out", f"{strategy}-student"],
    ):
        processes.run("opd_lightning", *command, cwd=runs.folder, check=True, timeout=200)
    assert (runs.folder / f"{strategy}-student" / "model.safetensors").is_file()
