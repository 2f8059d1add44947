"""Views: templates, placement, and that nothing privileged reaches the student's loss."""

import logging
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
from transformers import AutoTokenizer

from opd_lightning.data.collate import collate
from opd_lightning.data.mix import RolloutMix
from opd_lightning.data.views import PromptView, Renderer, ResponseFacts
from opd_lightning.data.writer import RolloutWriter, Row
from opd_lightning.errors import UserError
from opd_lightning.losses.advantage import group_advantage
from opd_lightning.methods import DivergenceOPD
from opd_lightning.models.student import Student
from opd_lightning.rollouts.base import Sampling
from opd_lightning.run.datamodule import RolloutDataModule
from opd_lightning.teachers import FrozenTeacher
from opd_lightning.timing import StepTimer
from opd_lightning.types import Author, Prompt, Rollout, StepTotals, StopReason, Totals
from opd_lightning.verifiers.base import Verifier
from tests.batches import make_batch, make_rollout
from tests.conftest import TinyModelDir
from tests.tokenizers import KINDS, wrapped
from tests.unit.test_stream import FakeEngine

PROMPT = Prompt(
    id="p",
    messages=({"role": "user", "content": "who?"},),
    privileged="zzz",
    response="me",
    answer="7",
    origin="f:1",
)
SYSTEM: dict[str, str] = {"role": "system", "content": "be good"}


def contents(view: PromptView, prompt: Prompt = PROMPT, **late: Any) -> list[tuple[str, str]]:
    messages = view.messages(prompt, ResponseFacts(**late))
    assert messages is not None
    return [(m["role"], m["content"]) for m in messages]


def test_system_view_is_a_first_message() -> None:
    assert contents(PromptView()) == [("system", "zzz"), ("user", "who?")]


def test_system_view_follows_a_system_message_that_is_there() -> None:
    prompt = Prompt(id="q", messages=(SYSTEM, *PROMPT.messages), privileged="zzz")  # type: ignore[arg-type]
    assert contents(PromptView(), prompt) == [("system", "be good\n\nzzz"), ("user", "who?")]


def test_user_view_replaces_the_last_user_message() -> None:
    view = PromptView(
        template="{{ privileged }} {{ question }} {{ response }}{{ answer }}", place="user"
    )
    assert contents(view) == [("user", "zzz who? me7")]


def test_an_empty_text_leaves_the_prompt_alone() -> None:
    for place in ("system", "user"):
        assert contents(PromptView(template=" ", place=place)) == [("user", "who?")]


def test_late_views_need_what_is_late() -> None:
    view = PromptView(template="{% if peer %}see {{ peer }}{% endif %}")
    assert view.messages(PROMPT) is None
    for peer in ("<think>hm</think>\nx", "hm</think>\nx", "x<think>hm"):
        assert contents(view, peer=peer)[0] == ("system", "see x")
    assert view.messages(PROMPT, ResponseFacts(peer="<think>hm")) is None


def test_a_view_shows_the_attempt_and_its_reward() -> None:
    """The attempt is always known; a reward of 0 is, and a missing one leaves no view."""
    told = PromptView(template="{{ attempt }}: {{ 'right' if reward >= 0.5 else 'wrong' }}")
    assert contents(told, attempt="x", reward=0.0)[0] == ("system", "x: wrong")
    assert contents(told, attempt="x", reward=1.0)[0] == ("system", "x: right")
    assert told.messages(PROMPT, ResponseFacts(attempt="x")) is None
    alone = PromptView(template="again: {{ attempt }}")
    assert contents(alone, attempt="<think>a</think>b")[0][1] == "again: <think>a</think>b"
    assert (told.late_responses, alone.late_responses, PromptView().late_responses) == (1, 1, 0)


def test_late_texts_are_cut() -> None:
    view = PromptView(template="{{ peer }}|{{ feedback }}|{{ question }}", late_characters=3)
    assert contents(view, peer="<think>long</think>abcd", feedback="12345")[0][1] == "abc|123|who?"
    with pytest.raises(UserError, match="late_characters"):
        PromptView(late_characters=0)


