"""Sizes of a decoder, read from its transformers configuration under the names of all families."""

from __future__ import annotations

from typing import Any, NamedTuple

from opd_lightning.errors import UserError

HIDDEN = ("hidden_size", "d_model", "n_embd")
LAYERS = ("num_hidden_layers", "n_layer", "n_layers", "num_layers")
HEADS = ("num_attention_heads", "n_head", "n_heads", "num_heads")
KEY_HEADS = ("num_key_value_heads", "num_kv_heads")
INTERMEDIATE = ("intermediate_size", "n_inner", "ffn_hidden_size", "ffn_dim", "decoder_ffn_dim")


class Widths(NamedTuple):
    """Sizes of a decoder, in elements per token; of its widest layer where layers differ."""

    hidden: int
    queries: int  # heads x head size
    keys: int  # key and value heads x head size
    intermediate: int  # sum over the experts that a token is sent to
    layers: int
    vocabulary: int
    assumed: tuple[str, ...] = ()  # names that the configuration does not define

    @classmethod
    def of(cls, config: Any) -> Widths:
        """Read the sizes of the text decoder of `config`.

        Usual values replace what it lacks: a head size of hidden / heads, as many key heads as
        heads, and 4 x hidden between the matrices of an MLP. Those that no name of a family
        stands for are in `assumed`.

        Raises:
            UserError: The hidden size, the number of layers or the vocabulary is unknown.
        """
        text = config.get_text_config()
        hidden, layers = _required(text, HIDDEN), _required(text, LAYERS)
        assumed = []
        heads = _size(text, HEADS)
        if heads is None:
            assumed.append("attention as wide as the residual stream")
        size = _size(text, ("head_dim", "global_head_dim")) or hidden // (heads or 1)
        keys = _size(text, KEY_HEADS) or heads or 1
        if getattr(text, "multi_query", False) and not getattr(
            text, "new_decoder_architecture", False
        ):
            keys = 1  # Falcon, GPT-BigCode
        intermediate = _intermediate(text)
        if intermediate is None:
            intermediate = 4 * hidden
            if not any(hasattr(text, name) for name in INTERMEDIATE):
                assumed.append("an MLP of 4 x the hidden size")
        return cls(
            hidden,
            (heads or 1) * size,
            keys * size,
            intermediate,
            layers,
            _required(text, ("vocab_size",)),
            tuple(assumed),
        )

    @property
    def cache(self) -> int:
        """Elements of one token's keys and values in all layers."""
        return 2 * self.layers * self.keys


def _intermediate(text: Any) -> int | None:
    """Return the width of an MLP, or of the experts that a token is sent to."""
    if found := _size(text, INTERMEDIATE):
        return found
    expert = _size(text, ("moe_intermediate_size",))
    if expert is None:
        return None
    shared = _size(text, ("shared_expert_intermediate_size",)) or 0
    return expert * (_size(text, ("num_experts_per_tok", "top_k_experts")) or 1) + shared


def _required(text: Any, names: tuple[str, ...]) -> int:
    found = _size(text, names)
    if found is None:
        raise UserError(
            f"the configuration of {type(text).__name__} does not say {names[0]}, so memory cannot "
            "be estimated"
        )
    return found


def _size(text: Any, names: tuple[str, ...]) -> int | None:
    """Return the largest positive number among the values of the first name that has one."""
    for name in names:
        numbers = [v for v in _values(text, name) if isinstance(v, int) and v > 0]
        if numbers:
            return max(numbers)
    return None


def _values(text: Any, name: str) -> list[Any]:
    """Return the value of an attribute, or those of all layers; empty if it has none."""
    try:
        value = getattr(text, name, None)
    except RuntimeError:  # transformers asks to read it per layer, as in Gemma 4
        return [getattr(layer, name, None) for layer in text.per_layer_config]
    return list(value) if isinstance(value, list | tuple) else [value]
