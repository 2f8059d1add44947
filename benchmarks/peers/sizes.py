"""What is compared: four sizes, their models, prompts and tokenizer, with random weights.

Nothing here imports the project, so that a peer's environment need not have it installed.
"""

from __future__ import annotations

import json
import math
import random
from dataclasses import dataclass
from pathlib import Path
from statistics import NormalDist
from typing import Any, NamedTuple

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from torch import Tensor
from transformers import PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM

PAD, EOS, UNKNOWN, FIRST = 0, 1, 2, 3  # ids of tokens; words begin with FIRST
GROUPS = 8  # of words whose responses have a length in common
MARK = 2.0  # entry of a word's group in its embedding; other entries are of 0.02


class Shape(NamedTuple):
    """A Qwen3 with tied embeddings, whose heads are 64 wide."""

    hidden: int
    layers: int
    heads: int
    key_heads: int
    intermediate: int


class Tail(NamedTuple):
    """Lognormal lengths of responses, as a mixture of geometric ones."""

    median: float  # tokens
    sigma: float

    def means(self) -> list[float]:
        """Mean length of every group's responses, from the shortest."""
        middles = ((group + 0.5) / GROUPS for group in range(GROUPS))
        return [self.median * math.exp(self.sigma * NormalDist().inv_cdf(p)) for p in middles]


@dataclass(frozen=True, kw_only=True)
class Size:
    """Models, and what one optimiser step reads and writes.

    Args:
        vocabulary: Tokens of both models.
        student: Shape of the student.
        teacher: Shape of the teacher.
        rows: Prompts and responses of a step.
        response: Largest length of a response, in tokens.
        prompt: Length of the longest prompt; the shortest has three quarters of it.
        micro_batches: Passes that a step is split into.
        tail: Distribution of lengths; None: all responses have the largest.
        steps_of_prompts: Prompts, in steps.
    """

    vocabulary: int
    student: Shape
    teacher: Shape
    rows: int
    response: int
    prompt: int = 32
    micro_batches: int = 1
    tail: Tail | None = None
    steps_of_prompts: int = 8


_SMALL, _LARGE = Shape(256, 4, 4, 2, 896), Shape(512, 6, 8, 4, 1024)
_MIDDLE: dict[str, Any] = {
    "vocabulary": 4096,
    "student": _SMALL,
    "teacher": _LARGE,
    "rows": 32,
    "response": 256,
}

SIZES = {
    "tiny": Size(
        vocabulary=64,
        student=Shape(128, 2, 2, 2, 384),
        teacher=Shape(128, 3, 2, 2, 384),
        rows=64,
        response=48,
        prompt=16,
    ),
    "middle": Size(**_MIDDLE, micro_batches=4),
    "vocabulary": Size(
        vocabulary=151_936,
        student=_SMALL._replace(layers=2),
        teacher=_LARGE._replace(layers=4),
        rows=8,
        response=256,
        micro_batches=2,
    ),
    # All prompts in every step: their lengths differ more than those of their responses.
    "tail": Size(**_MIDDLE, micro_batches=4, tail=Tail(32, 1.1), steps_of_prompts=1),
    # Not measured: a test that everything runs.
    "dry": Size(
        vocabulary=64,
        student=Shape(64, 1, 1, 1, 64),
        teacher=Shape(64, 1, 1, 1, 64),
        rows=16,
        response=24,
        prompt=8,
        micro_batches=2,
        tail=Tail(8, 1.0),
        steps_of_prompts=1,
    ),
}


def write_world(folder: Path, size: Size) -> None:
    """Write `student`, `teacher` and `prompts.jsonl` into `folder`."""
    tokenizer = make_tokenizer(size.vocabulary)
    for seed, role in enumerate(("student", "teacher")):
        model = make_model(getattr(size, role), size, seed)
        model.save_pretrained(folder / role)
        tokenizer.save_pretrained(folder / role)
    with (folder / "prompts.jsonl").open("w") as file:
        for text in make_prompts(size):
            file.write(json.dumps({"prompt": [{"role": "user", "content": text}]}) + "\n")