def test_templates_are_checked_when_they_are_written() -> None:
    with pytest.raises(UserError, match="reads 'privilege', expected one of answer"):
        PromptView(template="{{ privilege }}")
    with pytest.raises(UserError, match="no Jinja template"):
        PromptView(template="{% if %}")


def test_templates_are_sandboxed() -> None:
    view = PromptView(template="{{ question.__class__.__mro__ }}")
    with pytest.raises(UserError, match=r"cannot be rendered: .*unsafe"):
        view.messages(PROMPT)


def test_a_row_without_the_column_is_named() -> None:
    with pytest.raises(UserError, match=r"f:1: no 'privileged', which a view's template reads"):
        PromptView().messages(Prompt(id="q", messages=PROMPT.messages, origin="f:1"))


@pytest.fixture(scope="module")
def tokenizer(tiny_model_dir: Any) -> Any:
    folder: Path = tiny_model_dir()
    return AutoTokenizer.from_pretrained(folder)


class Lengths(Verifier):
    """Right where the decoded text has more than two characters."""

    def verify(self, prompts: Any, responses: Any) -> list[float]:
        return [float(len(text) > 2) for text in responses]


def written(
    tokenizer: Any, authors: list[Author], verifier: Verifier | None = None, **more: Any
) -> list[Rollout]:
    views = {
        "privileged": PromptView(),
        "peer": PromptView(template="see {{ peer }}"),
        "both": PromptView(template="{{ peer_failure }}/{{ attempt }}/{{ reward }}"),
    }
    renderer = Renderer(tokenizer, {}, views, (tokenizer.eos_token_id,))
    engine = FakeEngine()
    writer = RolloutWriter(
        dict.fromkeys(Author, engine),
        verifier or Lengths(),
        renderer,
        StepTimer(),
        **more,
    )
    ids = renderer.plain(PROMPT)
    rows = [Row(PROMPT, ids, 0, author, seed) for seed, author in enumerate(authors)]
    rollouts = writer.write(rows, dict.fromkeys(Author, Sampling()))
    sampled = [request.prompt_ids for request in engine.requests]
    for author, seen in zip([a for a in authors if a is not Author.RECORDED], sampled, strict=True):
        assert (seen == ids) is (author is not Author.GUIDED)
    return rollouts


def test_u10_no_privileged_token_at_loss_time(tokenizer: Any) -> None:
    rollouts = written(tokenizer, [Author.GUIDED, Author.STUDENT])
    letter = tokenizer.encode("z", add_special_tokens=False)[0]
    totals = StepTotals(step=0, written=Totals(1, 1), demonstrated=Totals(0, 0))
    batch = collate(rollouts, totals=totals, temperature=1.0, pad_id=0)
    assert not (batch.views["student"].input_ids == letter).any()
    assert (batch.views["privileged"].input_ids == letter).any(dim=1).all()
    for view in batch.views.values():  # the response ids are the sampled ones in every view
        for row, rollout in enumerate(rollouts):
            first = int(view.prompt_lengths[row])
            found = view.input_ids[row, first : first + len(rollout.response_ids)].tolist()
            assert found == rollout.response_ids
    assert batch.on_policy.tolist() == [False, True]


@pytest.mark.parametrize("seam", ["", " "])
@pytest.mark.parametrize("kind", KINDS)
def test_a_recorded_text_is_read_as_it_stands_behind_its_prompt(kind: str, seam: str) -> None:
    """Some tokenizers begin each text with a space, and some templates put one at the seam."""
    tokenizer = wrapped(KINDS[kind]()).tokenizer
    tokenizer.eos_token = tokenizer.convert_ids_to_tokens(1)
    tokenizer.chat_template = (
        "{% for m in messages %}{{ m.role }}:" + seam + "{{ m.content }}\n{% endfor %}"
        "{% if add_generation_prompt %}assistant:{% endif %}"
    )
    asked = Prompt(id="a", messages=PROMPT.messages, response="so on")
    renderer = Renderer(tokenizer, {}, {}, [1], reads_records=True)
    whole = tokenizer(f"user:{seam}who?\nassistant:{seam}so on", add_special_tokens=False)
    assert renderer.plain(asked) + renderer.recorded(asked) == [*whole["input_ids"], 1]
    told = Renderer(tokenizer, {}, {}, [1], reads_records=True)
    told.prepare([asked])
    assert told.recorded(asked) == renderer.recorded(asked)


