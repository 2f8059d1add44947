"""Contract tests of engines; the test file of an engine subclasses `EngineContract`."""

from __future__ import annotations

import copy
import math
import re
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from opd_lightning.errors import EngineMismatchError, UserError
from opd_lightning.models.weight_sums import PushedWeights
from opd_lightning.rollouts import Engine, Request, Sampling
from opd_lightning.terminal import progress
from opd_lightning.types import Completion, StopReason

MAX_LENGTH = 64
EOS = 1  # of the tiny model's tokenizer
LENGTHS = (3, 11, 1, 7, 16, 5)
REQUESTS = [
    Request([3 + (7 * length + 5 * i) % 60 for i in range(length)], seed)
    for seed, length in enumerate(LENGTHS * 3)
]


def samplings(*values: Any) -> pytest.MarkDecorator:
    return pytest.mark.parametrize(
        "sampling", values, ids=lambda s: f"t{s.temperature}-k{s.top_k}-p{s.top_p}"
    )


WHOLE = Sampling(max_new_tokens=1)
NUCLEUS = Sampling(temperature=0.7, top_p=0.8, max_new_tokens=1)
# An engine that takes seconds for it has these in slow tests.
one_setting_each = samplings(
    Sampling(temperature=0.7, max_new_tokens=24),
    Sampling(temperature=1.0, top_k=5, max_new_tokens=24),
    Sampling(temperature=1.0, top_p=0.8, max_new_tokens=24),
    Sampling(temperature=0.0, max_new_tokens=24),
)


@cache
def reference_model(folder: Path) -> Any:
    """Return the float32 model of a folder, cached; tests must not change its weights."""
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


def processed_logprobs(logits: Tensor, sampling: Sampling) -> Tensor:
    """Return log-probs (nats) of the distribution of `sampling`, by definition; `logits [T, V]`."""
    if sampling.temperature == 0:
        return logits.log_softmax(-1)
    probabilities = (logits / sampling.temperature).softmax(-1)
    if sampling.top_k:
        smallest = probabilities.topk(sampling.top_k).values[:, -1:]
        probabilities = probabilities * (probabilities >= smallest)
        probabilities = probabilities / probabilities.sum(-1, keepdim=True)
    ordered, ids = probabilities.sort(-1, descending=True)
    before = ordered.cumsum(-1) - ordered  # mass of the likelier tokens
    kept = torch.zeros_like(ordered).scatter(-1, ids, ordered * (before < sampling.top_p))
    return (kept / kept.sum(-1, keepdim=True)).log()


@torch.no_grad()
def rescored(
    model: Any, requests: Sequence[Request], completions: Sequence[Completion], sampling: Sampling
) -> list[Tensor]:
    """Return the distribution `[T, V]` at each response token: one row, no padding, no cache."""
    result = []
    for request, completion in zip(requests, completions, strict=True):
        ids = torch.tensor([request.prompt_ids + completion.response_ids])
        logits = model(ids, use_cache=False).logits[0, len(request.prompt_ids) - 1 : -1]
        result.append(processed_logprobs(logits, sampling))
    return result


def assert_scored_by(
    model: Any, requests: Sequence[Request], completions: Sequence[Completion], sampling: Sampling
) -> None:
    distributions = rescored(model, requests, completions, sampling)
    for completion, distribution in zip(completions, distributions, strict=True):
        chosen = torch.tensor(completion.response_ids)[:, None]
        expected = distribution.gather(1, chosen).squeeze(1)
        torch.testing.assert_close(torch.tensor(completion.logprobs), expected, atol=1e-4, rtol=0)


