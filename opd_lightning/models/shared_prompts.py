"""Prompts that several rows of a micro-batch share, read once where no gradient is needed.

The prompts are read first, then the responses, which attend to the keys and values of their
prompts. Prompts are stored padded on the right, and shifted to the left when they are read, before
responses padded on the right: no padding is within a sequence, so windows of attention count its
tokens alone. Kernels that take the bounds of sequences read both packed.
"""

from __future__ import annotations

import inspect
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer

from opd_lightning.models.packing import (
    ROUNDING,
    PackedRow,
    is_packed,
    is_varlen,
    other_states,
)
from opd_lightning.models.padding import make_view, pad
from opd_lightning.models.readout import probe_tokens, readout_of, runs_on_cpu
from opd_lightning.models.varlen import VARLEN
from opd_lightning.types import View

# Sharing takes two passes, so it has to save this many positions, and this share of them.
MIN_SAVED = 1024
MIN_SHARE = 0.25
_BY_LENGTH = ("dynamic", "longrope")  # rotary embeddings that depend on a pass's longest sequence


@dataclass(frozen=True, slots=True, kw_only=True)
class SharedPrompts:
    """B rows, of which several continue one of U prompts of at most P tokens.

    Responses have at most R tokens. The last token of a response predicts nothing, so it is not
    read.
    """

    prompts: Tensor  # [U, P] int64, padded on the right
    lengths: Tensor  # [U] int64, tokens of the prompts
    rows: Tensor  # [B] int64, the prompt of each row
    responses: Tensor  # [B, R - 1] int64
    real: Tensor  # [B, R - 1] bool, False on padding

    @classmethod
    def of(cls, view: View, response_length: int) -> SharedPrompts:
        """Find equal prompts in a view with responses of at most `response_length` tokens."""
        ids, lengths = view.input_ids, view.prompt_lengths
        places = torch.arange(ids.shape[1], device=ids.device)
        prompts = ids.masked_fill(places >= lengths[:, None], -1)[:, : int(lengths.max())]
        distinct, rows = torch.unique(prompts, dim=0, return_inverse=True)
        last = ids.shape[1] - 1
        at = lengths[:, None] + places[: max(response_length - 1, 0)]  # where responses are read
        following = view.attention_mask.gather(1, (at + 1).clamp(max=last)).bool()
        return cls(
            prompts=distinct.clamp(min=0),
            lengths=(distinct >= 0).sum(dim=1),
            rows=rows,
            responses=ids.gather(1, at.clamp(max=last)),
            real=(at < last) & following,
        )

    def positions(self, *, packed: bool) -> int:
        """Return the number of positions that are read, padding included unless packed."""
        if packed:
            return int(self.lengths.sum() + self.real.sum())
        return self.prompts.numel() + self.responses.numel()

    @torch.no_grad()
    def read(self, backbone: nn.Module, response_mask: Tensor) -> Tensor:
        """Return the states `[N, H]` that predict the tokens of `response_mask [B, R]`."""
        cache = DynamicCache()
        packs = is_varlen(getattr(backbone, "config", None))
        read = self._read_packed if packs else self._read_padded
        states, starts = read(backbone, cache)
        rows, columns = response_mask.nonzero(as_tuple=True)
        # The prompt's last token predicts the first of the response.
        return states[torch.where(columns == 0, self.rows[rows], starts[rows] + columns - 1)]

    def _read_padded(self, backbone: nn.Module, cache: DynamicCache) -> tuple[Tensor, Tensor]:
        """Return states, the U last ones of prompts first, and where each row's begin `[B]`."""
        longest = self.prompts.shape[1]
        places = torch.arange(longest, device=self.rows.device) - (longest - self.lengths)[:, None]
        known, places = places >= 0, places.clamp(min=0)
        prompts = _call(backbone, cache, self.prompts.gather(1, places), places, known)
        states = prompts[:, -1]
        count, width = self.responses.shape
        starts = len(states) + width * torch.arange(count, device=self.rows.device)
        if not width:
            return states, starts
        _continue(cache, self.rows)
        after = self.lengths[self.rows, None] + torch.arange(width, device=self.rows.device)
        mask = torch.cat([known[self.rows], self.real], dim=1)
        responses = _call(backbone, cache, self.responses, after, mask)
        return torch.cat([states, responses.flatten(0, 1)]), starts

    def _read_packed(self, backbone: nn.Module, cache: DynamicCache) -> tuple[Tensor, Tensor]:
        """As `_read_padded`, for kernels that take bounds of sequences."""
        places = torch.arange(self.prompts.shape[1], device=self.rows.device)
        known = places < self.lengths[:, None]
        prompts = PackedRow.of(self.prompts, known, places)
        own = prompts.arguments(backbone) | {"past_key_values": cache, "use_cache": True}
        states = backbone(input_ids=prompts.input_ids, **own).last_hidden_state[0]
        states = states[prompts.bounds[1:] - 1]
        columns = torch.arange(self.real.shape[1], device=self.rows.device)
        after = self.lengths[self.rows, None] + columns
        responses = PackedRow.of(self.responses, self.real, after)
        begins = responses.bounds[:-1].long()
        if not responses.input_ids.numel():
            return states, len(states) + begins
        # Where the keys of every row are among those of the prompts, then of the responses.
        of_prompt = prompts.bounds[:-1][self.rows, None] + places
        of_response = prompts.input_ids.shape[1] + begins[:, None] + columns
        mask = torch.cat([known[self.rows], self.real], dim=1)
        _continue(cache, torch.cat([of_prompt, of_response], dim=1)[mask], packed=True)
        own = responses.arguments(backbone) | {"past_key_values": cache, "use_cache": True}
        ends = mask.sum(dim=1).cumsum(dim=0)
        own |= {
            "cu_seq_lens_k": nn.functional.pad(ends, (1, 0)).int(),
            "max_length_k": mask.shape[1],
        }
        found = backbone(input_ids=responses.input_ids, **own).last_hidden_state[0]
        return torch.cat([states, found]), len(states) + begins