def test_recorded_ids_are_taken_as_they_are(tokenizer: Any) -> None:
    eos = tokenizer.eos_token_id
    text = tokenizer.encode("me", add_special_tokens=False)
    # Ids that this tokenizer does not produce, with and without an end.
    whole, cut = [eos + 1, text[0], eos], [text[1], text[0]]
    renderer = Renderer(tokenizer, {}, {}, (eos,))
    writer = RolloutWriter({}, None, renderer, StepTimer())
    prompts = [PROMPT, *(replace(PROMPT, response_ids=tuple(ids)) for ids in (whole, cut))]
    rows = [Row(prompt, [5], i, Author.RECORDED, 0) for i, prompt in enumerate(prompts)]
    rollouts = writer.write(rows, {})
    assert [r.response_ids for r in rollouts] == [[*text, eos], whole, cut]
    ends = [StopReason.EOS, StopReason.EOS, StopReason.LENGTH]
    assert [r.stop_reason for r in rollouts] == ends


def test_peers_are_other_successes_of_the_students(tokenizer: Any) -> None:
    rollouts = written(tokenizer, [Author.TEACHER, *[Author.STUDENT] * 6])
    own = rollouts[1:]
    wins = [i for i, r in enumerate(rollouts) if r in own and r.reward >= 0.5]
    assert len(wins) > 1
    # Nor is the teacher's response, a failure, one of the group that rewards are relative to.
    mean = sum(r.reward for r in own) / 6
    assert [r.group_mean for r in rollouts] == pytest.approx([mean] * 7)
    assert rollouts[0].reward == 0
    for i, rollout in enumerate(rollouts):
        peer = next(j for j in wins if j != i)
        ids = tokenizer.apply_chat_template(
            [{"role": "system", "content": f"see {rollouts[peer].text}"}, *PROMPT.messages],
            add_generation_prompt=True,
            return_dict=False,
        )
        assert rollout.views["peer"] == ids
        fails = (r.text for j, r in enumerate(rollouts) if j and r.reward < 0.5 and j != i)
        text = f"{next(fails, None)}/{rollout.text}/{rollout.reward}"
        assert rollout.views["both"] == tokenizer.apply_chat_template(
            [{"role": "system", "content": text}, *PROMPT.messages],
            add_generation_prompt=True,
            return_dict=False,
        )


def test_half_of_the_score_makes_a_peer_and_no_demonstration(tokenizer: Any) -> None:
    class Half(Verifier):
        def verify(self, prompts: Any, responses: Any) -> list[float]:
            return [0.5] * len(responses)

    authors = [Author.STUDENT, Author.STUDENT, Author.TEACHER]
    rollouts = written(tokenizer, authors, Half(), only_correct=True)
    assert all(rollout.views["peer"] for rollout in rollouts)
    assert [rollout.dropped for rollout in rollouts] == [False, False, True]


class Verbose(Lengths):
    """Its feedback is longer than prompt and responses."""

    def feedback(self, prompts: Any, responses: Any) -> list[str | None]:
        return ["x" * 50 * i for i in range(len(responses))]


