"""The chunked head equals the model's own logits, whole, in value and gradient."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import (
    AutoModelForCausalLM,
    CohereConfig,
    Gemma2Config,
    GraniteConfig,
    PretrainedConfig,
    Qwen3Config,
)

from opd_lightning import head as head_module
from opd_lightning.causal_lm import response_states
from opd_lightning.head import Head, TokenStates, score_divergence, score_tokens
from opd_lightning.losses.divergence import reverse_kl
from opd_lightning.types import RolloutBatch
from tests.batches import make_batch, make_rollout

N, H, V = 37, 8, 11


def states(seed: int, temperature: float = 0.7) -> tuple[TokenStates, nn.Linear]:
    torch.manual_seed(seed)
    linear = nn.Linear(H, V)
    hidden = torch.randn(N, H, requires_grad=True)
    return TokenStates(hidden, Head(project=linear, vocab_size=V, temperature=temperature)), linear


def everything(chunk: int, monkeypatch: pytest.MonkeyPatch) -> list[Tensor]:
    """All outputs and all gradients at one chunk size."""
    monkeypatch.setattr(head_module, "MAX_CHUNK_ELEMENTS", chunk * V)
    mine, linear = states(0)
    theirs, _ = states(1)
    targets = torch.arange(N) % V
    student, teacher, distance = score_divergence(mine, theirs, targets, reverse_kl, top_k=3)
    alone = score_tokens(mine, targets, top_k=3)
    weights = torch.linspace(-1, 1, N)
    loss = (weights * (distance + student.logprobs + 2 * alone.logprobs)).sum()
    gradients = torch.autograd.grad(loss, [mine.hidden, linear.weight, linear.bias])
    return [*student, *teacher, distance, *alone, *gradients]


def test_chunked_equals_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = everything(N, monkeypatch)
    for chunk in (1, 5, 36):
        for a, b in zip(everything(chunk, monkeypatch), whole, strict=True):
            torch.testing.assert_close(a, b, atol=1e-6, rtol=1e-6)


def test_against_definitions() -> None:
    mine, linear = states(0)
    theirs, other = states(1)
    targets = torch.arange(N) % V
    student, teacher, distance = score_divergence(mine, theirs, targets, reverse_kl, top_k=2)
    ours = (linear(mine.hidden) / 0.7).softmax(-1)
    yours = (other(theirs.hidden) / 0.7).softmax(-1)
    torch.testing.assert_close(student.logprobs, ours[torch.arange(N), targets].log())
    torch.testing.assert_close(teacher.entropy, torch.distributions.Categorical(yours).entropy())
    kl = torch.distributions.kl_divergence(
        torch.distributions.Categorical(ours), torch.distributions.Categorical(yours)
    )
    torch.testing.assert_close(distance, kl)
    assert student.top_ids.tolist() == ours.sort(descending=True).indices[:, :2].tolist()


def test_teacher_gets_no_gradient() -> None:
    mine, _ = states(0)
    theirs, linear = states(1)
    _, _, distance = score_divergence(mine, theirs, torch.zeros(N).long(), reverse_kl, top_k=0)
    distance.sum().backward()
    assert mine.hidden.grad is not None
    assert theirs.hidden.grad is None
    assert linear.weight.grad is None


def two_rows(pad: int = 0) -> RolloutBatch:
    rows = [
        make_rollout([6, 7, 8, 2], prompt_ids=[3, 4, 5]),
        make_rollout([10, 2], prompt_ids=[9]),
    ]
    return make_batch(rows, pad_id=pad)


SIZES: dict[str, Any] = {
    "vocab_size": 16,
    "hidden_size": 32,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "pad_token_id": 0,
}


@pytest.mark.parametrize(
    "config",
    [
        Qwen3Config(**SIZES, head_dim=16, tie_word_embeddings=False),
        Gemma2Config(**SIZES, head_dim=16, final_logit_softcapping=2.0),
        CohereConfig(**SIZES, logit_scale=0.25),
        GraniteConfig(**SIZES, logits_scaling=3.0),
    ],
    ids=lambda c: c.model_type,
)
def test_equals_the_models_own_logits(config: PretrainedConfig) -> None:
    """Every architecture's scaling or capping of logits is applied as transformers does."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config).eval()
    with torch.no_grad():
        model.get_output_embeddings().weight.mul_(30)  # far from uniform
    batch = two_rows()
    got = score_tokens(
        response_states(model, batch, "student"), batch.response_ids[batch.response_mask], top_k=1
    )
    expected = []
    for rollout in batch.rollouts:
        ids = torch.tensor([rollout.prompt_ids + rollout.response_ids])
        logprobs = (model(ids).logits[0].float() / batch.temperature).log_softmax(-1)
        first = len(rollout.prompt_ids) - 1
        expected += [logprobs[first + t, y] for t, y in enumerate(rollout.response_ids)]
    torch.testing.assert_close(got.logprobs, torch.stack(expected), atol=1e-5, rtol=1e-5)


def test_u4_prompt_and_padding_do_not_matter_beyond_what_the_model_reads() -> None:
    """The pad id, whatever it is, changes nothing."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(Qwen3Config(**SIZES, head_dim=16)).eval()
    results = [
        score_tokens(
            response_states(model, batch, "student"),
            batch.response_ids[batch.response_mask],
            top_k=1,
        ).logprobs
        for batch in (two_rows(pad=0), two_rows(pad=13))
    ]
    torch.testing.assert_close(*results, atol=1e-6, rtol=0)
