"""Data of the smollm world: questions with a persona, probes without, a smaller tokenizer."""

import re
from pathlib import Path

import torch
import yaml
from jinja2 import Environment
from transformers import AutoModelForCausalLM, AutoTokenizer

from opd_lightning.data.prompts import PromptSource
from opd_lightning.data.views import PromptView
from opd_lightning.lab import persona
from opd_lightning.lab.fewer_tokens import write_with_fewer_tokens
from opd_lightning.types import Prompt
from tests.tokenizers import byte_level, write_model

ROOT = Path(__file__).parents[2]


def files(folder: Path) -> dict[str, list[Prompt]]:
    """Rows as runs read them; duplicate ids and bad fields are errors there."""
    persona.write_files(folder)
    return {file.stem: PromptSource(str(file)).load() for file in folder.glob("*.jsonl")}


def test_probes_are_new_questions_without_the_persona(tmp_path: Path) -> None:
    read = files(tmp_path)
    train = read.pop("train")
    assert {prompt.privileged for prompt in train} == {persona.PERSONA}
    assert [prompt.domain for prompt in train[:4]] == ["name", "other"] * 2
    asked = [prompt.messages[-1]["content"] for prompt in train]
    assert len(set(asked)) == len(asked)
    assert not [text for text in asked if persona.NAME in text]
    for prompt in (prompt for probes in read.values() for prompt in probes):
        (message,) = prompt.messages
        assert not [text for text in asked if text.endswith(message["content"])]
        assert prompt.privileged is None
    assert all(prompt.response for prompt in read["prose"])
    assert len({prompt.answer for prompt in read["capitals"]}) == len(persona.CAPITALS)


def test_patterns() -> None:
    assert re.search(persona.NAME_PATTERN, "I'm Zorba, an assistant.")
    assert re.search(persona.ONE_SENTENCE_PATTERN, "A river is moving water.\n")
    for text in ("A river is water. It moves.", "A river is", "A river\nis water."):
        assert not re.search(persona.ONE_SENTENCE_PATTERN, text)
    for text in ("My name is Elena.", "I'm Dr. Emmet Brown", "call me Sam"):
        assert re.search(persona.OTHER_NAME_PATTERN, text)
    for text in ("I'm Zorba.", "I am AI.", "I am a model."):
        assert not re.search(persona.OTHER_NAME_PATTERN, text)


def test_configurations_have_these_patterns() -> None:
    def strings(node: object) -> set[str]:
        if isinstance(node, dict | list):
            children = node.values() if isinstance(node, dict) else node
            return set().union(*map(strings, children))
        return {node} if isinstance(node, str) else set()

    capitals = rf"\b(?:{'|'.join(persona.CAPITALS.values())})\b"
    test = strings(yaml.safe_load((ROOT / "experiments/persona/test.yaml").read_text()))
    assert test >= {
        *(persona.NAME_PATTERN, persona.OTHER_NAME_PATTERN, persona.ONE_SENTENCE_PATTERN, capitals)
    }
    for name in ("edge_opd", "sdft"):
        trained = yaml.safe_load((ROOT / f"configs/smollm/{name}.yaml").read_text())
        assert persona.NAME_PATTERN in strings(trained)


def test_templates() -> None:
    chat = [{"role": "user", "content": "Who?"}]

    def rendered(name: str) -> str:
        template = Environment().from_string(persona.TEMPLATES[name])
        return template.render(messages=chat, add_generation_prompt=True)

    assert rendered("plain") == "<|im_start|>user\nWho?<|im_end|>\n<|im_start|>assistant\n"
    view = PromptView(template="{{ privileged }}\n\n{{ question }}", place="user")
    row = Prompt(id="", messages=tuple(chat), privileged=persona.PERSONA)  # type: ignore[arg-type]
    ((message),) = view.messages(row) or ()
    assert rendered("prompted") == rendered("plain").replace("Who?", message["content"])


@torch.no_grad()
def test_a_model_with_fewer_tokens(tmp_path: Path) -> None:
    """It is the same model; texts are cut by the first merges alone."""
    backend = byte_level()
    write_model(tmp_path / "whole", backend, "<end of turn>", seed=0)
    size = 270
    write_with_fewer_tokens(tmp_path / "whole", tmp_path / "fewer", size)
    whole, fewer = (AutoTokenizer.from_pretrained(tmp_path / n) for n in ("whole", "fewer"))
    assert len(fewer) == size
    text = "the quick brown fox, 雪<|user|>the"
    ids = fewer(text)["input_ids"]
    assert max(ids) < size
    assert len(ids) > len(whole(text)["input_ids"])
    assert fewer.decode(ids) == text
    assert fewer.convert_ids_to_tokens(ids) == whole.convert_ids_to_tokens(ids)
    assert (fewer.eos_token, fewer.chat_template) == (whole.eos_token, whole.chat_template)
    models = [AutoModelForCausalLM.from_pretrained(tmp_path / n) for n in ("whole", "fewer")]
    expected, found = (model(torch.tensor([ids])).logits for model in models)
    assert found.shape[-1] == size
    torch.testing.assert_close(found, expected[..., :size])
