"""Model folders: config.json, weights, tokenizer files and chat templates, changed or damaged."""

from __future__ import annotations

import json
import struct
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from random import Random
from typing import Any

import yaml

from tests import processes
from tests.fuzz import mutations
from tests.fuzz.kinds import Input, Kind, copied, done
from tests.fuzz.outcome import Outcome
from tests.fuzz.prompt_files import LINES, ROWS
from tests.fuzz.small_run import STUDENT, TEACHER, settings, write_models
from tests.fuzz.warm import Warm

CONFIG = "run.yaml"
WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
JSONS = ("config.json", "generation_config.json", "tokenizer_config.json", "tokenizer.json")
TEMPLATE = "chat_template.jinja"
# Keys of config.json that say where a model comes from, or what no run reads.
ANYTHING = ("transformers_version", "architectures", "dtype", "use_cache", "_name_or_path")
TEMPLATES = (
    "{{ 1/0 }}", "{% for m in messages %}", "{{ messages[99].content }}",
    "{{ raise_exception('no') }}",
    "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}", "", " ", "x",
    "{{ messages }}", "{{ ''.__class__.__mro__ }}", "{% include 'x' %}", "{{ messages | tojson }}",
    "{% macro a(n) %}{{ a(n) }}{% endmacro %}{{ a(1) }}", "{{ 'x' * 10**9 }}", "{{ 2 ** 10**8 }}",
    "{% set x = namespace(a=1) %}{{ x.b.c }}", "{{ unknown(messages) }}", "{{ 'x' * 300 }}",
    "{% for m in messages %}{{ m.role }}{% endfor %}", "{{ messages[0].content }}", "\ufeff{{ 1 }}",
    "{% for m in messages %}{{ m.content }}<|end|>{% endfor %}", "{{ bos_token }}{{ pad_token }}",
    "{% if messages[0].role != 'system' %}{{ raise_exception('system first') }}{% endif %}x",
)  # fmt: skip


class ModelFolders(Kind):
    """`opd fit` with one optimiser step, on a student or a teacher whose folder was changed."""

    name = "model_folders"
    seconds = 40.0  # a chat template may take 20

    def __init__(self) -> None:
        self._warm: Warm | None = None

    def prepare(self, base: Path) -> None:
        done(processes.call(write_models, str(base / STUDENT), str(base / TEACHER)))
        rows = "".join(f"{json.dumps(row)}\n" for row in ROWS)
        (base / LINES).write_text(rows)
        (base / CONFIG).write_text(yaml.safe_dump(settings(LINES)))
        self._warm = Warm("fit", "--config", CONFIG, stop="fit", cwd=base)

    def make(self, random: Random, base: Path) -> Input:
        role = random.choice((STUDENT, TEACHER))
        ways: dict[Callable[..., tuple[str, dict[str, bytes], dict[str, Any]]], int] = {
            _tree: 45, _bytes: 15, _template: 12, _header: 15, _shards: 8, _missing: 5,
        }  # fmt: skip
        (way,) = random.choices([*ways], [*ways.values()])
        what, files, facts = way(random, base / role)
        gone = [f"{role}/{name}" for name in facts.pop("gone", ())]
        return Input(
            f"{role}: {what}",
            {f"{role}/{name}": content for name, content in files.items()},
            places=(role, *facts.pop("names", ())),
            facts={"gone": gone, **facts},
        )

    def run(self, given: Input, base: Path, folder: Path) -> Outcome:
        assert self._warm is not None
        copied(base, folder, ("home", "tmp"))
        for name in given.facts["gone"]:
            (folder / name).unlink()
        given.write(folder)
        outcome = self._warm.run((), folder, seconds=self.seconds)
        ignored = given.facts.get("refuse", "") if outcome.accepted else ""
        return replace(outcome, places=given.places, ignored=ignored)

    def close(self) -> None:
        if self._warm is not None:
            self._warm.close()


def _tree(random: Random, folder: Path) -> tuple[str, dict[str, bytes], dict[str, Any]]:
    """Change a JSON file in one place."""
    name = random.choices(JSONS, (50, 10, 20, 20))[0]
    tree = json.loads((folder / name).read_bytes())
    change = mutations.changed(random, tree)
    keys = ".".join(str(key) for key in change.path)
    what = f"{name}: {keys}: {change.what}: {change.value!r:.60}"
    facts: dict[str, Any] = {}
    if change.what == "key twice" and name != "tokenizer.json":
        facts["refuse"] = f"{keys} is in {name} twice"
    elif name == "config.json" and change.what in ("value", "wrapped", "another's value"):
        old = mutations.at(tree, change.path)
        if change.path[0] not in ANYTHING and not _alike(old, change.value):
            facts["refuse"] = f"{keys} is {change.value!r:.60} instead of {old!r:.60}"
    return what, {name: mutations.as_json(change.tree).encode()}, facts


