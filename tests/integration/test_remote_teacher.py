"""A teacher behind a real vLLM server scores as in this process; its server may be lost."""

import threading
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import Tensor

from opd_lightning.cli import main
from opd_lightning.errors import UserError
from opd_lightning.losses.top_k import TopK
from opd_lightning.methods import OPD, DistillationModule, DivergenceOPD
from opd_lightning.models.student import Student
from opd_lightning.rules import TrajectoryGate
from opd_lightning.teachers import FrozenTeacher, RemoteTeacher, Teacher
from opd_lightning.types import RolloutBatch
from tests.batches import make_batch, make_rollout
from tests.integration.test_fit import CONFIG, Recorder, fit
from tests.servers import RunningServer

pytestmark = [pytest.mark.vllm, pytest.mark.usefixtures("in_lab")]

CPU = torch.device("cpu")
TEACHER = "lab/arithmetic/teacher"
REMOTE = str(Path(CONFIG).parents[1] / "teacher" / "remote.yaml")
MAX_LENGTH = 200


@pytest.fixture
def remote(teacher_server: RunningServer) -> Iterator[RemoteTeacher]:
    teacher = RemoteTeacher(
        TEACHER, [str(teacher_server.address_file)], str(teacher_server.key_file)
    )
    yield teacher
    teacher.close()


@pytest.fixture(scope="module")
def local(untrained_lab: Path) -> FrozenTeacher:
    teacher = FrozenTeacher(str(untrained_lab / TEACHER))
    teacher.load(CPU, Student(str(untrained_lab / TEACHER)))
    return teacher


NOBODY: Any = None  # the student, which neither teacher reads


def ragged() -> RolloutBatch:
    generator = torch.Generator().manual_seed(0)

    def ids(count: int) -> list[int]:
        return torch.randint(2, 64, (count,), generator=generator).tolist()

    return make_batch(
        [
            make_rollout(ids(3), prompt_ids=ids(5), views={"other": ids(9)}),
            make_rollout(ids(40), prompt_ids=ids(2), views={"other": None}, truncated=True),
            make_rollout(ids(8), prompt_ids=ids(4), views={"other": ids(4)}, dropped=True),
            make_rollout(ids(1), prompt_ids=ids(1), views={"other": ids(1)}),
            make_rollout(ids(50), prompt_ids=ids(149), views={"other": ids(70)}),  # in chunks
        ],
        temperature=1.0,
    )


@pytest.mark.parametrize("top_k", [0, 5, 100])
@pytest.mark.parametrize("view", ["student", "other"])
def test_scores_are_the_local_ones(
    remote: RemoteTeacher, local: FrozenTeacher, view: str, top_k: int
) -> None:
    batch = ragged()
    remote.load(CPU, NOBODY)
    theirs, ours = (t.score(batch, view, top_k=top_k) for t in (remote, local))
    torch.testing.assert_close(theirs.logprobs, ours.logprobs, atol=1e-4, rtol=0)
    assert torch.equal(theirs.top_ids, ours.top_ids)
    assert torch.equal(theirs.entropy.isnan(), batch.response_mask)


def full_logprobs(local: FrozenTeacher, batch: RolloutBatch) -> Tensor:
    """The local teacher's `[N, V]`."""
    states = local.states(batch, "student")
    return states.head.finish(states.head.project(states.hidden)).log_softmax(-1)


def test_its_own_likeliest_tokens(remote: RemoteTeacher, local: FrozenTeacher) -> None:
    batch = ragged()
    remote.load(CPU, NOBODY)
    scores, known = remote.score_top(batch, "student", top_k=6)
    expected = full_logprobs(local, batch)
    assert torch.equal(known.ids, expected.topk(6).indices)
    assert torch.equal(scores.top_ids[batch.response_mask], known.ids)
    torch.testing.assert_close(known.logprobs, expected.topk(6).values, atol=1e-4, rtol=0)


def test_tokens_that_are_named(remote: RemoteTeacher, local: FrozenTeacher) -> None:
    batch = ragged()
    remote.load(CPU, NOBODY)
    student = Student("lab/arithmetic/student")
    student.load()
    ids = student(batch, top_k=7).student.top_ids
    scores, known = remote.score_top(batch, "student", top_k=3, ids=ids)
    expected = full_logprobs(local, batch)
    assert torch.equal(known.ids, ids)
    torch.testing.assert_close(known.logprobs, expected.gather(1, ids), atol=1e-4, rtol=0)
    assert torch.equal(scores.top_ids[batch.response_mask], expected.topk(3).indices)
    torch.testing.assert_close(
        scores.logprobs, local.score(batch, "student").logprobs, atol=1e-4, rtol=0
    )


def test_nothing_to_score(remote: RemoteTeacher) -> None:
    batch = make_batch([make_rollout([5, 6], dropped=True)], temperature=1.0)
    remote.load(CPU, NOBODY)
    assert not remote.score(batch, "student", top_k=2).logprobs.any()


