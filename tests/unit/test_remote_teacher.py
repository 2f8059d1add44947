"""Asking by id, which takes vLLM on a GPU: a stand-in that reads and writes vLLM's own types."""

from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from opd_lightning.errors import UserError
from opd_lightning.lab.models import new_model
from opd_lightning.models.identity import model_identity
from opd_lightning.teachers import FrozenTeacher, RemoteTeacher
from opd_lightning.types import RolloutBatch
from tests.batches import make_batch, make_rollout
from tests.http_server import Server

pytestmark = pytest.mark.vllm

CPU = torch.device("cpu")
NOBODY: Any = SimpleNamespace(sharding=None)  # the student, which no teacher here reads
LENGTH = 32


class StandIn:
    """Answers as vLLM's two model runners do, from a Hugging Face model in this process."""

    def __init__(self, folder: Path, by_id: bool) -> None:
        self.teacher = FrozenTeacher(str(folder))
        self.teacher.load(CPU, NOBODY)
        self.name = model_identity(str(folder))
        self.by_id = by_id
        self.sizes: list[tuple[int, ...]] = []  # of the matrices that it was asked for
        self.forgets = 0  # of the next answers, their matrix
        self.server = Server(self.answer)

    def answer(self, body: dict[str, Any]) -> tuple[int, Any]:
        from vllm.entrypoints.scale_out.token_in_token_out.protocol import (
            GenerateRequest,
            GenerateTokensChoice,
            GenerateTokensResponse,
        )
        from vllm.utils.serial_utils import numpy2base64

        if body["path"] == "/v1/models":
            return 200, {"data": [{"id": self.name, "max_model_len": LENGTH}]}
        if max(body["token_ids"]) >= 64:
            return 400, {"error": {"message": "token_ids: got a token id that is too large"}}
        request = GenerateRequest(**{k: body[k] for k in ("model", "token_ids", "sampling_params")})
        wanted = request.sampling_params
        limits = SimpleNamespace(max_logprobs=64, get_vocab_size=lambda: 64, max_model_len=LENGTH)
        wanted._validate_logprobs(limits)
        logprobs = self.logprobs(request.token_ids)
        matrix, ids = None, wanted.prompt_logprob_token_ids
        if ids is not None:
            if not self.by_id:
                return 400, {"error": {"message": "requires the V2 model runner"}}
            assert len(ids) == len(request.token_ids) - 1 - wanted.prompt_logprob_start
            rows = logprobs[wanted.prompt_logprob_start :]
            matrix = numpy2base64(rows.gather(1, torch.tensor(ids).long()).numpy())
            self.sizes.append(ids.shape)
            if self.forgets:
                self.forgets, matrix = self.forgets - 1, None
        response = GenerateTokensResponse(
            choices=[GenerateTokensChoice(index=0, token_ids=[0])],
            prompt_logprobs=self.by_rank(request.token_ids, logprobs, wanted.prompt_logprobs),
            prompt_token_id_logprobs=matrix,
        )
        return 200, response.model_dump(mode="json")

    @torch.no_grad()
    def logprobs(self, ids: list[int]) -> Tensor:
        """`[prompt - 1, V]` of the tokens after the first."""
        logits = self.teacher.model()(torch.tensor([ids])).logits[0, :-1]
        return torch.log_softmax(logits, dim=-1)

    def by_rank(self, ids: list[int], logprobs: Tensor, k: int | None) -> list[Any] | None:
        from vllm.logprobs import Logprob

        if k is None:
            return None
        told: list[Any] = [None]
        for token, row in zip(ids[1:], logprobs, strict=True):
            own = {token: Logprob(float(row[token]), int((row > row[token]).sum()) + 1)}
            best = row.topk(64 if k == -1 else k)
            top = zip(best.indices.tolist(), best.values.tolist(), strict=True)
            told.append(own | {t: Logprob(x, rank) for rank, (t, x) in enumerate(top, start=1)})
        return told


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    pytest.importorskip("vllm")
    path = tmp_path_factory.mktemp("model")
    new_model(path, layers=1, hidden_size=32, seed=0)
    return path


@pytest.fixture(params=[True, False], ids=["by id", "by rank"])
def stand_in(folder: Path, request: pytest.FixtureRequest) -> Iterator[StandIn]:
    made = StandIn(folder, by_id=request.param)
    yield made
    made.server.stop()


