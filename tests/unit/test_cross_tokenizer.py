"""Teachers with another tokenizer: scores and refused requests."""

import json
import logging
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from opd_lightning.errors import UserError
from opd_lightning.lab.models import new_model
from opd_lightning.losses.alignment import HybridULD
from opd_lightning.methods import GOLD
from opd_lightning.models.chat import render
from opd_lightning.models.student import Student
from opd_lightning.rules import (
    PositionWeight,
    PowerReward,
    ScopeWeight,
    TrajectoryGate,
    TrustRegion,
    VocabularyBaseline,
)
from opd_lightning.rules.base import Compare, Rule
from opd_lightning.teachers import (
    Ask,
    ByDomainTeacher,
    CachedTeacher,
    CrossTokenizerTeacher,
    FrozenTeacher,
    RemoteTeacher,
    Teacher,
)
from opd_lightning.timing import StepTimer
from opd_lightning.training.scoring import score_batch
from opd_lightning.types import Prompt, Rollout, RolloutBatch, TokenScores
from tests.batches import make_batch, make_rollout
from tests.refusals import STUDENT, TEACHER, Refusal, divergence, opd, opsd
from tests.tokenizers import byte_level, permute_vocabulary, sentence_piece, write_model

CPU = torch.device("cpu")
PROMPT = Prompt(id="p", messages=({"role": "user", "content": "the fox"},), domain="math")