def test_what_is_expected_is_asked_once_and_forgotten(
    remote: RemoteTeacher, monkeypatch: pytest.MonkeyPatch
) -> None:
    batch = ragged()
    remote.load(CPU, NOBODY)
    sent = count_requests(remote, monkeypatch)
    remote.prefetch(batch, "student", top_k=2)
    assert len(sent) == 4  # the dropped one has nothing to score
    before = remote.score(batch, "student", top_k=2)
    rows = [3, 4]
    part = remote.score(batch.select(rows), "student", top_k=2)
    assert torch.equal(part.logprobs, before.logprobs[rows])
    assert len(sent) == 4
    remote.release()
    remote.score(batch, "student", top_k=2)
    assert len(sent) == 8


def count_requests(remote: RemoteTeacher, monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """A list that every request sent from now on is added to."""
    sent: list[Any] = []
    submit = remote.servers.submit

    def counted(path: str, bodies: Any, *more: Any) -> Any:
        sent.extend(bodies)
        return submit(path, bodies, *more)

    monkeypatch.setattr(remote.servers, "submit", counted)
    return sent


# Training ------------------------------------------------------------------------------


def method(kind: type[OPD | DivergenceOPD], teacher: Teacher, **more: Any) -> DistillationModule:
    student = Student("lab/arithmetic/student")
    return kind(
        student,
        teacher=teacher,
        optimizer=lambda p: torch.optim.AdamW(p, lr=1e-2),
        max_logprob_gap=1e-4,
        **more,
    )


TOP_K: dict[str, Any] = {"k": 5, "normalise": "tail"}


@pytest.mark.parametrize(
    ("kind", "more"),
    [
        pytest.param(OPD, {}, id="sampled"),
        pytest.param(OPD, {"overlap_top_k": 0}, id="sampled, no overlap", marks=pytest.mark.slow),
        pytest.param(
            DivergenceOPD, {"divergence": TopK(support="teacher", **TOP_K)}, id="teacher's top k"
        ),
        pytest.param(
            DivergenceOPD,
            {"divergence": TopK(support="student", **TOP_K)},
            id="student's top k",
            marks=pytest.mark.slow,
        ),
        pytest.param(
            DivergenceOPD,
            {
                "divergence": TopK(support="student", **TOP_K),
                "rules": [TrajectoryGate()],
                "aggregation": "mask-mean",
            },
            id="student's top k, looking at the whole step",
        ),
    ],
)
def test_losses_and_gradients_are_the_local_ones(
    remote: RemoteTeacher, kind: Any, more: dict[str, Any]
) -> None:
    def train(teacher: Teacher) -> Recorder:
        return fit(method(kind, teacher, **more), steps=2, micro_batches=2)

    theirs, ours = train(remote), train(FrozenTeacher(TEACHER))
    for one, other in zip(theirs.logged, ours.logged, strict=True):
        assert one["loss"] == pytest.approx(other["loss"], abs=1e-4)
        assert one["optim/gradient_norm"] > 1e-3
    # Of the same weights: Adam makes the second step's weights differ where gradients are noise.
    for name, gradient in theirs.gradients[0].items():
        torch.testing.assert_close(gradient, ours.gradients[0][name], atol=1e-4, rtol=0)


def test_all_of_a_step_is_sent_before_it_is_trained_on(
    remote: RemoteTeacher, monkeypatch: pytest.MonkeyPatch
) -> None:
    divergence = TopK(support="teacher", **TOP_K)
    trained = method(DivergenceOPD, remote, divergence=divergence, overlap_top_k=2)
    sent = count_requests(remote, monkeypatch)
    seen: list[int] = []
    loss = trained.loss

    def noted(batch: RolloutBatch) -> Tensor:
        seen.append(len(sent))
        return loss(batch)

    monkeypatch.setattr(trained, "loss", noted)
    fit(trained, steps=2, micro_batches=2)
    assert seen == [8, 8, 16, 16]
    assert len(sent) == 16


# Mistakes ------------------------------------------------------------------------------


def fails(capsys: pytest.CaptureFixture[str], code: int, *changes: str) -> str:
    """`opd fit` on the lab ends with this code and one line, which is given back."""
    arguments = ["--config", CONFIG, "--config", REMOTE, "--trainer.logger=false", *changes]
    with pytest.raises(SystemExit) as ended:
        main(["fit", *arguments])
    assert ended.value.code == code
    told = capsys.readouterr().err
    assert "Traceback" not in told
    (line,) = [x for x in told.splitlines() if x.startswith("opd: error:")]
    return line


def at(server: RunningServer, key_file: Path | None = None) -> tuple[str, ...]:
    teacher = "--model.init_args.teacher.init_args"
    key_file = key_file or server.key_file
    return f"{teacher}.servers=[{server.url}]", f"{teacher}.key_file={key_file}"


@pytest.fixture
def no_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*args: object, **kwargs: object) -> None:
        raise AssertionError("weights were loaded before the mistake was found")

    monkeypatch.setattr("opd_lightning.models.student.load_causal_lm", refuse)