class EngineContract:
    """Base of contract tests; subclasses define the module fixture `engine`, started."""

    @pytest.fixture
    def model(self, tiny_model_dir: Any) -> Any:
        return reference_model(tiny_model_dir())

    @pytest.fixture(autouse=True)
    def _first_weights(self, engine: Engine, model: Any) -> None:
        """Push the weights of `model` before each test."""
        engine.load_weights(0, model.named_parameters())

    @samplings(
        Sampling(temperature=1.0, max_new_tokens=24),
        Sampling(temperature=0.7, top_k=5, top_p=0.8, max_new_tokens=24),
        Sampling(temperature=0.0, top_k=5, top_p=0.8, max_new_tokens=24),
    )
    def test_logprobs_are_of_the_distribution_sampled_from(
        self, engine: Engine, model: Any, sampling: Sampling
    ) -> None:
        completions = engine.generate(REQUESTS, sampling)
        assert_scored_by(model, REQUESTS, completions, sampling)

    @one_setting_each
    def test_logprobs_for_each_setting(
        self, engine: Engine, model: Any, sampling: Sampling
    ) -> None:
        completions = engine.generate(REQUESTS, sampling)
        assert_scored_by(model, REQUESTS, completions, sampling)

    def test_its_sums_prove_that_a_push_arrived(self, engine: Engine, tiny_model_dir: Any) -> None:
        first, second = (reference_model(tiny_model_dir(seed=seed)) for seed in (0, 1))
        for version, model in enumerate((second, first)):
            pushed = PushedWeights(model.named_parameters, engine.weights_dtype)
            engine.load_weights(version, pushed)
            assert pushed.check(version, engine.weight_sums()) >= 1.0, "all of it was compared"
        old = PushedWeights(second.named_parameters, engine.weights_dtype)
        assert len(list(old)) > 10
        with pytest.raises(EngineMismatchError, match="after the push"):
            old.check(2, engine.weight_sums())

    def test_greedy_is_argmax(self, engine: Engine, model: Any) -> None:
        sampling = Sampling(temperature=0.0, max_new_tokens=24)
        completions = engine.generate(REQUESTS, sampling)
        distributions = rescored(model, REQUESTS, completions, sampling)
        for completion, distribution in zip(completions, distributions, strict=True):
            assert completion.response_ids == distribution.argmax(-1).tolist()

    def test_a_seed_decides_its_response_alone(self, engine: Engine) -> None:
        sampling = Sampling(max_new_tokens=24)
        first = [c.response_ids for c in engine.generate(REQUESTS, sampling)]
        again = [c.response_ids for c in engine.generate(REQUESTS, sampling)]
        reverse = [c.response_ids for c in engine.generate(REQUESTS[::-1], sampling)]
        assert again == first
        assert reverse[::-1] == first
        alone = [engine.generate([r], sampling)[0].response_ids for r in REQUESTS[:4]]
        assert alone == first[:4]

    def test_seeds_differ(self, engine: Engine) -> None:
        requests = [Request(REQUESTS[0].prompt_ids, seed) for seed in range(32)]
        completions = engine.generate(requests, Sampling(max_new_tokens=24))
        assert len({tuple(c.response_ids) for c in completions}) == 32

    @samplings(WHOLE, NUCLEUS)
    def test_frequencies_match_the_distribution(
        self, engine: Engine, model: Any, sampling: Sampling
    ) -> None:
        draws = 4000
        requests = [Request(REQUESTS[1].prompt_ids, seed) for seed in range(draws)]
        completions = engine.generate(requests, sampling)
        counts = torch.zeros(64).index_add_(
            0, torch.tensor([c.response_ids[0] for c in completions]), torch.ones(draws)
        )
        expected = rescored(model, requests[:1], completions[:1], sampling)[0][0].exp()
        error = (expected * (1 - expected) / draws).sqrt()
        # Tokens rarer than a few draws are not normal; they are tested together below.
        common = expected * draws >= 10
        assert common.sum() >= 5
        assert ((counts / draws - expected).abs() <= 4 * error)[common].all()
        rest = expected[~common].sum()
        slack = 4 * (rest * (1 - rest) / draws).sqrt() + 1e-6
        assert (counts[~common].sum() / draws - rest).abs() <= slack
        assert counts[expected == 0].sum() == 0

    def test_prompts_of_all_lengths_end_properly(self, engine: Engine) -> None:
        budget = 24
        completions = engine.generate(REQUESTS, Sampling(max_new_tokens=budget))
        reasons = {c.stop_reason for c in completions}
        assert reasons == {StopReason.EOS, StopReason.LENGTH}, "the sample must show both ends"
        for completion in completions:
            ids = completion.response_ids
            assert len(completion.logprobs) == len(ids)
            assert all(math.isfinite(x) and x <= 0 for x in completion.logprobs)
            if completion.stop_reason is StopReason.EOS:
                assert ids.index(EOS) == len(ids) - 1
            else:
                assert len(ids) == budget
                assert EOS not in ids

    def test_an_eos_on_the_last_token_is_an_eos(self, engine: Engine) -> None:
        requests = [Request(REQUESTS[1].prompt_ids, seed) for seed in range(400)]
        completions = engine.generate(requests, Sampling(max_new_tokens=1))
        ended = [c for c in completions if c.response_ids == [EOS]]
        assert ended
        assert all(c.stop_reason is StopReason.EOS for c in ended)

    @pytest.mark.parametrize("length", [MAX_LENGTH - 24 + 1, MAX_LENGTH])
    def test_a_request_beyond_the_limit_is_refused(self, engine: Engine, length: int) -> None:
        with pytest.raises(UserError, match="exceed the engine's 64 tokens"):
            engine.generate([Request([5] * length, 0)], Sampling(max_new_tokens=24))
        fits = engine.generate([Request([5] * (MAX_LENGTH - 24), 0)], Sampling(max_new_tokens=24))
        assert len(fits) == 1

    def test_more_prompt_tokens_than_are_computed_at_once(self, engine: Engine) -> None:
        requests = [Request(REQUESTS[1].prompt_ids * 5, seed) for seed in range(250)]
        together = engine.generate(requests, Sampling(max_new_tokens=2))
        (alone,) = engine.generate(requests[-1:], Sampling(max_new_tokens=2))
        assert alone.response_ids == together[-1].response_ids

    def test_no_requests_no_completions(self, engine: Engine) -> None:
        assert engine.generate([], Sampling(max_new_tokens=8)) == []

    def test_a_long_call_tells_how_far_it_is(
        self,
        engine: Engine,
        capsys: pytest.CaptureFixture[str],
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:
        engine.generate(REQUESTS, Sampling(max_new_tokens=8))
        assert "generate" not in capsys.readouterr().err  # this one is short
        monkeypatch.setattr(progress, "LONG_IN_LOGS", 0.0)
        engine.generate(REQUESTS, Sampling(max_new_tokens=8))
        told = re.compile(r"generate (\d+)/(\d+) (responses|token steps), .+ (left|in all)")
        lines = capsys.readouterr().err.splitlines()
        found = [told.fullmatch(line) for line in lines if line.startswith("generate")]
        amounts = [(int(match[1]), int(match[2])) for match in found if match]
        assert len(amounts) == len(found) > 1
        assert amounts == sorted(set(amounts))
        assert amounts[-1][0] == amounts[-1][1]

    def test_pushed_weights_write_from_then_on(
        self, engine: Engine, model: Any, tiny_model_dir: Any
    ) -> None:
        sampling = Sampling(max_new_tokens=24)
        before = engine.generate(REQUESTS, sampling)
        other = reference_model(tiny_model_dir(seed=1))
        engine.load_weights(7, other.named_parameters())
        assert engine.version == 7
        after = engine.generate(REQUESTS, sampling)
        assert_scored_by(other, REQUESTS, after, sampling)
        with pytest.raises(AssertionError):
            assert_scored_by(model, REQUESTS, after, sampling)
        engine.load_weights(8, model.named_parameters())
        assert engine.version == 8
        assert [c.response_ids for c in engine.generate(REQUESTS, sampling)] == [
            c.response_ids for c in before
        ]

    def test_the_engine_keeps_its_own_copy(self, engine: Engine, model: Any) -> None:
        """The trainer may change tensors after their push."""
        student = copy.deepcopy(model)
        engine.load_weights(1, student.named_parameters())
        sampling = Sampling(max_new_tokens=8)
        before = engine.generate(REQUESTS, sampling)
        with torch.no_grad():
            for parameter in student.parameters():
                parameter.zero_()
        assert engine.generate(REQUESTS, sampling) == before

    def test_sleep_and_wake_then_push(self, engine: Engine, model: Any) -> None:
        sampling = Sampling(max_new_tokens=8)
        before = engine.generate(REQUESTS, sampling)
        engine.sleep()
        assert engine.version == -1
        engine.wake()
        engine.load_weights(2, model.named_parameters())
        assert engine.generate(REQUESTS, sampling) == before

    def test_the_global_random_state_is_left_alone(self, engine: Engine) -> None:
        state = torch.get_rng_state()
        engine.generate(REQUESTS, Sampling(max_new_tokens=4))
        assert torch.equal(torch.get_rng_state(), state)