@pytest.fixture(scope="module")
def lab(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Two models with the lab's tokens, and the second one with others."""
    root = tmp_path_factory.mktemp("models")
    for seed, name in enumerate(("student", "teacher")):
        new_model(root / name, layers=1, hidden_size=32, seed=seed)
    permute_vocabulary(root / "teacher", root / "permuted")
    return {path.name: path for path in root.iterdir()}


@pytest.fixture(scope="module")
def kinds(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("kinds")
    write_model(root / "bytes", byte_level(), "<end of turn>", seed=0)
    write_model(root / "pieces", sentence_piece(strips=True), "</s>", seed=1)
    return {path.name: path for path in root.iterdir()}


def loaded(path: Path) -> Student:
    student = Student(str(path))
    student.load()
    return student


def answered(student: Student, text: str, *, ended: bool = True, dropped: bool = False) -> Rollout:
    """A rollout in the student's tokens; `text` may be some of the tokens' own names."""
    tokenizer = student.source.tokenizer
    ids = tokenizer.encode(text, add_special_tokens=False)
    ids += [tokenizer.eos_token_id] if ended else []
    rollout = make_rollout(
        ids, prompt_ids=render(PROMPT, tokenizer, {}), truncated=not ended, dropped=dropped
    )
    return replace(rollout, prompt=PROMPT)


def score(teacher: Teacher, student: Student, batch: RolloutBatch) -> TokenScores:
    teacher.load(CPU, student)
    return teacher.score(batch, "student")


def plain_logprobs(path: Path, text: str, *, ended: bool, temperature: float) -> Tensor:
    """Straight from transformers: log-probs of the text's own tokens behind the prompt."""
    model = loaded(path)
    tokenizer = model.source.tokenizer
    prompt = render(PROMPT, tokenizer, {})
    ids = tokenizer.encode(text, add_special_tokens=False)
    ids += [tokenizer.eos_token_id] if ended else []
    with torch.no_grad():
        logits = model.model(torch.tensor([prompt + ids])).logits[0, len(prompt) - 1 : -1]
    logprobs = (logits / temperature).log_softmax(-1)
    return logprobs.gather(1, torch.tensor(ids)[:, None])[:, 0]


TEXTS = ["1+2=3", "the answer; 7", "", "x y"]


@pytest.mark.parametrize(("name", "bound"), [("teacher", 1e-6), ("permuted", 1e-5)])
def test_other_names_of_the_same_tokens_change_nothing(
    lab: dict[str, Path], name: str, bound: float
) -> None:
    student = loaded(lab["student"])
    rollouts = [answered(student, text, ended=i % 2 == 0) for i, text in enumerate(TEXTS)]
    rollouts.append(answered(student, "dropped", dropped=True))
    batch = make_batch(rollouts)
    expected = score(FrozenTeacher(str(lab["teacher"])), student, batch)
    found = score(CrossTokenizerTeacher(str(lab[name])), student, batch)
    torch.testing.assert_close(found.logprobs, expected.logprobs, atol=bound, rtol=0)
    assert found.ends is not None
    assert torch.equal(found.ends, batch.response_mask)
    assert found.entropy.isnan().all()
    assert found.top_ids.shape == (*batch.response_ids.shape, 0)
    # Other token ids do matter to a teacher that reads the student's ids.
    wrong = score(FrozenTeacher(str(lab["permuted"])), student, batch)
    assert (wrong.logprobs - expected.logprobs).abs().max() > 0.1


@pytest.mark.parametrize("ended", [True, False])
@pytest.mark.parametrize("text", ["the quick näive 雪 fox", "🙂\n the  fox", "雪"])
def test_groups_hold_the_sums_of_the_teachers_own_tokens(
    kinds: dict[str, Path], text: str, ended: bool
) -> None:
    for ours, theirs in (("bytes", "pieces"), ("pieces", "bytes")):
        student = loaded(kinds[ours])
        batch = make_batch([answered(student, text, ended=ended), answered(student, "the")])
        found = score(CrossTokenizerTeacher(str(kinds[theirs])), student, batch)
        own = plain_logprobs(kinds[theirs], text, ended=ended, temperature=batch.temperature)
        if ended:
            torch.testing.assert_close(found.logprobs[0].sum(), own.sum(), atol=1e-4, rtol=0)
        else:  # the last of them may be the beginning of a longer one
            assert own.sum() - 1e-4 < found.logprobs[0].sum() < own.sum() + 5
        assert found.ends is not None
        row, mask = found.ends[0], batch.response_mask[0]
        assert row[mask][-1]
        assert not (row & ~mask).any()
        assert (found.logprobs[0][~row] == 0).all()
        if ended:  # the end is a separate group
            torch.testing.assert_close(found.logprobs[0][mask][-1], own[-1], atol=1e-5, rtol=0)
            assert row[mask][-2]


def test_nothing_is_said_of_a_character_that_was_cut_off(kinds: dict[str, Path]) -> None:
    student = loaded(kinds["bytes"])
    whole = answered(student, "the 🙂", ended=False)
    cut = replace(whole, response_ids=whole.response_ids[:-1])
    text = student.source.tokenizer.decode(cut.response_ids)
    assert text.endswith("\ufffd")
    known = len(student.source.tokenizer.encode(text.rstrip("\ufffd")))
    batch = make_batch([cut])
    teacher = CrossTokenizerTeacher(str(kinds["pieces"]))
    found = score(teacher, student, batch)
    assert found.ends is not None
    assert not found.ends[0, known:].any()
    own = plain_logprobs(kinds["pieces"], "the ", ended=False, temperature=batch.temperature)
    assert own.sum() < found.logprobs.sum() < own.sum() + 5  # " " begins " t" as well
    answers = ask(student, batch, teacher=teacher)
    ratio = answers.log_ratio[0]
    assert (ratio[known:] == 0).all()
    assert (ratio[:known] != 0).all()
    nothing = make_batch([replace(cut, response_ids=cut.response_ids[known:])])
    assert (ask(student, nothing, teacher=teacher).log_ratio == 0).all()


def test_bytes_that_are_no_text_are_read_as_a_replacement(kinds: dict[str, Path]) -> None:
    student = loaded(kinds["bytes"])
    good = answered(student, "the fox")
    byte = student.source.tokenizer.convert_tokens_to_ids("ÿ")  # byte 255
    middle = [*good.response_ids[:1], byte, *good.response_ids[1:]]
    batch = make_batch([replace(good, response_ids=middle), good])
    found = score(CrossTokenizerTeacher(str(kinds["pieces"])), student, batch)
    text = student.source.tokenizer.decode(middle[:-1])
    assert "\ufffd" in text
    own = plain_logprobs(kinds["pieces"], text, ended=True, temperature=batch.temperature)
    torch.testing.assert_close(found.logprobs[0].sum(), own.sum(), atol=1e-4, rtol=0)
    assert found.ends is not None
    assert found.ends[0].sum() > 2


def test_special_tokens_in_a_response_are_their_names(kinds: dict[str, Path]) -> None:
    student = loaded(kinds["bytes"])
    named = answered(student, "the <|user|> fox")
    assert student.source.tokenizer.convert_tokens_to_ids("<|user|>") in named.response_ids
    batch = make_batch([named])
    found = score(CrossTokenizerTeacher(str(kinds["pieces"])), student, batch)
    own = plain_logprobs(
        kinds["pieces"], "the <|user|> fox", ended=True, temperature=batch.temperature
    )
    torch.testing.assert_close(found.logprobs.sum(), own.sum(), atol=1e-4, rtol=0)


def test_ids_beyond_the_students_vocabulary_spell_nothing(kinds: dict[str, Path]) -> None:
    student = loaded(kinds["bytes"])
    good = answered(student, "the fox")
    beyond = len(student.source.tokenizer) + 1
    odd = replace(good, response_ids=[good.response_ids[0], beyond, *good.response_ids[1:]])
    teacher = CrossTokenizerTeacher(str(kinds["pieces"]))
    found, plain = (score(teacher, student, make_batch([x])) for x in (odd, good))
    torch.testing.assert_close(found.logprobs.sum(), plain.logprobs.sum())


# Whole distributions ----------------------------------------------------------------------


def test_distributions_at_the_ends_of_groups(kinds: dict[str, Path]) -> None:
    """Those of transformers that predict the teacher's last token of every group."""
    student = loaded(kinds["bytes"])
    text = "the quick näive 雪 fox"
    dropped = answered(student, "fox", dropped=True)
    batch = make_batch([dropped, answered(student, text), answered(student, "the", ended=False)])
    teacher = CrossTokenizerTeacher(str(kinds["pieces"]))
    teacher.load(CPU, student)
    found = teacher.groups(batch, "student")
    plain = teacher.score(batch, "student")
    torch.testing.assert_close(found.scores.logprobs, plain.logprobs)
    assert plain.ends is not None
    ((rows, states),) = found.states.parts
    mask = batch.response_mask
    assert torch.equal(rows, plain.ends[mask].nonzero()[:, 0])
    model = loaded(kinds["pieces"])
    tokenizer = model.source.tokenizer
    ids = [*tokenizer.encode(text, add_special_tokens=False), tokenizer.eos_token_id]
    prompt = render(PROMPT, tokenizer, {})
    with torch.no_grad():
        logits = model.model(torch.tensor([prompt + ids])).logits[0, len(prompt) - 1 : -1]
        theirs = states.head.finish(states.head.project(states.hidden)).log_softmax(-1)
    whole = (logits / batch.temperature).log_softmax(-1)
    own = whole.gather(1, torch.tensor(ids)[:, None])[:, 0]
    assert plain.group_tokens is not None
    sizes = plain.group_tokens[1][plain.ends[1]]
    lasts = sizes.cumsum(0) - 1
    assert int(lasts[-1]) == len(ids) - 1
    assert sizes.max() > 1
    torch.testing.assert_close(theirs[: len(sizes)], whole[lasts], atol=1e-4, rtol=0)
    for row, size, last in zip(rows, sizes, lasts, strict=False):
        earlier = own[int(last) + 1 - int(size) : int(last)].sum()
        torch.testing.assert_close(found.given[row], earlier, atol=1e-4, rtol=0)
    assert len(rows) == len(sizes) + int(plain.ends[2].sum())


def compared(student: Student, teacher: Teacher, batch: RolloutBatch) -> Tensor:
    teacher.load(CPU, student)
    scores = score_batch(
        student,
        batch,
        asks={"teacher": Ask(teacher, "student")},
        comparisons={"loss": Compare("teacher", HybridULD())},
        known={},
        top_k=0,
        timer=StepTimer(),
    )
    return scores.values["loss"]


def test_the_values_are_at_the_ends_of_groups_whatever_is_beside_them(
    kinds: dict[str, Path],
) -> None:
    """A rank without response tokens goes through the same passes."""
    student, teacher = loaded(kinds["bytes"]), CrossTokenizerTeacher(str(kinds["pieces"]))
    texts = [("the 雪 fox", True), ("näive", False), ("the quick 🙂", False)]
    rollouts = [answered(student, text, ended=ended) for text, ended in texts]
    rollouts[2] = replace(rollouts[2], response_ids=rollouts[2].response_ids[:-1])
    together = compared(student, teacher, make_batch(rollouts))
    ends = score(teacher, student, make_batch(rollouts)).ends
    assert ends is not None
    assert ((together > 0) == ends).all()
    assert not ends[2, -3:].any()  # a character that was cut off
    for row, rollout in enumerate(rollouts):
        alone = compared(student, teacher, make_batch([rollout]))[0]
        torch.testing.assert_close(alone, together[row, : len(alone)], atol=1e-5, rtol=1e-4)
    nothing = make_batch([replace(rollout, dropped=True) for rollout in rollouts])
    empty = compared(student, teacher, nothing)
    assert not empty.any()
    (empty.sum() + student(nothing).student.logprobs.sum()).backward()


# Asked together ---------------------------------------------------------------------------


def ask(student: Student, batch: RolloutBatch, **teachers: Teacher):  # type: ignore[no-untyped-def]
    for teacher in teachers.values():
        teacher.load(CPU, student)
    answers = score_batch(
        student,
        batch,
        asks={name: Ask(teacher, "student") for name, teacher in teachers.items()},
        comparisons={},
        known={},
        top_k=0,
        timer=StepTimer(),
    )
    return answers.scored


def test_everybody_is_compared_in_the_same_groups(kinds: dict[str, Path]) -> None:
    student = loaded(kinds["pieces"])
    batch = make_batch(
        [answered(student, "the quick fox"), answered(student, "雪 the", ended=False)]
    )
    foreign = CrossTokenizerTeacher(str(kinds["bytes"]))
    own = FrozenTeacher(str(kinds["pieces"]))
    scored = ask(student, batch, teacher=foreign, reference=own)
    ends = scored.others["teacher"].ends
    assert ends is not None
    assert (~ends & batch.response_mask).any()  # some group has several tokens
    for row in range(2):
        start = 0
        for end in ends[row].nonzero()[:, 0].tolist():
            group = slice(start, end + 1)
            for name, teacher in (("teacher", foreign), ("reference", own)):
                raw = teacher.score(batch, "student").logprobs[row, group]
                expected = (raw - scored.student.logprobs[row, group]).sum()
                difference = scored.others[name].logprobs - scored.student.logprobs
                torch.testing.assert_close(
                    difference[row, group], expected.expand(end + 1 - start), atol=1e-4, rtol=0
                )
            start = end + 1


def test_scores_that_are_known_are_not_grouped_twice(kinds: dict[str, Path]) -> None:
    student = loaded(kinds["pieces"])
    batch = make_batch([answered(student, "the quick fox")])
    teacher = CrossTokenizerTeacher(str(kinds["bytes"]))
    teacher.load(CPU, student)
    arguments = {
        "asks": {"teacher": Ask(teacher, "student")},
        "comparisons": {},
        "top_k": 0,
        "timer": StepTimer(),
    }
    first = score_batch(student, batch, known={}, **arguments)  # type: ignore[arg-type]
    again = score_batch(student, batch, known=first.others, **arguments)  # type: ignore[arg-type]
    assert torch.equal(first.scored.teacher.logprobs, again.scored.teacher.logprobs)


def test_domains_may_have_teachers_of_both_kinds(lab: dict[str, Path]) -> None:
    student = loaded(lab["student"])
    other = replace(PROMPT, domain="code", id="q")
    rollouts = [answered(student, text) for text in TEXTS]
    rollouts[1:3] = [replace(rollout, prompt=other) for rollout in rollouts[1:3]]
    batch = make_batch(rollouts)
    frozen = FrozenTeacher(str(lab["teacher"]))
    mixed = {"math": CrossTokenizerTeacher(str(lab["permuted"])), "code": frozen}
    expected = score(frozen, student, batch)
    found = score(ByDomainTeacher(dict(mixed)), student, batch)
    torch.testing.assert_close(found.logprobs, expected.logprobs, atol=1e-5, rtol=0)
    assert found.ends is not None
    assert found.ends[batch.response_mask].all()
    assert found.top_ids.shape[-1] == 0


# Mistakes ---------------------------------------------------------------------------------


def foreign(path: Path | str = TEACHER) -> CrossTokenizerTeacher:
    return CrossTokenizerTeacher(str(path))


def test_the_plain_prompt_only(refusal: Refusal) -> None:
    line = refusal(lambda: opsd(teacher=foreign()))
    assert "OPSDK1 shows its teacher the view 'privileged', but CrossTokenizerTeacher" in line


def test_sampled_tokens_only(refusal: Refusal) -> None:
    line = refusal(lambda: divergence(teacher=foreign()))
    assert "DivergenceOPD reads whole distributions, which CrossTokenizerTeacher cannot" in line
    assert "use GOLD" in line
    line = refusal(lambda: gold(rules=[VocabularyBaseline()]))
    assert "GOLD's loss is a divergence" in line
    line = refusal(lambda: gold(terms=[TrustRegion(foreign(), estimator="full")]))
    assert "GOLD reads whole distributions, which CrossTokenizerTeacher cannot" in line


def gold(teacher: Teacher | None = None, **more: Any) -> GOLD:
    return GOLD(Student(STUDENT), teacher or foreign(), **more)


def test_gold_needs_one_teacher_in_this_process(refusal: Refusal) -> None:
    served = RemoteTeacher(TEACHER, servers=["http://127.0.0.1:1"], key_file="key")
    cached = CachedTeacher("cache", FrozenTeacher(TEACHER))
    for teacher, kind in ((served, "RemoteTeacher"), (cached, "CachedTeacher")):
        line = refusal(lambda teacher=teacher: gold(teacher))
        assert f"GOLD reads whole distributions, which {kind} cannot give" in line
        assert "use one FrozenTeacher or CrossTokenizerTeacher" in line
    line = refusal(lambda: gold(ByDomainTeacher({"default": foreign()})))
    assert "which ByDomainTeacher of domains with different tokenizers cannot give" in line
    line = refusal(lambda: gold(terms=[TrustRegion(foreign())]))
    assert "a CrossTokenizerTeacher with its own tokenizer, but GOLD compares groups" in line


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"hybrid": False, "beta": 0.0}, "got beta 0.0 and shared_weight None with hybrid false"),
        ({"hybrid": False, "shared_weight": 1.0}, "shared_weight 1.0 with hybrid false"),
        ({"shared_weight": 2.0}, "shared_weight: got 2.0, expected a number from 0 to 1"),
        ({"beta": 2.0}, "beta is 2.0"),
        ({"rules": [PositionWeight()]}, "PositionWeight adds up log-ratios of single tokens"),
    ],
)
def test_settings_of_gold(refusal: Refusal, settings: dict[str, Any], words: str) -> None:
    assert words in refusal(lambda: gold(**settings))


