"""The commands of docs/merging.md, word for word, with few and small steps."""

import json
import shlex
from pathlib import Path

import pytest

from opd_lightning.cli import main
from tests import snippets

SHORT = (
    "--trainer.max_steps=1",
    "--trainer.limit_val_batches=0",
    "--trainer.enable_progress_bar=false",
    "--data.prompts_per_step=4",
    "--data.sampling.max_new_tokens=6",
)


def commands() -> list[list[str]]:
    """The page's commands without the program's name."""
    text = snippets.files("merging.md")["merging.sh"].replace("\\\n", " ")
    lines = [shlex.split(line, comments=True) for line in text.splitlines()]
    assert all(words[0] == "opd" for words in lines if words)
    return [words[1:] for words in lines if words]


def test_the_whole_recipe(
    untrained_lab: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("configs", "lab"):
        Path(name).symlink_to(untrained_lab / name)
    (build, *rest) = commands()
    assert build == ["lab", "build", "--world", "skills"]  # `untrained_lab` stands for it
    reports: list[Path] = []
    of_experts = [words for words in rest if words[0] == "test" and "-experts-" in " ".join(words)]
    assert len(of_experts) == 2  # like that of the start
    for command, *words in (words for words in rest if words not in of_experts):
        more: tuple[str, ...] = SHORT if command == "fit" else ()
        if command == "test":
            reports.append(Path(f"report-{len(reports)}.json"))
            more = ("--out", str(reports[-1]))
        main([command, *words, *more])
    assert len(reports) == 3
    for report in reports:
        domains = json.loads(report.read_text())["suites"]["skills"]["domains"]
        assert domains.keys() == {"add-3", "program-2"}