def test_a_late_view_that_exceeds_the_context_is_left_out(
    tokenizer: Any, caplog: pytest.LogCaptureFixture
) -> None:
    views = {"privileged": PromptView(), "told": PromptView(template="see {{ feedback }}")}
    plain = Renderer(tokenizer, {}, views, ())
    rows = [Row(PROMPT, plain.plain(PROMPT), 0, Author.STUDENT, seed) for seed in range(4)]

    def write(context: int | None) -> list[Rollout]:
        renderer = Renderer(tokenizer, {}, views, (tokenizer.eos_token_id,), context)
        writer = RolloutWriter({Author.STUDENT: FakeEngine()}, Verbose(), renderer, StepTimer())
        writer = writer.with_timer(StepTimer())  # as every prefetch does
        return writer.write(rows, dict.fromkeys(Author, Sampling()))

    unbounded = write(None)
    needed = [len(r.views["told"] or ()) + len(r.response_ids) for r in unbounded]
    assert needed == sorted(needed)
    assert not any(r.long_views for r in unbounded)
    # Other libraries raise the root logger's level.
    with caplog.at_level(logging.WARNING, logger="opd_lightning"):
        bounded = write(needed[2])
    assert [r.views["told"] is not None for r in bounded] == [False, True, True, False]
    assert [r.long_views for r in bounded] == [(), (), (), ("told",)]  # the first has no feedback
    assert all(r.views["privileged"] for r in bounded)  # checked before training
    (record,) = caplog.records
    length = len(unbounded[3].views["told"] or ())
    assert record.getMessage().startswith(f"f:1: view 'told' of {length} tokens")


def test_a_response_that_could_not_be_checked_has_no_reward(tokenizer: Any) -> None:
    class Fails(Verifier):
        def verify(self, prompts: Any, responses: Any) -> list[float]:
            return [1.0, float("nan"), 0.0, 1.0][: len(responses)]

    renderer = Renderer(tokenizer, {}, {}, (tokenizer.eos_token_id,))
    writer = RolloutWriter({Author.STUDENT: FakeEngine()}, Fails(), renderer, StepTimer())
    ids = renderer.plain(PROMPT)
    rows = [Row(PROMPT, ids, 0, Author.STUDENT, seed) for seed in range(4)]
    rollouts = writer.write(rows, dict.fromkeys(Author, Sampling()))
    assert [r.unverified for r in rollouts] == [False, True, False, False]
    assert all(r.group_mean == pytest.approx(2 / 3) for r in rollouts)
    batch = make_batch(rollouts)
    advantage = group_advantage(batch.rewards, batch.group_mean, batch.group_std)[:, 0]
    assert advantage[1] == 0
    assert advantage.sum().item() == pytest.approx(0, abs=1e-5)
    assert (advantage[[0, 3]] > 0).all()


def test_a_group_without_success_has_no_peer_view(tokenizer: Any) -> None:
    (alone,) = written(tokenizer, [Author.STUDENT])
    assert alone.views["peer"] is None
    batch = make_batch([alone])
    assert batch.views["peer"].available.tolist() == [False]
    assert alone.stop_reason is StopReason.EOS


def test_wrong_demonstrations_are_dropped_and_not_counted(tokenizer: Any) -> None:
    authors = [Author.TEACHER] * 8
    rollouts = written(tokenizer, authors, only_correct=True)
    assert {r.dropped for r in rollouts} == {True, False}
    assert all(r.dropped is (r.reward < 1) for r in rollouts)
    batch = make_batch(rollouts)
    kept = [r for r in rollouts if not r.dropped]
    assert batch.totals.demonstrated == (sum(len(r.response_ids) for r in kept), len(kept))
    assert batch.response_mask.any(dim=1).tolist() == [not r.dropped for r in rollouts]
    assert batch.totals.written == (0, 0)


def test_rows_without_a_view_show_the_students_prompt() -> None:
    rows = [
        make_rollout([7, 2], prompt_ids=[3, 4], views={"v": [5, 5, 5]}),
        make_rollout([8, 2], prompt_ids=[3, 9], views={"v": None}),
    ]
    view = make_batch(rows).views["v"]
    assert view.input_ids.tolist() == [[5, 5, 5, 7, 2], [3, 9, 8, 2, 0]]
    assert view.prompt_lengths.tolist() == [3, 2]
    assert view.available.tolist() == [True, False]


# Together ---------------------------------------------------------------------------------


