"""A teacher behind servers fills a cache; reading it needs neither the servers nor the weights."""

from pathlib import Path

import pytest
import torch

from opd_lightning.commands.cache_teacher import fill
from opd_lightning.models.student import Student
from opd_lightning.teachers import CachedTeacher, FrozenTeacher, RecordedQuestion, RemoteTeacher
from tests.batches import make_batch, make_rollout
from tests.servers import RunningServer

pytestmark = [pytest.mark.vllm, pytest.mark.usefixtures("in_lab")]

CPU = torch.device("cpu")
TEACHER = "lab/arithmetic/teacher"
NOWHERE = "http://127.0.0.1:1"


def test_what_servers_said_is_read_without_them(
    teacher_server: RunningServer, tmp_path: Path
) -> None:
    batch = make_batch(
        [make_rollout([3 + n, 7, 5 + n, 1][: n % 4 + 1], prompt_ids=[9 + n]) for n in range(40)],
        temperature=1.0,
    )
    filling, reading = (
        CachedTeacher(
            str(tmp_path / "cache"),
            RemoteTeacher(TEACHER, [url], str(teacher_server.key_file), patience=9),
        )
        for url in (teacher_server.url, NOWHERE)
    )
    filling.collect_unknown()
    for teacher in (filling, reading):
        teacher.check([], 1.0)
        assert teacher.source is not None
        assert teacher.source.context_length > 0
        for rollout in batch.rollouts:
            question = RecordedQuestion(rollout.prompt, rollout.prompt_ids, rollout.response_ids, 5)
            teacher.check_question(question)
        if teacher is filling:  # in more rounds than one
            fill(filling, student=Student(TEACHER), device=CPU, batch_tokens=8)
    local = FrozenTeacher(TEACHER)
    local.load(CPU, Student(TEACHER))
    theirs, ours = (t.score(batch, "student", top_k=5) for t in (local, reading))
    torch.testing.assert_close(ours.logprobs, theirs.logprobs, atol=1e-4, rtol=0)
    assert torch.equal(ours.top_ids, theirs.top_ids)
    assert torch.equal(ours.entropy.isnan(), batch.response_mask)
    assert (tmp_path / "cache").exists()
    # The same weights in this process may go on with it.
    same = CachedTeacher(str(tmp_path / "cache"), local)
    same.check([], 1.0)
