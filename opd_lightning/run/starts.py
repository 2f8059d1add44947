"""Record of a run's starts and resumptions: one line of `starts.jsonl` each."""

from __future__ import annotations

import json
import os
import platform
import re
import subprocess
import sys
from collections.abc import Mapping
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, requires, version
from pathlib import Path
from typing import Any

import torch

FILE = "starts.jsonl"
MOST_CHANGES = 50  # changed files of the working folder that are listed


def note_start(run: Path, *, step: int, **about: Any) -> bool:
    """Append a description of this process to the run folder's starts.

    Args:
        run: The run folder.
        step: Optimiser steps that the run has made.
        about: Further plain data, such as the checkpoint and seeds.

    Returns:
        Whether it is the first start in the folder.
    """
    path = run / FILE
    first = not path.exists()
    start = {
        "time": datetime.now(UTC).isoformat(timespec="seconds"),
        "step": step,
        **about,
        "command": sys.argv,
        "folder": os.getcwd(),
        "git": git_state(),
        "machine": {
            "host": platform.node(),
            "system": platform.platform(),
            "gpus": [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())],
            "threads": torch.get_num_threads(),
        },
        "versions": versions(),
    }
    run.mkdir(parents=True, exist_ok=True)
    with path.open("a+b") as file:
        if file.tell():
            file.seek(-1, os.SEEK_END)
            if file.read(1) != b"\n":  # a kill or a full disk cut the last line short
                file.write(b"\n")
        file.write(json.dumps(start).encode() + b"\n")
    return first


def last_start(run: Path) -> Mapping[str, Any]:
    """Return the newest readable entry of the run folder; empty if there is none."""
    try:
        lines = (run / FILE).read_text(encoding="utf-8").splitlines()
    except (OSError, ValueError):
        return {}
    for line in reversed(lines):
        try:
            entry = json.loads(line)
        except ValueError:  # cut short
            continue
        if isinstance(entry, dict):
            return entry
    return {}


def git_state() -> Mapping[str, Any] | None:
    """Return the working folder's commit and changed files; None outside of a repository."""
    commit = _git("rev-parse", "HEAD")
    if commit is None:
        return None
    changes = (_git("status", "--porcelain") or "").splitlines()
    return {"commit": commit, "dirty": bool(changes), "changes": changes[:MOST_CHANGES]}


def _git(*arguments: str) -> str | None:
    try:
        done = subprocess.run(
            ["git", *arguments], capture_output=True, encoding="utf-8", errors="replace", timeout=30
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.rstrip() if done.returncode == 0 else None


def versions() -> dict[str, str]:
    """Return versions of Python, this package, and its installed dependencies and extras."""
    found = {"python": platform.python_version()}
    if torch.version.cuda is not None:
        found["cuda"] = torch.version.cuda
    try:
        needed = requires("opd-lightning") or []
    except PackageNotFoundError:  # run from source, not installed
        needed = []
    names = {re.split(r"[^\w.-]", line, maxsplit=1)[0] for line in needed}
    for name in ("opd-lightning", *sorted(names)):
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found
