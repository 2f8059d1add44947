"""A run's configuration as a flat table."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from opd_lightning.errors import cut

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
# Hardware and duration of a run, which may differ when it is resumed.
EXPECTED_TO_CHANGE = {f"trainer.{name}" for name in TRAINER[:4]} | {"trainer.max_steps"}
# Another value of these is refused when the stream is restored.
REFUSED = {"seed", "data.seed", "trainer.accumulate_grad_batches"} | {
    f"data.{name}" for name in ("prompts_per_step", "samples_per_prompt", "max_staleness")
}
MOST_LINES = 12  # limit of reported differences


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


def differences(before: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """Return one line for each setting that differs from the checkpoint's run.

    Optimiser and scheduler are restored with their own settings; all else is this run's.

    Args:
        before: Flat settings of the run that wrote the checkpoint.
        now: Flat settings of this run.
    """
    ended = "lr_scheduler" in before and "lr_scheduler" not in now
    changed = [
        name
        for name in dict.fromkeys([*before, *now])
        if before.get(name) != now.get(name)
        and name != "method"  # reported when the checkpoint is loaded
        and name not in EXPECTED_TO_CHANGE | REFUSED
        and not (ended and name.split(".")[0] == "lr_scheduler")
    ]
    lines = []
    if ended:
        lines.append(
            f"lr_scheduler: the checkpoint's run had {_shown(before, 'lr_scheduler')}, this one "
            "has none: the learning rate stays as it was in the checkpoint"
        )
    for name in changed[:MOST_LINES]:
        restored = name.split(".")[0] in ("optimizer", "lr_scheduler") and name in before
        counts = (
            f"{_shown(before, name)} counts, which is saved with its state; for another, start a "
            "new run from an exported student"
            if restored
            else f"{_shown(now, name)} counts from here on"
        )
        lines.append(
            f"{name}: the checkpoint's run had {_shown(before, name)}, this one has "
            f"{_shown(now, name)}: {counts}"
        )
    if len(changed) > MOST_LINES:
        lines.append(f"and {len(changed) - MOST_LINES} more settings differ from the checkpoint's")
    return lines


def _shown(settings: Mapping[str, Any], name: str) -> str:
    return cut(str(settings.get(name, "its default")))


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