class _Continued(DynamicLayer):
    """Keys and values of prompts in one layer, for rows that continue them; keeps no others.

    Args:
        read: The layer's keys and values of the prompts.
        chosen: The prompt of each row, or with `packed` the place of each row's keys one after
            another, the new ones after those of the prompts.
        packed: Whether rows are packed.
    """

    def __init__(self, read: DynamicLayer, chosen: Tensor, *, packed: bool) -> None:
        super().__init__()
        self.keys, self.values, self.is_initialized = read.keys, read.values, True
        self.dtype, self.device = read.dtype, read.device
        self.chosen, self.packed = chosen, packed

    def update(
        self, key_states: Tensor, value_states: Tensor, *_: Any, **__: Any
    ) -> tuple[Tensor, Tensor]:
        return self._joined(self.keys, key_states), self._joined(self.values, value_states)

    def _joined(self, of_prompts: Tensor, new: Tensor) -> Tensor:
        if self.packed:
            return torch.cat([of_prompts, new], dim=2).index_select(2, self.chosen)
        return torch.cat([of_prompts[self.chosen], new], dim=2)


def _continue(cache: DynamicCache, chosen: Tensor, *, packed: bool = False) -> None:
    cache.layers = [_Continued(layer, chosen, packed=packed) for layer in cache.layers]


def _call(
    backbone: nn.Module, cache: DynamicCache, ids: Tensor, places: Tensor, mask: Tensor
) -> Tensor:
    """Return the last hidden states of rows `[rows, tokens]`, after what the cache holds."""
    arguments: dict[str, Any] = {"past_key_values": cache, "use_cache": True}
    if "position_ids" in inspect.signature(backbone.forward).parameters:
        # Others count them in the mask.
        arguments["position_ids"] = places
    output = backbone(input_ids=ids, attention_mask=mask.long(), **arguments)
    states: Tensor = output.last_hidden_state
    return states


def shared_prompts(lm: Any, view: View, response_mask: Tensor) -> SharedPrompts | None:
    """Return the prompts that rows of a view share, or None where reading them once does not pay.

    Args:
        lm: Causal LM, for which `check_sharing` has decided.
        view: The rows.
        response_mask: `[B, R]` bool.
    """
    count, width = view.input_ids.shape
    if torch.is_grad_enabled() or not getattr(lm, "opd_shares_prompts", False):
        return None
    if (count - 1) * width < MIN_SAVED:  # known without waiting for the device
        return None
    if lm.training and getattr(lm, "is_gradient_checkpointing", False):  # which keeps no cache
        return None
    packs = is_packed(lm, view.input_ids.device)
    if is_varlen(lm.config) and not packs:
        return None
    found = SharedPrompts.of(view, response_mask.shape[1])
    plain = int(view.attention_mask.sum()) if packs else view.attention_mask.numel()
    saved = plain - found.positions(packed=is_varlen(lm.config))
    return found if saved >= max(MIN_SAVED, MIN_SHARE * plain) else None


@torch.no_grad()
def check_sharing(lm: Any, *, attention: str | None) -> None:
    """Decide whether a loaded causal LM reads shared prompts once: `lm.opd_shares_prompts`.

    It does if it keeps nothing of a prompt but keys and values, and the states of a few short rows
    are those of whole rows, on the CPU, within rounding.
    """
    lm.opd_shares_prompts = False
    if other_states(lm) or _embeds_by_length(lm):
        return
    backbone = lm.get_submodule(readout_of(lm).backbone)
    tokens = probe_tokens(lm.config.get_text_config(), 9)
    responses = [tokens[5:8], tokens[7:], tokens[:1]]
    view = make_view([tokens[:3], tokens[:3], tokens[3:5]], responses, tokens[0])
    mask, given = pad(responses, 0)[1], {"attention_mask": view.attention_mask, "use_cache": False}
    # Code that takes another kind of cache, or none, ends in errors of many kinds.
    with runs_on_cpu(lm, attention) as whole, suppress(Exception):
        states = backbone(input_ids=view.input_ids, **given).last_hidden_state
        whole.append(states.flatten(0, 1)[view.predicting_positions(mask)])
    stand_in = VARLEN if is_varlen(lm.config) else "eager"
    with runs_on_cpu(lm, attention, stand_in) as shared, suppress(Exception):
        shared.append(SharedPrompts.of(view, mask.shape[1]).read(backbone, mask))
    if whole and shared:
        rounding = ROUNDING * torch.finfo(whole[0].dtype).eps * float(whole[0].abs().max())
        lm.opd_shares_prompts = float((shared[0] - whole[0]).abs().max()) <= rounding


def _embeds_by_length(lm: Any) -> bool:
    """Return whether a token's embedded position depends on the longest sequence of a pass."""
    rope = getattr(lm.config.get_text_config(), "rope_parameters", None) or {}
    kinds = {one.get("rope_type") for one in (rope, *rope.values()) if isinstance(one, dict)}
    return not kinds.isdisjoint(_BY_LENGTH)