def _alike(old: Any, new: Any) -> bool:
    """Whether a value is of a kind that the old one's key may have."""
    if old is None or new is None:
        return True
    if isinstance(old, bool) or isinstance(new, bool):
        return type(old) is type(new)
    if isinstance(old, int | float):
        if not isinstance(new, int | float) or new != new or new in (float("inf"), -float("inf")):
            return False
        return isinstance(old, float) or new == int(new)
    return type(old) is type(new)


def _bytes(random: Random, folder: Path) -> tuple[str, dict[str, bytes], dict[str, Any]]:
    """Damage a file."""
    name = random.choice((*JSONS, TEMPLATE, WEIGHTS, WEIGHTS))
    content, how = mutations.damaged(random, (folder / name).read_bytes())
    facts = {}
    if name in JSONS and not _is_json(content):
        facts["refuse"] = f"{name} is no JSON"
    return f"{name}: {how}", {name: content}, facts


def _is_json(content: bytes) -> bool:
    try:
        json.loads(content.decode("utf-8-sig"))
    except (ValueError, RecursionError):
        return False
    return True


def _template(random: Random, folder: Path) -> tuple[str, dict[str, bytes], dict[str, Any]]:
    """Put another chat template in, or one with a text of its own changed."""
    if random.random() < 0.5:
        template = random.choice(TEMPLATES)
    else:
        template = mutations.text(random, (folder / TEMPLATE).read_text())
    content = template.encode("utf-8", "replace")
    # What a template says of the messages is said of a row.
    return f"{TEMPLATE}: {template!r:.80}", {TEMPLATE: content}, {"names": ("chat template",)}


def _header(random: Random, folder: Path) -> tuple[str, dict[str, bytes], dict[str, Any]]:
    """Change the header of the weights."""
    header, data = _read(folder / WEIGHTS)
    change = mutations.changed(random, header)
    keys = ".".join(str(key) for key in change.path)
    what = f"{WEIGHTS}: {keys}: {change.what}: {change.value!r:.60}"
    facts: dict[str, Any] = {}
    tensors = {k: v for k, v in header.items() if k != "__metadata__"}
    left = change.tree if isinstance(change.tree, dict) else {}
    if {k: v for k, v in left.items() if k != "__metadata__"} != tensors:
        facts["refuse"] = f"the header says something else of {keys}"
    return what, {WEIGHTS: _written(mutations.as_json(change.tree), data)}, facts


def _shards(random: Random, folder: Path) -> tuple[str, dict[str, bytes], dict[str, Any]]:
    """Write the weights as two shards with an index, which is changed, or one of them."""
    header, data = _read(folder / WEIGHTS)
    names = sorted(name for name in header if name != "__metadata__")
    files, where = {}, {}
    for i, part in enumerate((names[::2], names[1::2]), 1):
        shard = f"model-0000{i}-of-00002.safetensors"
        inside, content = {}, b""
        for name in part:
            begin, end = header[name]["data_offsets"]
            offsets = [len(content), len(content) + end - begin]
            inside[name] = {**header[name], "data_offsets": offsets}
            content += data[begin:end]
            where[name] = shard
        files[shard] = _written(json.dumps({"__metadata__": {"format": "pt"}, **inside}), content)
    index = {"metadata": {"total_size": len(data)}, "weight_map": where}
    facts: dict[str, Any] = {"gone": [WEIGHTS]}
    if random.random() < 0.6:
        change = mutations.changed(random, index)
        files[INDEX] = mutations.as_json(change.tree).encode()
        keys = ".".join(str(key) for key in change.path)
        how = f"{keys}: {change.what}: {change.value!r:.60}"
    else:
        files[INDEX] = json.dumps(index).encode()
        name = random.choice(sorted(files))
        files[name], damage = mutations.damaged(random, files[name])
        how = f"{name}: {damage}"
    return f"{INDEX}: {how}", files, facts


def _missing(random: Random, folder: Path) -> tuple[str, dict[str, bytes], dict[str, Any]]:
    name = random.choice(sorted(path.name for path in folder.iterdir()))
    return f"{name}: missing", {}, {"gone": [name]}


def _read(file: Path) -> tuple[dict[str, Any], bytes]:
    """Header and data of a safetensors file."""
    content = file.read_bytes()
    (length,) = struct.unpack("<Q", content[:8])
    return json.loads(content[8 : 8 + length]), content[8 + length :]


def _written(header: str, data: bytes) -> bytes:
    encoded = header.encode()
    encoded += b" " * (-len(encoded) % 8)
    return struct.pack("<Q", len(encoded)) + encoded + data
