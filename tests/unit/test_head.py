"""The chunked head equals the model's own logits, whole, in value and gradient."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from transformers import (
    AutoModelForCausalLM,
    CohereConfig,
    Gemma2Config,
    GraniteConfig,
    PretrainedConfig,
    Qwen3Config,
)

from opd_lightning.losses.divergence import ReverseKL
from opd_lightning.models import head as head_module
from opd_lightning.models.causal_lm import response_states
from opd_lightning.models.head import (
    Comparison,
    Distribution,
    Head,
    TokenStates,
    TopLogprobs,
    score,
    top_k_of,
)
from opd_lightning.types import RolloutBatch
from tests.batches import make_batch, make_rollout

N, H, V, K = 37, 8, 11, 4
TEMPERATURE = 0.7


def forward_kl(student: Tensor, teacher: Tensor | None) -> Tensor:
    """Divergence over tokens with teacher log-probs, for teachers with a top-k."""
    assert teacher is not None
    known = teacher.isfinite()
    log_ratio = torch.where(known, teacher, 0.0) - torch.where(known, student, 0.0)
    return (teacher.exp() * log_ratio).sum(-1)


def kl(student: Tensor, teacher: Tensor | None) -> Tensor:
    assert teacher is not None
    return ReverseKL()(student, teacher)


def sharpness(student: Tensor, teacher: Tensor | None) -> Tensor:
    assert teacher is None
    return student.exp().square().sum(-1)


SHARP = Comparison(None, sharpness)


def states(
    seed: int, rows: int = N, dtype: torch.dtype = torch.float64, **head: Any
) -> tuple[TokenStates, nn.Linear]:
    torch.manual_seed(seed)
    linear = nn.Linear(H, V, bias=False, dtype=dtype)
    hidden = torch.randn(rows, H, dtype=dtype, requires_grad=True)
    made = Head(project=linear, vocab_size=V, temperature=TEMPERATURE, **head)
    return TokenStates(hidden, made), linear


def whole(of: TokenStates) -> Tensor:
    """Full log-probs, unchunked, by autograd."""
    logits = of.head.project(of.hidden)
    logits = (logits if logits.dtype == torch.float64 else logits.float()) * of.head.scale
    if of.head.softcap is not None:
        logits = of.head.softcap * torch.tanh(logits / of.head.softcap)
    return (logits / of.head.temperature).log_softmax(-1)


def teacher_of(kind: str, rows: int = N) -> tuple[Distribution, Tensor]:
    """A teacher and its full log-probs."""
    theirs, _ = states(1, rows)
    full = whole(theirs).detach()
    if kind == "states":
        return theirs, full
    if kind == "logprobs":
        return full, full
    best = full.topk(K, dim=-1)
    known = torch.full_like(full, -torch.inf).scatter(1, best.indices, best.values)
    return TopLogprobs(best.indices, best.values), known


def targets_of(rows: int = N) -> Tensor:
    return torch.arange(rows) % V


def small_chunks(monkeypatch: pytest.MonkeyPatch, chunk: int, block: int = 2) -> None:
    monkeypatch.setattr(head_module, "MAX_CHUNK_ELEMENTS", chunk * V)
    monkeypatch.setattr(head_module, "MAX_BLOCK_ELEMENTS", block * V)


HEADS: dict[str, dict[str, Any]] = {
    "plain": {},
    "scaled": {"scale": 0.3},
    "capped": {"softcap": 1.5, "scale": 2.0},
}


@pytest.mark.parametrize("transform", HEADS)
@pytest.mark.parametrize(
    ("kind", "chunk"),
    [("states", 1), ("states", 5), ("states", N), ("logprobs", 5), ("top", 5)],
)
@pytest.mark.parametrize("biased", [False, True])
def test_equals_the_plain_computation(
    monkeypatch: pytest.MonkeyPatch, transform: str, kind: str, chunk: int, biased: bool
) -> None:
    """Log-probs and several values, in one backward pass, by either way through the head."""
    small_chunks(monkeypatch, chunk)
    mine, linear = states(0, **HEADS[transform])
    if biased:  # this way goes through autograd, as adapters do
        linear.bias = nn.Parameter(torch.randn(V, dtype=torch.float64))
    teacher, full = teacher_of(kind)
    comparisons = {
        "forward": Comparison(teacher, forward_kl),
        "sharpness": Comparison(None, sharpness),
        "weighed": Comparison(None, lambda x, _, w: w * sharpness(x, None), [torch.arange(N)]),
    }
    if kind != "top":
        comparisons["reverse"] = Comparison(teacher, kl)
    got = score(mine, targets_of(), top_k=3, comparisons=comparisons)

    ours = whole(mine)
    expected = {
        name: c.function(ours, None if c.teacher is None else full, *c.given)
        for name, c in comparisons.items()
    }
    chosen = ours.gather(1, targets_of()[:, None]).squeeze(1)
    torch.testing.assert_close(got.student.logprobs, chosen)
    torch.testing.assert_close(got.student.entropy, -(ours.exp() * ours).sum(-1))
    assert got.student.top_ids.tolist() == ours.topk(3).indices.tolist()
    torch.testing.assert_close(got.student.top_logprobs, ours.topk(3).values)
    assert not got.student.top_logprobs.requires_grad
    assert got.values.keys() == expected.keys()
    assert got.teachers.keys() == expected.keys() - {"sharpness", "weighed"}
    theirs = got.teachers["forward"]
    torch.testing.assert_close(theirs.entropy, torch.special.entr(full.exp()).sum(-1))
    assert theirs.top_ids.tolist() == full.topk(3).indices.tolist()
    torch.testing.assert_close(theirs.top_logprobs, full.topk(3).values)

    up = torch.linspace(-1, 2, N, dtype=torch.float64)
    parameters = [mine.hidden, *linear.parameters()]

    def loss(logprobs: Tensor, values: dict[str, Tensor]) -> Tensor:
        return (up * logprobs + sum((i + 2) * v for i, v in enumerate(values.values()))).sum()

    for a, b in zip(
        torch.autograd.grad(loss(got.student.logprobs, got.values), parameters),
        torch.autograd.grad(loss(chosen, expected), parameters),
        strict=True,
    ):
        torch.testing.assert_close(a, b)


def test_one_pass_equals_separate_passes(monkeypatch: pytest.MonkeyPatch) -> None:
    small_chunks(monkeypatch, 5)
    mine, linear = states(0)
    teacher, _ = teacher_of("states")
    comparisons = {"f": Comparison(teacher, forward_kl), "r": Comparison(teacher, kl)}
    together = score(mine, targets_of(), comparisons=comparisons)
    loss = together.student.logprobs.sum() + sum(v.sum() for v in together.values.values())
    expected = torch.autograd.grad(score(mine, targets_of()).student.logprobs.sum(), linear.weight)
    total = expected[0]
    for name, comparison in comparisons.items():
        value = score(mine, targets_of(), comparisons={name: comparison}).values[name]
        torch.testing.assert_close(together.values[name], value)
        total = total + torch.autograd.grad(value.sum(), linear.weight)[0]
    assert isinstance(loss, Tensor)
    torch.testing.assert_close(torch.autograd.grad(loss, linear.weight)[0], total)


def test_a_shared_teacher_is_read_once_per_chunk(monkeypatch: pytest.MonkeyPatch) -> None:
    small_chunks(monkeypatch, 10)
    mine, _ = states(0)
    theirs, linear = states(1)
    calls = []

    def project(hidden: Tensor) -> Tensor:
        calls.append(len(hidden))
        return linear(hidden)

    teacher = TokenStates(theirs.hidden, replace(theirs.head, project=project))
    comparisons = {"f": Comparison(teacher, forward_kl), "r": Comparison(teacher, kl)}
    score(mine, targets_of(), comparisons=comparisons)
    assert calls == [10, 10, 10, 7]


LOSSES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "a multiple of the sum": lambda value, logprobs: value.sum() / 7,
    "weights": lambda value, logprobs: (value * torch.arange(N)).sum(),
    "some left out": lambda value, logprobs: value[1:].sum(),
    "log-probs too": lambda value, logprobs: value.sum() + logprobs[0],
    "log-probs alone": lambda value, logprobs: logprobs.sum(),
}


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("chunk", [1, 5, N])
def test_gradients_that_come_with_the_values(
    monkeypatch: pytest.MonkeyPatch, loss: str, chunk: int
) -> None:
    """They are those of any loss; if it only sums the values, both heads are read once."""
    small_chunks(monkeypatch, chunk)
    mine, linear = states(0, softcap=1.5)
    theirs, matrix = states(1)
    reads = []

    def project(hidden: Tensor) -> Tensor:
        reads.append(len(hidden))
        return matrix(hidden)

    teacher = TokenStates(theirs.hidden, replace(theirs.head, project=project))
    found = {}
    for is_summed in (False, True):
        reads.clear()
        comparison = Comparison(teacher, kl, is_summed=is_summed)
        got = score(mine, targets_of(), top_k=2, comparisons={"other": SHARP, "r": comparison})
        gradients = torch.autograd.grad(
            LOSSES[loss](got.values["r"], got.student.logprobs), [mine.hidden, linear.weight]
        )
        found[is_summed] = [*gradients, got.values["r"], *got.student, *got.teachers["r"]]
        assert sum(reads) == (N if is_summed and loss == "a multiple of the sum" else 2 * N)
    for a, b in zip(found[True], found[False], strict=True):
        torch.testing.assert_close(a, b)


def test_gradients_come_with_the_values_once() -> None:
    mine, linear = states(0)
    comparison = Comparison(teacher_of("states")[0], kl, is_summed=True)
    value = score(mine, targets_of(), comparisons={"r": comparison}).values["r"].sum()
    first, second = (
        torch.autograd.grad(value, [mine.hidden, linear.weight], retain_graph=True)
        for _ in range(2)
    )
    for a, b in zip(first, second, strict=True):
        torch.testing.assert_close(a, b)
    with torch.no_grad():  # as before a step that is prepared as a whole
        assert not score(mine, targets_of(), comparisons={"r": comparison}).values["r"].grad_fn


def test_finite_differences(monkeypatch: pytest.MonkeyPatch) -> None:
    small_chunks(monkeypatch, 2, 1)
    made, _ = states(0, rows=3, softcap=2.0)
    teacher, _ = teacher_of("states", rows=3)

    def outputs(hidden: Tensor) -> tuple[Tensor, Tensor]:
        comparisons = {"r": Comparison(teacher, kl)}
        got = score(TokenStates(hidden, made.head), targets_of(3), comparisons=comparisons)
        return got.student.logprobs, got.values["r"]

    assert torch.autograd.gradcheck(outputs, (made.hidden,))


def test_the_same_distribution_gives_no_gradient() -> None:
    mine, linear = states(0)
    value = score(mine, targets_of(), comparisons={"r": Comparison(mine, kl)}).values["r"]
    value.sum().backward()
    assert mine.hidden.grad is not None
    assert linear.weight.grad is not None
    torch.testing.assert_close(value, torch.zeros_like(value))
    assert mine.hidden.grad.abs().max() < 1e-14
    assert linear.weight.grad.abs().max() < 1e-14


def test_an_unused_infinite_value_spoils_nothing() -> None:
    mine, _ = states(0)
    teacher, _ = teacher_of("top")
    got = score(mine, targets_of(), comparisons={"r": Comparison(teacher, kl)})
    assert got.values["r"].isinf().all()
    got.student.logprobs.sum().backward()
    assert mine.hidden.grad is not None
    assert mine.hidden.grad.isfinite().all()


@pytest.mark.parametrize("is_summed", [False, True])
def test_a_value_that_ignores_the_student_has_no_gradient(is_summed: bool) -> None:
    mine, _ = states(0)
    teacher, _ = teacher_of("logprobs")
    comparisons = {"t": Comparison(teacher, lambda _, t: kl(t, t - 1), is_summed=is_summed)}
    score(mine, targets_of(), comparisons=comparisons).values["t"].sum().backward()
    assert mine.hidden.grad is not None
    assert not mine.hidden.grad.any()


@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize("is_summed", [False, True])
def test_no_tokens(biased: bool, is_summed: bool) -> None:
    mine, linear = states(0, rows=0)
    if biased:
        linear.bias = nn.Parameter(torch.randn(V, dtype=torch.float64))
    teacher, _ = teacher_of("states", rows=0)
    comparisons = {"r": Comparison(teacher, kl, is_summed=is_summed)}
    got = score(mine, targets_of(0), top_k=3, comparisons=comparisons)
    assert got.student.top_ids.shape == (0, 3)
    value = got.values["r"].sum()
    (value if is_summed else value + got.student.logprobs.sum()).backward()
    assert linear.weight.grad is not None
    assert not linear.weight.grad.any()
    assert mine.hidden.grad is not None
    assert mine.hidden.grad.shape == (0, H)


@pytest.mark.parametrize("autocast", [False, True], ids=["bf16 weights", "autocast"])
@pytest.mark.parametrize("is_summed", [False, True])
def test_bfloat16_is_as_exact_as_the_plain_computation(
    monkeypatch: pytest.MonkeyPatch, autocast: bool, is_summed: bool
) -> None:
    small_chunks(monkeypatch, 5)
    mine, linear = states(0, dtype=torch.float32 if autocast else torch.bfloat16)
    theirs, _ = states(1, dtype=torch.float32)
    comparisons = {"r": Comparison(theirs, kl, is_summed=is_summed)}
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        got = score(mine, targets_of(), comparisons=comparisons)
        ours = whole(mine)
        with torch.no_grad(), torch.autocast("cpu", enabled=False):
            full = whole(theirs)
    expected = kl(ours, full)
    assert got.values["r"].dtype == torch.float32
    torch.testing.assert_close(got.values["r"], expected)
    for a, b in zip(
        torch.autograd.grad(got.values["r"].sum(), [mine.hidden, linear.weight]),
        torch.autograd.grad(expected.sum(), [mine.hidden, linear.weight]),
        strict=True,
    ):
        assert a.dtype == b.dtype
        torch.testing.assert_close(a, b, atol=2e-2, rtol=2e-2)


@pytest.mark.parametrize("is_summed", [False, True])
def test_sums_of_many_chunks_in_bfloat16_lose_nothing(
    monkeypatch: pytest.MonkeyPatch, is_summed: bool
) -> None:
    """Equal tokens: in bfloat16 alone, a sum of 256 of them would not change by one more."""
    small_chunks(monkeypatch, 1, 1)
    found = []
    for dtype in (torch.bfloat16, torch.float64):
        mine, linear = states(0, rows=400, dtype=torch.bfloat16)
        linear.to(dtype)
        hidden = mine.hidden[:1].detach().to(dtype).expand(400, H).requires_grad_()
        of = TokenStates(hidden, mine.head)
        comparison = Comparison(None, sharpness, is_summed=is_summed)
        got = score(of, targets_of(400), comparisons={"s": comparison})
        found.append(torch.autograd.grad(got.values["s"].sum() / 7, linear.weight)[0].double())
    torch.testing.assert_close(*found, rtol=2**-6, atol=1e-3)
    assert found[1].abs().max() > 0.1


def test_autocast_still_trains_the_weight_elsewhere() -> None:
    """Autocast caches what it casts; nothing may be cached while gradients are off."""
    mine, linear = states(0, dtype=torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        score(mine, targets_of())
        linear(mine.hidden).sum().backward()
    assert linear.weight.grad is not None


def test_teacher_gets_no_gradient() -> None:
    mine, _ = states(0)
    theirs, linear = states(1)
    got = score(mine, targets_of(), comparisons={"r": Comparison(theirs, kl)})
    assert not got.teachers["r"].logprobs.requires_grad
    got.values["r"].sum().backward()
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
    got = score(
        response_states(model, batch, "student"), batch.response_ids[batch.response_mask]
    ).student
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
        score(
            response_states(model, batch, "student"), batch.response_ids[batch.response_mask]
        ).student.logprobs
        for batch in (two_rows(pad=0), two_rows(pad=13))
    ]
    torch.testing.assert_close(*results, atol=1e-6, rtol=0)


def test_tied_weights_and_adapters_get_their_gradients(monkeypatch: pytest.MonkeyPatch) -> None:
    """Through a whole model: a head tied to the embedding, and LoRA on an untied one."""
    monkeypatch.setattr(head_module, "MAX_CHUNK_ELEMENTS", 2 * SIZES["vocab_size"])
    for tied in (True, False):
        torch.manual_seed(0)
        config = Qwen3Config(**SIZES, head_dim=16, tie_word_embeddings=tied)
        model: Any = AutoModelForCausalLM.from_config(config).double()
        if not tied:
            lora = LoraConfig(r=2, target_modules=["lm_head"], init_lora_weights=False)
            model = get_peft_model(model, lora).double()
        batch = two_rows()
        of = response_states(model, batch, "student")
        targets = batch.response_ids[batch.response_mask]
        parameters = [p for p in model.parameters() if p.requires_grad]
        got = score(of, targets, comparisons={"s": Comparison(None, sharpness)})
        ours = whole(of)
        chosen = ours.gather(1, targets[:, None]).sum()
        losses = (
            got.student.logprobs.sum() + got.values["s"].sum(),
            chosen + sharpness(ours, None).sum(),
        )
        a, b = (torch.autograd.grad(loss, parameters, retain_graph=True) for loss in losses)
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("rows", [0, 5])
@pytest.mark.parametrize(
    ("size", "k"), [(11, 0), (11, 4), (11, 11), (11, 20), (640, 10), (639, 10)]
)
def test_the_likeliest_are_torchs_top_k(rows: int, size: int, k: int) -> None:
    torch.manual_seed(0)
    logprobs = torch.randn(rows, size, requires_grad=True).log_softmax(-1)
    logprobs = logprobs.masked_fill(torch.arange(size) == 3, -torch.inf)
    ids, found = top_k_of(logprobs, k)
    expected = logprobs.topk(min(k, size))
    assert torch.equal(ids, expected.indices)
    assert torch.equal(found, expected.values)
    assert not found.requires_grad


def test_of_equals_the_likeliest_are_each_there_once() -> None:
    ids, found = top_k_of(torch.zeros(3, 9), 5)
    assert all(len(set(row)) == 5 for row in ids.tolist())
    assert torch.equal(found, torch.zeros(3, 5))