@pytest.mark.parametrize("rule", [TrajectoryGate(), PositionWeight(), ScopeWeight()])
def test_groups_are_not_added_up(refusal: Refusal, rule: Rule) -> None:
    line = refusal(lambda: opd(teacher=foreign(), rules=[rule]))
    name = type(rule).__name__
    assert f"{name} adds up log-ratios of single tokens, but CrossTokenizerTeacher" in line


def test_groups_are_not_added_up_over_the_rest(refusal: Refusal) -> None:
    line = refusal(lambda: opd(teacher=foreign(), discount=0.5))
    assert "OPD adds up log-ratios of single tokens" in line


def test_a_group_has_no_probability_of_single_tokens(refusal: Refusal) -> None:
    """The log-prob of a group in the student's tokens may be above 0, and its power anything."""
    line = refusal(lambda: opd(teacher=foreign(), rules=[PowerReward()]))
    assert "PowerReward reads the teacher's probability of every token, but CrossTok" in line


def test_bytes_of_tokens_must_be_known(refusal: Refusal, tmp_path: Path) -> None:
    folder = tmp_path / "odd"
    new_model(folder, layers=1, hidden_size=32, seed=0)
    state = json.loads((folder / "tokenizer.json").read_text())
    state["decoder"] = {"type": "WordPiece", "prefix": "##", "cleanup": True}
    (folder / "tokenizer.json").write_text(json.dumps(state))
    line = refusal(lambda: opd(teacher=foreign(folder)))
    assert f"teacher '{folder}': cannot tell the bytes of its tokens" in line
    assert "WordPiece" in line


