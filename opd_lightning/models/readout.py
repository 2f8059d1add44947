"""Backbone, head and logit transform of a causal LM, measured by running its forward method.

Architectures scale or cap their logits under settings of different names and meanings (Granite
divides by `logits_scaling`, HyperCLOVAX multiplies), so none is read from the configuration.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from opd_lightning.errors import UserError, note, reason_of
from opd_lightning.models.head import Head

_SMALL, _LARGE = 2.0**-20, 1e30  # logits far below and far above any cap
_LOGITS = (0.0, _SMALL, 0.1, 1.0, 3.0, 10.0, 30.0, 100.0, -0.1, -1.0, -3.0, -10.0, -30.0, -100.0)
_CPU_ATTENTION = (None, "eager", "sdpa")
_ROUNDING = 4  # multiples of a dtype's resolution by which equal computations may differ


@dataclass(frozen=True, slots=True)
class Readout:
    """Parts of a causal LM that turn tokens into logits: backbone, head, transform of logits."""

    backbone: str  # name of the submodule; its last_hidden_state goes to the head
    scale: float = 1.0  # factor of the head's output
    softcap: float | None = None  # then softcap * tanh(logits / softcap)

    def head(self, lm: Any, temperature: float) -> Head:
        """Return the head of the model `lm` that this was measured on, or of a copy."""
        return Head(
            project=lm.get_output_embeddings(),
            vocab_size=lm.config.get_text_config().vocab_size,
            temperature=temperature,
            scale=self.scale,
            softcap=self.softcap,
        )


class UnknownReadoutError(UserError):
    """The model's logits are not a scaled and capped projection of a backbone's states."""


def readout_of(lm: Any) -> Readout:
    """Return the result of `measure` at loading; measure models that were loaded otherwise."""
    found: Readout | None = getattr(lm, "opd_readout", None)
    return found or measure(lm)


@torch.no_grad()
def measure(lm: Any) -> Readout:
    """Run the model's forward method with its backbone and head replaced by known values.

    No weights are read, so the model may be on the meta device.

    Raises:
        UnknownReadoutError: The class computes its logits in another way.
    """
    kind = type(lm).__name__
    project = lm.get_output_embeddings()
    if not isinstance(project, nn.Module):
        raise UnknownReadoutError(f"{kind} has no output embeddings, so it is no language model")
    hidden = torch.linspace(1, 2, lm.config.get_text_config().hidden_size)[None, None]
    raw = torch.tensor([[[*_LOGITS, _LARGE]]], dtype=torch.float64)
    backbone, given, logits = _forward(lm, hidden, raw)
    factor = _ratio(given, hidden)
    if factor is None:
        raise UnknownReadoutError(
            f"{kind} does not read its head on the states of its backbone, but on others made of "
            "them; use a causal language model"
        )
    if factor != 1 and getattr(project, "bias", None) is not None:
        raise UnknownReadoutError(f"{kind} scales the states before a head with a bias")
    *found, largest = logits.double().flatten().tolist()
    digits = 12 if logits.dtype == torch.float64 else 7
    softcap = None if largest > _LARGE / 1e6 else float(f"{largest:.{digits}g}")
    after = float(f"{found[_LOGITS.index(_SMALL)] / _SMALL:.{digits}g}")
    head = Head(project=project, vocab_size=1, temperature=1.0, scale=after, softcap=softcap)
    for value, own, ours in zip(_LOGITS, found, head.finish(raw).flatten().tolist(), strict=False):
        if abs(own - ours) > 1e-6 * max(1.0, abs(own)):
            raise UnknownReadoutError(
                f"{kind} turns a logit of {value:g} into {own:.6g}, which is neither a factor "
                "nor a softcap"
            )
    return Readout(backbone, scale=after * factor, softcap=softcap)


def _forward(lm: Any, hidden: Tensor, raw: Tensor) -> tuple[str, Tensor, Tensor]:
    """Run a model whose backbone returns `hidden` and whose head returns `raw`.

    Returns:
        The name of the backbone, the states that the head is given, and the model's logits.
    """
    kind = type(lm).__name__
    called: list[str] = []
    given: list[Tensor] = []

    def states_of(name: str) -> Callable[..., Any]:
        def forward(*_: Any, **__: Any) -> Any:
            called.append(name)
            return _Output(hidden)

        return forward

    def logits_of(states: Tensor) -> Tensor:
        given.append(states)
        return raw

    replaced = {module: states_of(name) for name, module in _backbones(lm).items()}
    with _replaced({**replaced, lm.get_output_embeddings(): logits_of}):
        try:
            tokens = torch.zeros(1, 1, dtype=torch.int64)
            logits = type(lm).forward(lm, input_ids=tokens, use_cache=False).logits
        except Exception as error:
            reason = reason_of(error, 120)
            raise UnknownReadoutError(
                f"{kind} does not read its head as causal language models do ({reason}); use one"
            ) from error
    if not called or len(given) != 1 or given[0].shape != hidden.shape:
        raise UnknownReadoutError(
            f"{kind} does not read its head once, after its backbone; use a causal language model"
        )
    return called[0], given[0], logits


def _backbones(lm: Any) -> dict[str, nn.Module]:
    """Return the modules that may be the backbone by name, outer ones first."""
    decoder = lm.get_decoder() if hasattr(lm, "get_decoder") else None
    inner = [name for name, module in lm.named_modules() if name and module is decoder]
    names = dict.fromkeys((lm.base_model_prefix, "model", *inner))
    modules = {name: getattr(lm, name, None) for name in names if "." not in name}
    modules |= {name: lm.get_submodule(name) for name in inner}
    return {name: module for name, module in modules.items() if isinstance(module, nn.Module)}


class _Output(dict[str, Any]):
    """Output of a backbone of any class; missing fields are None."""

    def __init__(self, hidden: Tensor) -> None:
        super().__init__(last_hidden_state=hidden)

    def __getattr__(self, name: str) -> Any:
        return self.get(name)

    def __getitem__(self, key: Any) -> Any:
        return tuple(self.values())[key] if isinstance(key, int) else super().get(key)


@contextmanager
def _replaced(forwards: dict[nn.Module, Callable[..., Any]]) -> Iterator[None]:
    """Replace the forward methods of modules."""
    before = {module: vars(module).get("forward") for module in forwards}
    try:
        for module, forward in forwards.items():
            module.forward = forward
        yield
    finally:
        for module, own in before.items():
            del module.forward
            if own is not None:  # set on the instance, as by hooks of other libraries
                module.forward = own


def _ratio(found: Tensor, expected: Tensor) -> float | None:
    """Return the factor between two tensors; None if there is none."""
    ratios = found.double() / expected.double()
    factor = float(f"{float(ratios.mean()):.7g}")
    return factor if bool(((ratios - factor).abs() < 1e-6 * abs(factor)).all()) else None


@torch.no_grad()
def check_logits(lm: Any, *, attention: str | None, training: bool = False) -> None:
    """Compare log-probs of a few tokens, as teachers and students read them, with the model's own.

    Runs two short rows, one of them padded, on the CPU; takes seconds for a few billion
    parameters. Prints a line if the model cannot run there.

    Args:
        lm: A loaded model in eval mode.
        attention: The attention kernel that it was loaded with.
        training: Switch to training mode after the reference log-probs are computed, which
            reveals noise that cannot be disabled.

    Raises:
        UnknownReadoutError: They differ by more than rounding, tokens see later ones or padding,
            or a logit is not finite.
    """
    kind = type(lm).__name__
    readout = readout_of(lm)
    ids, mask = _probe(lm.config.get_text_config())
    with runs_on_cpu(lm, attention) as result:
        own = lm(input_ids=ids, attention_mask=mask, use_cache=False).logits
        if training:
            train_without_noise(lm)
        backbone = lm.get_submodule(readout.backbone)
        states = backbone(input_ids=ids, attention_mask=mask, use_cache=False).last_hidden_state
        result.append(readout.head(lm, 1.0).finish(lm.get_output_embeddings()(states)))
    if not result:
        return
    real = mask.bool()
    if not bool(own[real].isfinite().all()):
        raise UnknownReadoutError(
            f"the logits of {kind} are not finite in {own.dtype}; use float32 or bfloat16, or get "
            "the weights again"
        )
    resolution = torch.finfo(own.dtype).eps
    size = max(1.0, float(own[real].abs().max()))
    gap = _distance(result[0][real], own[real])
    if not gap <= _ROUNDING * resolution * size + 1e-5:
        raise UnknownReadoutError(
            f"log-probs of {kind} would be read {gap:.3g} nats off its own"
            + (" (such as by dropout that stays on in training mode)" if training else "")
            + "; use another model"
        )
    shared = _distance(own[0, :_SHARED], own[1, :_SHARED])
    if not shared <= resolution**0.5 * size:
        raise UnknownReadoutError(
            f"log-probs of {kind} depend on later tokens or on padding ({shared:.3g} nats), so "
            "they are no probabilities of a next token; use a causal model"
        )


def train_without_noise(lm: Any) -> None:
    """Switch to training mode, where checkpointing works, without dropout and noise of routers."""
    for module in lm.train().modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
        for name, value in list(vars(module).items()):
            if isinstance(value, float) and "drop" in name:  # a rate of functional dropout
                setattr(module, name, 0.0)
            elif "jitter" in name:  # some models use it as a threshold
                module.training = False


@contextmanager
def runs_on_cpu(lm: Any, attention: str | None, stand_in: str = "eager") -> Iterator[list[Tensor]]:
    """Use an attention kernel of the CPU; print a line if the model does not run there at all.

    Yields a list for the results, which is empty then.

    Args:
        lm: The model.
        attention: Its kernel, which `stand_in` replaces unless it is one of the CPU.
        stand_in: A kernel of the CPU.
    """
    results: list[Tensor] = []
    swaps = attention not in _CPU_ATTENTION
    try:
        if swaps:
            lm.set_attn_implementation(stand_in)
        yield results
    except (RuntimeError, NotImplementedError, ImportError) as error:
        results.clear()
        kind, reason = type(lm).__name__, reason_of(error, 120)
        note(f"{kind} does not run on the CPU, so its log-probs were not compared ({reason})")
    finally:
        if swaps:
            lm.set_attn_implementation(attention)


_LENGTH, _SHARED = 4, 2  # tokens of a row, and first tokens that both rows share


def _probe(config: Any) -> tuple[Tensor, Tensor]:
    """Return ids and mask `[2, 4]` of rows that begin alike; the second is padded."""
    ids = torch.tensor(probe_tokens(config, 2 * _LENGTH)).view(2, _LENGTH)
    ids[1, :_SHARED] = ids[0, :_SHARED]
    mask = torch.ones_like(ids)
    mask[1, _SHARED + 1 :] = 0
    return ids, mask


def probe_tokens(config: Any, count: int) -> list[int]:
    """Return ids of ordinary tokens, in no order, for comparisons of short sequences."""
    known = [i for i in range(3, min(config.vocab_size, 1000)) if i != config.pad_token_id]
    return [known[7 * i % len(known)] for i in range(count)]


def _distance(one: Tensor, other: Tensor) -> float:
    """Return the largest difference of log-probs, in nats."""
    return float((one.float().log_softmax(-1) - other.float().log_softmax(-1)).abs().max())