def make_tokenizer(vocabulary: int) -> PreTrainedTokenizerFast:
    """Return a tokenizer of words, and a chat template that adds nothing."""
    words = {"<pad>": PAD, "<eos>": EOS, "<unk>": UNKNOWN}
    words |= {f"w{i}": i for i in range(FIRST, vocabulary)}
    backend = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    backend.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        pad_token="<pad>",
        eos_token="<eos>",
        unk_token="<unk>",
        chat_template="{% for message in messages %}{{ message.content }} {% endfor %}",
        padding_side="left",
        clean_up_tokenization_spaces=False,
    )


def make_prompts(size: Size) -> list[str]:
    """Return random words; the groups of last words, which decide lengths, come in turn."""
    draw = random.Random(0)
    texts = []
    for i in range(size.rows * size.steps_of_prompts):
        length = draw.randint(size.prompt * 3 // 4, size.prompt)
        ids = [draw.randrange(FIRST, size.vocabulary) for _ in range(length - 1)]
        last = draw.choice(members(i % GROUPS, size.vocabulary))
        texts.append(" ".join(f"w{token}" for token in [*ids, last]))
    return texts


def members(group: int, vocabulary: int) -> range:
    """Return the token ids of a group's words."""
    return range(FIRST + group, vocabulary, GROUPS)


def make_model(shape: Shape, size: Size, seed: int) -> Any:
    """Return a model with random weights whose responses have the lengths of `size`.

    The embedding, which is also the head, marks every word's group, so that the words of a response
    are almost always of the group of the prompt's last word. The row of the EOS token makes each
    group's responses end at their rate; without a tail they never do.
    """
    torch.manual_seed(seed)
    model = Qwen3ForCausalLM(
        Qwen3Config(
            vocab_size=size.vocabulary,
            hidden_size=shape.hidden,
            intermediate_size=shape.intermediate,
            num_hidden_layers=shape.layers,
            num_attention_heads=shape.heads,
            num_key_value_heads=shape.key_heads,
            head_dim=64,
            max_position_embeddings=1024,
            tie_word_embeddings=True,
            bos_token_id=None,
            eos_token_id=EOS,
            pad_token_id=PAD,
        )
    ).eval()
    for layer in model.model.layers:  # so that their noise does not hide the marks
        layer.self_attn.o_proj.weight.data *= 0.1
        layer.mlp.down_proj.weight.data *= 0.1
    embedding = model.get_input_embeddings().weight.data
    embedding[:, :GROUPS] = 0
    for group in range(GROUPS):
        embedding[members(group, size.vocabulary), group] = MARK
    embedding[:FIRST, :GROUPS] = -MARK  # no word, and no EOS
    if size.tail is not None:
        ends = [1 / mean for mean in size.tail.means()]
        embedding[EOS] = 0
        embedding[EOS, :GROUPS] = _entries_for(model, ends, size)
    return model


@torch.no_grad()
def _entries_for(model: Any, ends: list[float], size: Size) -> Tensor:
    """Return the entries `[GROUPS]` of the EOS row that end responses at these rates.

    A row without entries has the logit 0. In a group's texts, an entry at its place adds its
    product with the hidden state there, which is about the same everywhere.
    """
    entries = torch.zeros(len(ends))
    draw = random.Random(1)
    for group, end in enumerate(ends):
        words = members(group, size.vocabulary)
        texts = torch.tensor([[draw.choice(words) for _ in range(32)] for _ in range(8)])
        hidden = model.model(texts).last_hidden_state.flatten(0, 1)  # [N, H]
        total = model.lm_head(hidden).logsumexp(-1)  # [N]; the EOS token's share is negligible
        wanted = total.mean() + math.log(end / (1 - end))
        entries[group] = wanted / hidden[:, group].mean()
    return entries