def count_encodings(tokenizer: Any, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Return a list that grows with every call that encodes text."""
    calls: list[str] = []

    def counted(name: str) -> Any:
        call = getattr(type(tokenizer), name)

        def count(self: Any, *args: Any, **kwargs: Any) -> Any:
            calls.append(name)
            return call(self, *args, **kwargs)

        return count

    for name in ("__call__", "encode"):
        monkeypatch.setattr(type(tokenizer), name, counted(name))
    return calls


def prompts_of(*words: str) -> list[Prompt]:
    return [
        replace(PROMPT, id=word, messages=({"role": "user", "content": word},), response=word * 2)
        for word in words
    ]


VIEWS = {
    "privileged": PromptView(),
    "told": PromptView(template="see {{ feedback }}"),
    "answer": PromptView(template="{{ question }}={{ answer }}", place="user"),
}


def everything(renderer: Renderer, prompts: list[Prompt]) -> list[Any]:
    early = [name for name in VIEWS if name != "told"]
    return [
        [renderer.plain(p), renderer.recorded(p), *(renderer.view(name, p) for name in early)]
        for p in prompts
    ]


def test_prompts_that_are_tokenised_together(
    tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """They get the same ids, in as many calls as there are kinds of texts."""
    prompts = prompts_of("who", "", "2+2=", "a longer one")
    eos = tokenizer.eos_token_id
    apart = everything(Renderer(tokenizer, {}, VIEWS, (eos,)), prompts)
    renderer = Renderer(tokenizer, {}, VIEWS, (eos,), reads_records=True)
    renderer.plain(prompts[0])  # looks once at what the template leaves out, or puts at the seam
    renderer.recorded(replace(prompts[0], id="other", response="x"))
    calls = count_encodings(tokenizer, monkeypatch)
    renderer.prepare(prompts)
    assert len(calls) == 4  # plain, two views, responses
    assert everything(renderer, prompts) == apart
    assert len(calls) == 4 + (not prompts[1].response)
    # What depends on the prompt alone is kept, and is the caller's own.
    kept = renderer.view("privileged", prompts[0])
    assert kept is not None
    kept.clear()
    assert renderer.view("privileged", prompts[0]) == apart[0][2]
    assert renderer.recorded(prompts[0]) == apart[0][1]
    assert len(calls) == 5


def test_rows_of_two_files_with_one_id_have_their_own_responses(tokenizer: Any) -> None:
    """The rows of all suites are checked by one renderer."""
    renderer = Renderer(tokenizer, {}, {}, (tokenizer.eos_token_id,))
    short, long = (replace(PROMPT, id="texts:1", response=text) for text in ("1", "1+1+1"))
    assert len(renderer.recorded(short)) < len(renderer.recorded(long))


def test_rows_that_cannot_be_rendered_spoil_no_others(tokenizer: Any) -> None:
    good, odd = prompts_of("who", "odd")
    lacking = replace(good, id="lacking", privileged=None)
    refusing = type(tokenizer)(tokenizer_object=tokenizer.backend_tokenizer)
    refusing.chat_template = (
        "{% if 'odd' in messages[-1].content %}{{ raise_exception('odd') }}{% endif %}"
        + tokenizer.chat_template
    )
    renderer = Renderer(refusing, {}, {"privileged": PromptView()}, (1,))
    renderer.prepare([good, odd, lacking])
    assert renderer.plain(good) == Renderer(tokenizer, {}, {}, (1,)).plain(good)
    assert renderer.view("privileged", good) is not None
    with pytest.raises(UserError, match="odd"):
        renderer.plain(odd)
    with pytest.raises(UserError, match="'privileged'"):
        renderer.view("privileged", lacking)


def test_a_run_tokenises_with_one_renderer(tiny_model_dir: TinyModelDir) -> None:
    """So that checks, engine and training share what it keeps; a new method gets a new one."""
    folder = str(tiny_model_dir())

    def method() -> Any:
        return DivergenceOPD(Student(folder), FrozenTeacher(folder))

    data = RolloutDataModule(mix=RolloutMix(recorded=1.0))
    data.trainer = cast(Any, SimpleNamespace(lightning_module=method()))
    first = data.renderer(training=True)
    assert first.reads_records
    assert data.renderer(training=True) is first
    assert not data.renderer(training=False).reads_records
    data.trainer = cast(Any, SimpleNamespace(lightning_module=method()))
    assert data.renderer(training=True) is not first