def test_prompts_fit_the_teachers_own_context(refusal: Refusal, tmp_path: Path) -> None:
    folder = tmp_path / "short"
    new_model(folder, layers=1, hidden_size=32, seed=0)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "max_position_embeddings": 8}))
    line = refusal(lambda: opd(teacher=foreign(folder)))
    assert "leave no room for a response in the teacher's context of 8; shorten the row" in line


def test_what_exceeds_the_context_is_not_scored(
    kinds: dict[str, Path], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    config = json.loads((kinds["pieces"] / "config.json").read_text())
    assert config["max_position_embeddings"] == 64
    longer = tmp_path / "longer"
    shutil.copytree(kinds["pieces"], longer)
    (longer / "config.json").write_text(json.dumps({**config, "max_position_embeddings": 512}))
    student = loaded(kinds["bytes"])
    fitting = answered(student, "the quick fox")
    batch = make_batch([answered(student, "the fox " * 20), fitting])
    teacher = CrossTokenizerTeacher(str(kinds["pieces"]))
    with caplog.at_level(logging.WARNING, "opd_lightning"):
        expected = score(CrossTokenizerTeacher(str(longer)), student, batch)
        assert not caplog.records
        found = score(teacher, student, batch)
        score(teacher, student, batch)
    assert len(caplog.records) == 1
    said = caplog.records[0].getMessage()
    assert f"a response to prompt {fitting.prompt.id} has " in said
    assert "fit in its context and are scored; lower sampling.max_new_tokens" in said
    assert found.ends is not None
    assert expected.ends is not None
    assert torch.equal(found.ends[1], expected.ends[1])
    scored = found.ends[0].nonzero().flatten()
    assert 0 < len(scored) < expected.ends[0].sum()
    # Of the last group, what it implies about the next is not known.
    before = int(scored[-2]) + 1
    torch.testing.assert_close(found.logprobs[0, :before], expected.logprobs[0, :before])
    torch.testing.assert_close(found.logprobs[1], expected.logprobs[1])
    assert not found.logprobs[0, int(scored[-1]) + 1 :].any()


def test_the_teachers_context_is_used_to_its_last_token(
    kinds: dict[str, Path], tmp_path: Path
) -> None:
    student = loaded(kinds["bytes"])
    batch = make_batch([answered(student, "the quick fox")])
    tokenizer = loaded(kinds["pieces"]).source.tokenizer
    prompt = len(render(PROMPT, tokenizer, {}))
    written = len(tokenizer.encode("the quick fox", add_special_tokens=False)) + 1
    config = json.loads((kinds["pieces"] / "config.json").read_text())

    def teacher_of(context: int) -> CrossTokenizerTeacher:
        folder = tmp_path / f"{context}"
        shutil.copytree(kinds["pieces"], folder)
        limit = {"max_position_embeddings": context}
        (folder / "config.json").write_text(json.dumps({**config, **limit}))
        return CrossTokenizerTeacher(str(folder))

    whole, cut = (score(teacher_of(prompt + n), student, batch) for n in (written, written - 1))
    assert whole.ends is not None
    assert cut.ends is not None
    assert whole.ends[0, -1]
    assert cut.ends[0].sum() == whole.ends[0].sum() - 1
    teacher_of(prompt + 1).check_prompt(PROMPT)
    with pytest.raises(UserError, match="leave no room for a response"):
        teacher_of(prompt).check_prompt(PROMPT)