@pytest.fixture
def remote(folder: Path, stand_in: StandIn) -> Iterator[RemoteTeacher]:
    teacher = RemoteTeacher(str(folder), [stand_in.server.url])
    teacher.check([], temperature=1.0)
    teacher.load(CPU, NOBODY)
    stand_in.sizes.clear()
    yield teacher
    teacher.close()


def batch() -> RolloutBatch:
    return make_batch(
        [
            make_rollout([7, 8, 1], prompt_ids=[9, 10]),
            make_rollout([11, 1], prompt_ids=[12], dropped=True),
            make_rollout([13, 14, 15, 1], prompt_ids=[9]),
        ],
        temperature=1.0,
    )


@pytest.mark.parametrize("top_k", [0, 5])
def test_sampled_tokens(remote: RemoteTeacher, stand_in: StandIn, top_k: int) -> None:
    theirs = remote.score(batch(), "student", top_k=top_k)
    ours = stand_in.teacher.score(batch(), "student", top_k=top_k)
    torch.testing.assert_close(theirs.logprobs, ours.logprobs, atol=1e-5, rtol=0)
    assert torch.equal(theirs.top_ids, ours.top_ids)
    # A matrix if it has all requested log-probs; the prompt is not returned.
    assert sorted(stand_in.sizes) == ([(3, 1), (4, 1)] if stand_in.by_id and not top_k else [])


@pytest.mark.parametrize("top_k", [0, 5])
def test_padding_of_a_larger_head_is_impossible(
    remote: RemoteTeacher, stand_in: StandIn, top_k: int
) -> None:
    rows = [make_rollout(ids, prompt_ids=[9]) for ids in ([7, 67, 8, 1], [11, 1])]
    asked = make_batch(rows, temperature=1.0)
    theirs = remote.score(asked, "student", top_k=top_k)
    ours = stand_in.teacher.score(asked, "student", top_k=top_k)
    assert theirs.logprobs[0, 1] == -torch.inf
    torch.testing.assert_close(theirs.logprobs, ours.logprobs, atol=1e-5, rtol=0)
    assert torch.equal(theirs.top_ids, ours.top_ids)


@pytest.mark.parametrize("top_k", [0, 5])
def test_given_tokens(remote: RemoteTeacher, stand_in: StandIn, top_k: int) -> None:
    ids = torch.randint(0, 64, (7, 6), generator=torch.Generator().manual_seed(0))
    scores, known = remote.score_top(batch(), "student", top_k=top_k, ids=ids)
    sequences = ([9, 10, 7, 8, 1], 3), ([9, 13, 14, 15, 1], 4)
    expected = torch.cat([stand_in.logprobs(sequence)[-n:] for sequence, n in sequences])
    torch.testing.assert_close(known.logprobs, expected.gather(1, ids), atol=1e-5, rtol=0)
    ours = stand_in.teacher.score(batch(), "student", top_k=top_k)
    torch.testing.assert_close(scores.logprobs, ours.logprobs, atol=1e-5, rtol=0)
    assert torch.equal(scores.top_ids, ours.top_ids)
    assert sorted(stand_in.sizes) == ([(3, 7), (4, 7)] if stand_in.by_id else [])


@pytest.mark.parametrize("stand_in", [False], indirect=True, ids=["by rank"])
def test_a_large_vocabulary_is_not_sent_by_rank(
    remote: RemoteTeacher, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("opd_lightning.teachers.remote.WHOLE_VOCABULARY", 63)
    ids = torch.zeros(7, 1, dtype=torch.int64)
    with pytest.raises(UserError, match="support to 'teacher'"):
        remote.score_top(batch(), "student", top_k=0, ids=ids)


def test_the_server_must_have_room_for_one_more(remote: RemoteTeacher) -> None:
    assert remote.source.context_length == LENGTH - 1


@pytest.mark.parametrize("stand_in", [True], indirect=True, ids=["by id"])
def test_an_answer_without_its_matrix_is_asked_for_again(
    remote: RemoteTeacher, stand_in: StandIn, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(stand_in, "forgets", 1)
    theirs = remote.score(batch(), "student")
    ours = stand_in.teacher.score(batch(), "student")
    torch.testing.assert_close(theirs.logprobs, ours.logprobs, atol=1e-5, rtol=0)
    assert len(stand_in.sizes) == 3
