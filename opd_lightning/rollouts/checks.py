"""Checks of weights and requests, shared by the engines."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence

import torch
from torch import Tensor

from opd_lightning.errors import RunStoppedError, UserError
from opd_lightning.rollouts.base import Engine, Request, Sampling
from opd_lightning.types import Completion


def checked_weights(
    weights: Iterable[tuple[str, Tensor]], shapes: Mapping[str, torch.Size]
) -> Iterator[tuple[str, Tensor]]:
    """Yield `weights`; raise UserError unless each name of `shapes` comes once, in its shape."""
    missing = set(shapes)
    for name, tensor in weights:
        if name not in missing:
            problem = "came twice" if name in shapes else "is not a parameter of the engine's model"
            raise UserError(f"engine weights: {name!r} {problem}; push the student's own names")
        if tensor.shape != shapes[name]:
            raise UserError(
                f"engine weights: {name!r} has shape {list(tensor.shape)}, "
                f"the engine's model expects {list(shapes[name])}"
            )
        missing.remove(name)
        yield name, tensor
        del tensor  # before the next is gathered
    if missing:
        raise UserError(
            f"engine weights: {len(missing)} of {len(shapes)} never came, {min(missing)!r} "
            "among them; push all of them at once"
        )


def check_lengths(requests: Sequence[Request], sampling: Sampling, max_length: int) -> None:
    """Raise UserError if a request could exceed the engine's `max_length` tokens."""
    longest = max((len(request.prompt_ids) for request in requests), default=0)
    if longest + sampling.max_new_tokens > max_length:
        raise UserError(
            f"a prompt of {longest} tokens and sampling.max_new_tokens={sampling.max_new_tokens} "
            f"exceed the engine's {max_length} tokens; shorten one of them or raise the limit"
        )


def checked_completions(
    engine: Engine,
    requests: Sequence[Request],
    sampling: Sampling,
    completions: list[Completion],
) -> list[Completion]:
    """Return an engine's completions; raise RunStoppedError unless they fit the requests."""
    call = f"{type(engine).__name__}.generate"
    if len(completions) != len(requests):
        raise RunStoppedError(
            f"{call}: got {len(completions)} completions for {len(requests)} requests, expected "
            "one for each, in their order"
        )
    for one in completions:
        length = len(one.response_ids)
        if length != len(one.logprobs):
            raise RunStoppedError(
                f"{call}: got {len(one.logprobs)} log-probs for a response of {length} tokens, "
                "expected one for each"
            )
        if length > sampling.max_new_tokens:
            raise RunStoppedError(
                f"{call}: got a response of {length} tokens, expected at most "
                f"{sampling.max_new_tokens} (max_new_tokens)"
            )
    return completions