@pytest.mark.usefixtures("no_weights")
def test_another_model_is_refused(teacher_server: RunningServer, capsys: Any) -> None:
    other = "--model.init_args.teacher.init_args.path=lab/arithmetic/student"
    line = fails(capsys, 2, *at(teacher_server), other)
    assert line.count("opd-") == 2
    assert teacher_server.url in line


@pytest.mark.usefixtures("no_weights")
def test_a_wrong_key_is_refused(teacher_server: RunningServer, tmp_path: Path, capsys: Any) -> None:
    key_file = tmp_path / "key"
    key_file.touch(mode=0o600)
    key_file.write_text("guessed")
    line = fails(capsys, 2, *at(teacher_server, key_file))
    assert "answered 401" in line
    assert "guessed" not in line


@pytest.mark.usefixtures("no_weights")
def test_another_temperature_is_refused(teacher_server: RunningServer, capsys: Any) -> None:
    line = fails(capsys, 2, *at(teacher_server), "--data.sampling.temperature=0.7")
    assert "temperature" in line


@pytest.mark.usefixtures("no_weights")
def test_too_long_for_the_server_is_refused(teacher_server: RunningServer, capsys: Any) -> None:
    line = fails(capsys, 2, *at(teacher_server), "--data.sampling.max_new_tokens=195")
    assert f"the teacher's context of {MAX_LENGTH - 1}" in line


def test_a_server_of_somebody_else_s(teacher_server: RunningServer) -> None:
    teacher = RemoteTeacher(
        TEACHER,
        [teacher_server.url],
        str(teacher_server.key_file),
        served_model="their-name",
    )
    with pytest.raises(UserError, match="expected their-name"):
        teacher.check([], 1.0)
    teacher.close()


# Losses of servers; they come last, since the next test would have to start it again --------


def losses(run: Path, server: RunningServer) -> list[float]:
    arguments = [
        *("--config", CONFIG, "--config", REMOTE, *at(server)),
        f"--model.init_args.teacher.init_args.servers=[{server.address_file}]",
        *("--trainer.max_steps=4", "--trainer.val_check_interval=1000"),
        *("--trainer.accumulate_grad_batches=2", "--trainer.enable_progress_bar=false"),
        *("--data.prompts_per_step=8", "--data.sampling.max_new_tokens=10"),
        *(f"--trainer.logger.init_args.save_dir={run}", "--trainer.limit_val_batches=0"),
    ]
    main(["fit", *arguments])
    events = EventAccumulator(str(run))
    events.Reload()
    return [event.value for event in events.Scalars("loss")]


def after_requests(monkeypatch: pytest.MonkeyPatch, step: int, act: Any) -> None:
    """Call `act` once, when the requests of a step have been sent and none was waited for."""
    prefetch = RemoteTeacher.prefetch
    seen: set[int] = set()

    def prefetch_and_act(self: Any, batch: RolloutBatch, view: str, *, top_k: int = 0) -> None:
        prefetch(self, batch, view, top_k=top_k)
        if batch.totals.step == step and not seen:
            seen.add(step)
            act()

    monkeypatch.setattr(RemoteTeacher, "prefetch", prefetch_and_act)


@pytest.mark.slow
@pytest.mark.parametrize("elsewhere", [False, True])
def test_a_lost_server_is_waited_for(
    elsewhere: bool,
    teacher_server: RunningServer,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: Any,
) -> None:
    undisturbed, before = losses(tmp_path / "undisturbed", teacher_server), teacher_server.url

    def lose() -> None:
        teacher_server.kill()
        threading.Timer(1.0, partial(teacher_server.restart, elsewhere=elsewhere)).start()

    after_requests(monkeypatch, 2, lose)
    disturbed = losses(tmp_path / "disturbed", teacher_server)
    assert "answers again" in caplog.text
    assert (teacher_server.url != before) is elsewhere
    # What is computed beside a sequence moves its last bits, in any vLLM.
    assert disturbed == pytest.approx(undisturbed, abs=2e-6)
    assert len(set(undisturbed)) == 4


@pytest.mark.slow  # starts the server again
def test_a_server_that_stays_away_ends_the_run(
    teacher_server: RunningServer, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    after_requests(monkeypatch, 1, teacher_server.kill)
    line = fails(
        capsys,
        1,
        *(*at(teacher_server), "--trainer.limit_val_batches=0", "--data.prompts_per_step=8"),
        *("--data.sampling.max_new_tokens=10", "--trainer.enable_progress_bar=false"),
        "--model.init_args.teacher.init_args.patience=1.5",
        "--trainer.callbacks=[]",
    )
    assert teacher_server.url in line
    assert "for 1.5 s" in line
