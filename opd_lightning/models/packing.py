"""Packing: the sequences of a micro-batch in one row, one after the other, without padding.

The row has no attention mask. Its `position_ids` begin at 0 in every sequence, and transformers
keeps sequences apart by them: with flash attention through the kernel's sequence bounds, with
others through a mask `[T, T]`, which costs more than padding.
"""

from __future__ import annotations

import inspect
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn

from opd_lightning.errors import UserError
from opd_lightning.models.readout import probe_tokens, readout_of, runs_on_cpu

Packing = Literal["auto", "on", "off"]

ROUNDING = 16  # multiples of a dtype's resolution by which equal states may differ
_KEEPS_APART = frozenset({"full_attention", "sliding_attention"})  # kinds of layers
_LENGTHS = (4, 2, 3)  # tokens of the sequences that are compared


class PackedRow(NamedTuple):
    """B sequences in one row of T tokens."""

    input_ids: Tensor  # [1, T] int64
    position_ids: Tensor  # [1, T] int64, from 0 in every sequence
    bounds: Tensor  # [B + 1] int32, where sequences begin, and T
    longest: int  # tokens of the longest sequence

    @classmethod
    def of(cls, ids: Tensor, real: Tensor, positions: Tensor) -> PackedRow:
        """Pack rows `[B, L]` of ids and their positions, without padding: where `real` is True."""
        return cls(
            input_ids=ids[real][None],
            position_ids=positions.expand_as(real)[real][None],
            bounds=nn.functional.pad(real.sum(dim=1).cumsum(dim=0), (1, 0)).int(),
            longest=real.shape[1],
        )

    def read(self, backbone: nn.Module) -> Tensor:
        """Return the last hidden states of all tokens, `[T, H]`."""
        output = backbone(input_ids=self.input_ids, **self.arguments(backbone))
        states: Tensor = output.last_hidden_state[0]
        return states

    def arguments(self, backbone: nn.Module) -> dict[str, Any]:
        """Return the arguments of a backbone's forward method beside the tokens."""
        arguments = {"position_ids": self.position_ids, "use_cache": False}
        if not is_varlen(getattr(backbone, "config", None)):
            return arguments
        # Without them every layer finds the bounds in the positions, which waits for the device.
        bounds = {f"cu_seq_lens_{x}": self.bounds for x in "qk"}
        return arguments | bounds | {f"max_length_{x}": self.longest for x in "qk"}


def is_packed(lm: Any, device: torch.device) -> bool:
    """Return whether micro-batches on `device` are packed for the causal LM `lm`."""
    packing = getattr(lm, "opd_packing", "off")
    return packing == "on" or (packing == "auto" and device.type == "cuda")


def set_packing(lm: Any, packing: Packing) -> None:
    """Decide whether a causal LM, which may be on the meta device, reads packed rows.

    "auto" packs on CUDA with flash attention, where the architecture allows it.

    Raises:
        UserError: `packing` is "on" for an architecture that mixes packed sequences.
    """
    reason = why_not(lm)
    if packing == "on" and reason is not None:
        raise UserError(f"packing: got on, but {reason}; set it to auto or off")
    if packing == "auto" and (reason is not None or not is_varlen(lm.config)):
        packing = "off"
    lm.opd_packing = packing


def why_not(lm: Any) -> str | None:
    """Return why an architecture cannot read packed rows, or None if nothing is known."""
    if reason := other_states(lm):
        return reason
    kind, backbone = type(lm).__name__, lm.get_submodule(readout_of(lm).backbone)
    if "position_ids" not in inspect.signature(backbone.forward).parameters:
        return f"{kind} takes no position_ids, by which packed sequences are kept apart"
    if is_varlen(lm.config) and not _passes_sequence_bounds(lm, backbone):
        return f"{kind} passes no bounds of packed sequences to its attention kernel"
    return None


def other_states(lm: Any) -> str | None:
    """Return which layers keep more of a sequence than keys and values; None if none does."""
    kind = type(lm).__name__
    layers = getattr(lm.config.get_text_config(), "layer_types", None)
    if getattr(lm, "_is_stateful", False):
        return f"layers of {kind} have a state that runs from one packed sequence into the next"
    if others := set(layers or ()) - _KEEPS_APART:
        return f"{kind} has layers of {min(others)!r}, which run over the ends of packed sequences"
    return None


@torch.no_grad()
def _passes_sequence_bounds(lm: Any, backbone: nn.Module) -> bool:
    """Return whether the model passes sequence bounds to its kernel; needs no weights."""
    from opd_lightning.models.varlen import BOUNDS, ReachedError

    own, first = lm.config._attn_implementation, next(lm.parameters())
    with first.device:
        row = _probe([3])
    hidden = lm.config.get_text_config().hidden_size
    # Some models read token values, which do not exist on the meta device; others require ids.
    inputs = {
        "input_ids": row.input_ids,
        "inputs_embeds": first.new_zeros(1, row.input_ids.shape[1], hidden),
    }
    lm.set_attn_implementation(BOUNDS)
    try:
        for name, value in inputs.items():
            try:
                backbone(**{name: value}, **row.arguments(backbone))
            except ReachedError as reached:
                return reached.has_bounds
            except Exception:  # the model does not take these inputs
                continue
    finally:
        lm.set_attn_implementation(own)
    return False


@torch.no_grad()
def check_packing(lm: Any, *, attention: str | None) -> None:
    """Compare the states of a few short sequences, packed, with those of each alone.

    Runs on the CPU. Flash attention is replaced by a kernel that reads only the sequence bounds,
    other kernels for GPUs by one for the CPU.

    Raises:
        UserError: They differ by more than rounding.
    """
    from opd_lightning.models.varlen import VARLEN

    kind = type(lm).__name__
    backbone = lm.get_submodule(readout_of(lm).backbone)
    row = _probe(probe_tokens(lm.config.get_text_config(), sum(_LENGTHS)))
    rows = row.input_ids[0].split(_LENGTHS)
    with runs_on_cpu(lm, attention) as result:
        alone = [backbone(input_ids=x[None], use_cache=False).last_hidden_state[0] for x in rows]
        result.append(torch.cat(alone))
    if not result:
        return
    stand_in = VARLEN if is_varlen(lm.config) else "eager"
    with runs_on_cpu(lm, attention, stand_in) as packed:
        packed.append(row.read(backbone))
    if not packed:
        return
    expected, found = result[0].float(), packed[0].float()
    gap, size = float((found - expected).abs().max()), float(expected.abs().max())
    if not gap <= ROUNDING * torch.finfo(result[0].dtype).eps * size:
        raise UserError(
            f"packing: {kind} mixes packed sequences (states differ by {gap / size:.2g} of the "
            "largest); set it to off"
        )


def _probe(tokens: list[int]) -> PackedRow:
    """Return a row of sequences of `_LENGTHS` tokens, of `tokens` in turn."""
    total = sum(_LENGTHS)
    return PackedRow(
        input_ids=torch.tensor([(tokens * total)[:total]]),
        position_ids=torch.cat([torch.arange(n) for n in _LENGTHS])[None],
        bounds=torch.tensor([0, *_LENGTHS]).cumsum(0).int(),
        longest=max(_LENGTHS),
    )


def is_varlen(config: Any) -> bool:
    """Return whether the attention kernel takes the bounds of sequences in a row."""
    name = getattr(config, "_attn_implementation", None) or ""
    return "flash" in name or "varlen" in name
