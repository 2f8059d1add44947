"""A run's configuration as a flat table."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

# Trainer settings that change what is computed; the others concern display and storage.
TRAINER = (
    "accelerator",
    "strategy",
    "devices",
    "num_nodes",
    "precision",
    "max_steps",
    "accumulate_grad_batches",
    "gradient_clip_val",
)


def flat_settings(config: Mapping[str, Any]) -> dict[str, float | str]:
    """Flatten a run's configuration to short names.

    Args:
        config: Configuration of `opd fit`, as plain data.

    Example: {"seed_everything": 0, "model": {"class_path": "x.OPD", "init_args": {"teacher":
        {"class_path": "x.FrozenTeacher", "init_args": {"path": "t"}}, "rules": None}}} becomes
        {"seed": 0, "method": "OPD", "teacher": "FrozenTeacher", "teacher.path": "t"}.
    """
    model = config["model"]
    trainer = {name: value for name, value in config["trainer"].items() if name in TRAINER}
    return dict(
        [
            ("seed", config["seed_everything"]),
            ("method", _class(model)),
            *_flat("", model["init_args"]),
            *_flat("data", config["data"]),
            *_flat("trainer", trainer),
        ]
    )


def _flat(name: str, value: Any) -> Iterator[tuple[str, float | str]]:
    if isinstance(value, Mapping):
        if "class_path" in value:
            yield name, _class(value)
            value = value.get("init_args") or {}
        for key, inner in value.items():
            yield from _flat(f"{name}.{key}" if name else str(key), inner)
    elif isinstance(value, list) and any(isinstance(inner, Mapping) for inner in value):
        for index, inner in enumerate(value):
            yield from _flat(f"{name}.{index}", inner)
    elif value is not None:
        # TensorBoard would read true as 1.
        number = isinstance(value, int | float) and not isinstance(value, bool)
        yield name, value if number else str(value)


def _class(value: Mapping[str, Any]) -> str:
    return str(value["class_path"]).rsplit(".", 1)[-1]
