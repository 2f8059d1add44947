"""The lab's tokenizer: 64 tokens, one per character, and a chat template.

All lab worlds and models share it, so any model can be the teacher of any other.
"""

from __future__ import annotations

import string

from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

PAD, END_OF_TURN, UNKNOWN = "<|pad|>", "<|end|>", "<|unknown|>"
ROLES = ("system", "user", "assistant")

_SPECIAL = (PAD, END_OF_TURN, UNKNOWN, *(f"<|{role}|>" for role in ROLES))
_CHARACTERS = string.digits + string.ascii_lowercase + "+-*/=:;,.?!'\"()<>_#% \n"
VOCABULARY = (*_SPECIAL, *_CHARACTERS)

# <|user|>347+589=<|end|><|assistant|> ... <|end|>: the end-of-turn token is the EOS.
_CHAT_TEMPLATE = (
    "{%- for message in messages -%}"
    "{%- if message.role not in " + repr(list(ROLES)) + " -%}"
    "{{- raise_exception('the lab knows no role ' + message.role) -}}"
    "{%- endif -%}"
    "{{- '<|' + message.role + '|>' + message.content + '" + END_OF_TURN + "' -}}"
    "{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{- '<|assistant|>' -}}{%- endif -%}"
)


def build_tokenizer(model_max_length: int) -> PreTrainedTokenizerFast:
    """Return a fast tokenizer that splits text into characters; decoding is lossless.

    Each character outside the vocabulary, such as a capital, becomes an unknown token.

    Args:
        model_max_length: Context length of the model that the tokenizer is saved with.
    """
    ids = {token: i for i, token in enumerate(VOCABULARY)}
    backend = Tokenizer(models.WordLevel(ids, unk_token=UNKNOWN))
    # Not ".", which does not match line breaks.
    backend.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
    backend.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        pad_token=PAD,
        eos_token=END_OF_TURN,
        unk_token=UNKNOWN,
        additional_special_tokens=list(_SPECIAL[3:]),
        chat_template=_CHAT_TEMPLATE,
        model_max_length=model_max_length,
        padding_side="left",
        clean_up_tokenization_spaces=False,
    )
