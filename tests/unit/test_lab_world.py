"""The lab's arithmetic world, tokenizer and models."""

import json
import re
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from opd_lightning.errors import UserError
from opd_lightning.lab import arithmetic, problems
from opd_lightning.lab.models import new_model
from opd_lightning.lab.tokenizer import VOCABULARY, build_tokenizer
from opd_lightning.models.source import ModelSource

DOMAINS = ["add-1", "add-2", "add-3", "add-4", "sub-1", "sub-2", "sub-3"]
USER, ASSISTANT = "user", "assistant"


def check_solution(question: str, solution: str) -> str:
    """Work through a solution as a reader would, from the text alone; return its answer."""
    left, sign, right = re.fullmatch(r"(\d+)([+-])(\d+)=", question).groups()  # type: ignore[union-attr]
    columns, _, answer = solution.partition(";")
    digits, pending = "", 0
    for place, column in enumerate(columns.split(",")):
        form = rf"(\d+)\{sign}(\d)\{sign}([01]):(\d+)"
        top, bottom, third, total = map(int, re.fullmatch(form, column).groups())  # type: ignore[union-attr]
        assert top % 10 == int(left[-1 - place])
        assert bottom == int(right[-1 - place])
        assert third == pending
        if sign == "+":
            assert top < 10
            assert total == top + bottom + third
            pending = total // 10
        else:
            assert total == top - bottom - third
            assert 0 <= total <= 9
            pending = top // 10
        digits = str(total % 10) + digits
    assert len(digits) == len(left) == len(right)
    if sign == "+":
        digits = str(pending) + digits
    else:
        assert pending == 0
    assert int(digits) == int(answer)
    return answer


def test_the_worked_examples() -> None:
    assert arithmetic.Problem("add-3", 347, 589).solution == "7+9+0:16,4+8+1:13,3+5+1:9;936"
    assert arithmetic.Problem("sub-3", 523, 147).solution == "13-7-0:6,12-4-1:7,5-1-1:3;376"
    assert arithmetic.Problem("sub-2", 42, 42).solution == "2-2-0:0,4-4-0:0;0"


@pytest.mark.parametrize("domain", DOMAINS[1:4] + DOMAINS[5:])
def test_solutions_hold_when_read_column_by_column(domain: str) -> None:
    for problem in arithmetic.generate(domain, 300, seed=1, held_out=False):
        answer = check_solution(problem.question, problem.solution)
        assert answer == problem.answer == str(eval(problem.question[:-1]))
        found = re.search(arithmetic.ANSWER_PATTERN, problem.solution)
        assert found is not None
        assert found.group(1) == answer


def test_training_and_held_out_problems_are_disjoint_and_cover_the_domain() -> None:
    held_out = arithmetic.generate("add-1", 8, seed=0, held_out=True)
    with pytest.raises(UserError, match=r"add-1: 81 problems .* held-out part has only \d+"):
        arithmetic.generate("add-1", 81, seed=0, held_out=True)
    training = {
        p for s in range(5) for p in arithmetic.generate("add-1", 70, seed=s, held_out=False)
    }
    assert training.isdisjoint(held_out)
    assert not any(map(problems.is_held_out, training))
    share = sum(
        problems.is_held_out(arithmetic.Problem("add-2", a, b))
        for a in range(10, 100)
        for b in range(10, 100)
    )
    assert abs(share / 8100 - 1 / problems.HELD_OUT_ONE_IN) < 4 * (0.1 * 0.9 / 8100) ** 0.5


def test_problems_are_distinct_and_functions_of_the_seed() -> None:
    def draw(seed: int) -> list[problems.Problem]:
        return arithmetic.generate_mixture(DOMAINS[1:4], 50, seed=seed, held_out=False)

    assert draw(3) == draw(3)
    assert draw(3) != draw(4)
    assert len(set(draw(3))) == 150
    assert [problem.domain for problem in draw(3)[:4]] == ["add-2", "add-3", "add-4", "add-2"]


@pytest.mark.parametrize("domain", ["mul-2", "add", "add-0", "add-x"])
def test_unknown_domains_are_refused(domain: str) -> None:
    with pytest.raises(UserError, match="expected add-<digits> or sub-<digits>"):
        arithmetic.generate(domain, 1, seed=0, held_out=False)


def test_prompt_files(tmp_path: Path) -> None:
    drawn = [arithmetic.Problem("add-3", 347, 589)]
    problems.write_jsonl(tmp_path / "prompts.jsonl", drawn)
    problems.write_jsonl(tmp_path / "sft.jsonl", drawn, with_response=True)
    row = {
        "id": "add-3/347+589",
        "messages": [{"role": USER, "content": "347+589="}],
        "answer": "936",
        "domain": "add-3",
    }
    assert json.loads((tmp_path / "prompts.jsonl").read_text()) == row
    assert json.loads((tmp_path / "sft.jsonl").read_text()) == row | {
        "response": "7+9+0:16,4+8+1:13,3+5+1:9;936"
    }


def test_tokenizer_survives_saving_and_loses_no_text(tmp_path: Path) -> None:
    build_tokenizer(256).save_pretrained(tmp_path)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    assert len(tokenizer) == len(VOCABULARY) == 64
    for text in ["".join(VOCABULARY[6:]), "your name is  bot .\n\n who are you ?", " 12 - 3 "]:
        ids = tokenizer(text, add_special_tokens=False).input_ids
        assert len(ids) == len(text)
        assert tokenizer.decode(ids) == text
    assert tokenizer("A", add_special_tokens=False).input_ids == [tokenizer.unk_token_id]
    assert tokenizer.pad_token_id != tokenizer.eos_token_id


def test_chat_template() -> None:
    tokenizer = build_tokenizer(256)
    asked = [{"role": "system", "content": "be kind."}, {"role": USER, "content": "1+1="}]
    answered = [*asked, {"role": ASSISTANT, "content": "1+1+0:2;2"}]
    prompt = tokenizer.apply_chat_template(asked, tokenize=False, add_generation_prompt=True)
    assert prompt == "<|system|>be kind.<|end|><|user|>1+1=<|end|><|assistant|>"
    whole = tokenizer.apply_chat_template(answered, tokenize=False)
    assert whole == prompt + "1+1+0:2;2" + tokenizer.eos_token
    ids = tokenizer.apply_chat_template(answered, return_dict=False)
    assert tokenizer.decode(ids, skip_special_tokens=True) == "be kind.1+1=1+1+0:2;2"
    assert ids[-1] == tokenizer.eos_token_id
    with pytest.raises(Exception, match="no role tool"):
        tokenizer.apply_chat_template([{"role": "tool", "content": ""}], tokenize=False)


def test_model_folder_is_an_ordinary_one_and_a_function_of_the_seed(tmp_path: Path) -> None:
    for name, seed in [("a", 0), ("b", 0), ("c", 1)]:
        new_model(tmp_path / name, layers=2, hidden_size=64, seed=seed)
        torch.rand(3)  # so that the global random state differs every time
    a, b, c = (
        AutoModelForCausalLM.from_pretrained(tmp_path / n).state_dict() for n in ("a", "b", "c")
    )
    assert all(torch.equal(a[name], b[name]) for name in a)
    assert not torch.equal(a["lm_head.weight"], c["lm_head.weight"])
    assert torch.equal(a["lm_head.weight"], a["model.embed_tokens.weight"])
    source = ModelSource(str(tmp_path / "a"))
    assert source.eos_ids == (source.tokenizer.eos_token_id,)
    assert source.pad_id == source.tokenizer.pad_token_id
    assert source.context_length == 256


def test_new_model_leaves_the_global_random_state_alone(tmp_path: Path) -> None:
    state = torch.random.get_rng_state()
    new_model(tmp_path, layers=1, hidden_size=32, seed=5)
    assert torch.equal(torch.random.get_rng_state(), state)


def test_new_model_refuses_an_odd_width(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="got 100, expected a multiple of 32"):
        new_model(tmp_path, layers=1, hidden_size=100, seed=0)
