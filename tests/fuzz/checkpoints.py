"""Run folders: checkpoints, and what else a run left, damaged before it goes on."""

from __future__ import annotations

import io
import json
import os
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from random import Random
from typing import Any

from tests import processes
from tests.conftest import build_tiny_model
from tests.fuzz import mutations
from tests.fuzz.kinds import Input, Kind, copied, done
from tests.fuzz.outcome import Outcome
from tests.fuzz.warm import Warm

SETTINGS = "settings.yaml"
RUN = Path("run")
SAVED = RUN / "checkpoints"
LAST = str(SAVED / "last.ckpt")
STEPS = 2  # that the run has made; it goes on to one more
OTHERS: dict[str, dict[str, Any]] = {
    "seed": {"seed_everything": 1},
    "width": {"student": "wide"},
    "method": {"method": "OPD"},
}
# What a line says that explains why a run ended with other weights.
EXPLAINS = (
    "is passed over",
    "the checkpoint's run had",
    "the checkpoint is of a run with",
    "was changed since",
    "starts from the beginning",
)
# Ways to put something else in a file's place; the second word is where a link leads.
PLACES: tuple[tuple[str, ...], ...] = (
    ("gone",), ("folder",), ("pipe",), ("socket",), ("link", "/dev/zero"), ("link", "/dev/null"),
    ("link", "/dev/full"), ("link", "nowhere"), ("link", "."), ("link", "/"), ("itself",),
    ("link", "step=1.ckpt"), ("link", "../config.yaml"), ("unreadable",), ("empty",),
)  # fmt: skip
FOLDERS = (
    ("gone",),
    ("folder",),
    ("pipe",),
    ("socket",),
    ("link", "nowhere"),
    ("itself",),
    ("empty",),
)


class Checkpoints(Kind):
    """`opd fit --ckpt_path` in a damaged folder.

    A run that ends has the weights of the undamaged one, for resumption is exact from whatever
    checkpoint it takes; or a line explains why it has others.
    """

    name = "checkpoints"
    seconds = 30.0

    def __init__(self) -> None:
        self._warm: Warm | None = None
        self._weights: dict[str, bytes] = {}

    def prepare(self, base: Path) -> None:
        # Where inputs will be, for checkpoints name files by their whole paths.
        here = base.parent / "input" / "here"
        here.mkdir(parents=True)
        done(processes.call(write_models, here))
        copied(here, base)
        train(here)
        shutil.move(here / RUN, base / RUN)
        shutil.rmtree(here)
        write_settings(base / SETTINGS, STEPS + 1)
        words = ("fit", "--config", SETTINGS, "--ckpt_path", "last")
        self._warm = Warm(*words, stop="fit", cwd=base)
        copied(base, here)
        outcome = self._warm.run((), here, seconds=self.seconds)
        assert outcome.accepted, outcome.err
        self._weights = weights(here / LAST)
        shutil.rmtree(here.parent)

    def make(self, random: Random, base: Path) -> Input:
        way = random.choices(
            ("bytes", "content", "place", "record", "swap", "name"), (30, 30, 12, 13, 7, 8)
        )[0]
        made: Input = getattr(self, f"_{way}")(random, base)
        return made

    def run(self, given: Input, base: Path, folder: Path) -> Outcome:
        assert self._warm is not None
        for there, _ in given.facts.get("copied", ()):
            if not (base / (other := Path(there).parts[0])).exists():
                self._train_another(other.removeprefix("of-"), base, folder)
        copied(base, folder, ("home", "tmp", "of-*"))
        (folder.parent / "outside").mkdir(exist_ok=True)
        (folder.parent / "outside" / "kept.ckpt").write_text("kept")
        given.write(folder)
        for place, *way in given.facts.get("places", ()):
            put(folder / place, *way)
        for there, place in given.facts.get("copied", ()):
            target = folder / place
            shutil.rmtree(target, ignore_errors=True) if target.is_dir() else target.unlink(True)
            source = base / there
            shutil.copytree(source, target) if source.is_dir() else shutil.copy(source, target)
        outcome = self._warm.run(given.words, folder, seconds=self.seconds)
        ignored = ""
        if outcome.accepted:
            ignored = self._ignored(outcome, folder)
        return replace(outcome, places=given.places, ignored=ignored)

    def _train_another(self, name: str, base: Path, folder: Path) -> None:
        """Train another run, which is kept in the base folder."""
        copied(base, folder, ("home", "tmp", "of-*", str(RUN)))
        train(folder, **OTHERS[name])
        shutil.move(folder / RUN, base / f"of-{name}")
        for path in folder.iterdir():
            shutil.rmtree(path) if path.is_dir() else path.unlink()

    def close(self) -> None:
        if self._warm is not None:
            self._warm.close()

    def _ignored(self, outcome: Outcome, folder: Path) -> str:
        if any(words in line for line in outcome.err for words in EXPLAINS):
            return ""
        last = folder / LAST
        if not last.is_file():
            return f"{LAST} is not there at the end"
        now = weights(last)
        for name, value in self._weights.items():
            if now.get(name) != value:
                return f"{name} ended otherwise, without a line that says why"
        return ""

    # Inputs -----------------------------------------------------------------------------------

    def _checkpoint(self, random: Random) -> str:
        return random.choice((LAST, LAST, LAST, str(SAVED / "step=2.ckpt")))

    def _words(self, random: Random, place: str) -> tuple[str, ...]:
        """How the run is told to go on: by `last`, or by the damaged file itself."""
        return () if random.random() < 0.6 or not place.endswith(".ckpt") else (place,)

    def _of(self, what: str, place: str, words: tuple[str, ...], **more: Any) -> Input:
        # A damaged newest one is passed over, so `last` may refuse nothing.
        return Input(f"{place}{' by name' if words else ''}: {what}", words=words, **more)

    def _bytes(self, random: Random, base: Path) -> Input:
        place = self._checkpoint(random)
        content, what = mutations.damaged(random, (base / place).read_bytes())
        words = self._words(random, place)
        return self._of(what, place, words, files={place: content}, places=(Path(place).name,))

    def _content(self, random: Random, base: Path) -> Input:
        place = self._checkpoint(random)
        changed, what = edited(random, load(base / place))
        words = self._words(random, place)
        return self._of(what, place, words, files={place: changed})

    def _place(self, random: Random, base: Path) -> Input:
        files = (LAST, LAST, str(SAVED / "step=2.ckpt"), *self._records(base))
        place = random.choice((*files, str(SAVED), str(SAVED / "more.ckpt")))
        # A folder that is a link is written to, wherever it leads.
        way = random.choice(FOLDERS if place == str(SAVED) else PLACES)
        words = self._words(random, place)
        return self._of(" ".join(way), place, words, facts={"places": [[place, *way]]})

    def _records(self, base: Path) -> list[str]:
        """What a run left beside its checkpoints."""
        found = (path for path in (base / RUN).rglob("*") if path.is_file())
        return [str(p.relative_to(base)) for p in sorted(found) if p.suffix != ".ckpt"]

    def _record(self, random: Random, base: Path) -> Input:
        records = self._records(base)
        place = random.choice((str(RUN / ".prompts.json"), *records))
        content = (base / place).read_bytes()
        if place.endswith(".json") and random.random() < 0.7:
            change = mutations.changed(random, json.loads(content))
            what = f"{change.told}"
            files = {place: mutations.as_json(change.tree).encode("utf-8", "replace")}
            return self._of(what, place, (), files=files)
        content, what = mutations.damaged(random, content)
        return self._of(what, place, (), files={place: content})

    def _swap(self, random: Random, base: Path) -> Input:
        other = random.choice([f"of-{name}" for name in OTHERS])
        part = random.choice(
            ("checkpoints/last.ckpt", "checkpoints", ".prompts.json", "config.yaml")
        )
        place = str(RUN / part)
        words = self._words(random, place)
        facts = {"copied": [[f"{other}/{part}", place]]}
        if random.random() < 0.3:
            facts["places"] = [[str(SAVED / f"step={i + 1}.ckpt"), "gone"] for i in range(STEPS)]
        return self._of(f"that of {other}", place, words, facts=facts)

    def _name(self, random: Random, base: Path) -> Input:
        word = random.choice(
            (
                lambda: mutations.text(random, LAST),
                lambda: random.choice(mutations.TEXTS),
                lambda: str(random.choice((SAVED, RUN, "student", SETTINGS, "train.jsonl"))),
                lambda: random.choice(
                    ("/dev/zero", "/dev/stdin", "/proc/self/mem", "~", "~/a.ckpt")
                ),
                lambda: random.choice(("LAST", "last ", "best", "hpc", "None", "s3://a/b.ckpt")),
                lambda: LAST + "/",
            )
        )()
        word = word.replace("\0", " ").encode("utf-8", "replace").decode()
        return Input(f"--ckpt_path {word!r:.80}", words=(word,), places=("ckpt_path",))


def write_models(folder: Path) -> None:
    """Write tiny models and prompts."""
    for role, seed, width in (("student", 0, 32), ("teacher", 1, 32), ("wide", 2, 64)):
        (folder / role).mkdir()
        build_tiny_model(folder / role, hidden_size=width, layers=1, seed=seed, tie=True)
    rows = ({"prompt": f"{i}+{i}=", "answer": str(2 * i)} for i in range(16))
    (folder / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def train(folder: Path, **changes: Any) -> None:
    """Train a run in the folder of its models."""
    write_settings(folder / SETTINGS, STEPS, **changes)
    fit = ("fit", "--config", SETTINGS, "--ckpt_path", "last")
    done(processes.Process("opd_lightning", *fit, cwd=folder))


def write_settings(
    file: Path,
    steps: int,
    *,
    seed_everything: int = 0,
    student: str = "student",
    method: str = "GOPD",
) -> None:
    """Write the configuration of a run with all that a checkpoint must hold, in small."""
    rooms = "opd_lightning"
    teachers = {
        "teacher": {
            "class_path": f"{rooms}.teachers.FrozenTeacher",
            "init_args": {"path": "teacher"},
        }
    }
    if method == "GOPD":
        ema = {"class_path": f"{rooms}.teachers.EMATeacher", "init_args": {"rate": 0.1}}
        teachers["reference"] = ema
    callbacks: list[dict[str, Any]] = [
        {
            "class_path": "lightning.pytorch.callbacks.ModelCheckpoint",
            "init_args": {
                "filename": "{step}", "every_n_train_steps": 1, "save_last": True, "save_top_k": 2,
                "monitor": "loss",
            },
        },
        {"class_path": "callbacks.RngState"},
        {"class_path": "callbacks.RolloutLog", "init_args": {"every_n_steps": 1}},
    ]  # fmt: skip
    if method == "GOPD":
        callbacks.append({"class_path": "callbacks.EMATeacherUpdate"})
    scheduler = "torch.optim.lr_scheduler.LinearLR"
    settings = {
        "seed_everything": seed_everything,
        "model": {
            "class_path": f"{rooms}.methods.{method}",
            "init_args": {
                "student": {"path": student},
                **teachers,
                "optimizer": {"class_path": "torch.optim.AdamW", "init_args": {"lr": 1e-2}},
                "lr_scheduler": {"class_path": scheduler, "init_args": {"total_iters": 8}},
            },
        },
        "data": {
            "train": {"path": "train.jsonl"},
            "engine": {"class_path": f"{rooms}.rollouts.HFEngine"},
            "sampling": {"max_new_tokens": 3},
            "prompts_per_step": 2,
            "samples_per_prompt": 1,
        },
        "trainer": {
            "accelerator": "cpu",
            "devices": 1,
            "max_steps": steps,
            "accumulate_grad_batches": 2,
            "val_check_interval": 100,
            "check_val_every_n_epoch": None,
            "enable_progress_bar": False,
            "logger": {
                "class_path": "lightning.pytorch.loggers.TensorBoardLogger",
                "init_args": {"save_dir": str(RUN), "name": "", "version": ""},
            },
            "callbacks": callbacks,
        },
    }
    file.write_text(json.dumps(settings))


def put(path: Path, way: str, target: str = "") -> None:
    """Put something else in the place of a file."""
    if path.is_dir():
        shutil.rmtree(path)
    content = path.read_bytes() if path.is_file() else b""
    path.unlink(missing_ok=True)
    if way == "folder":
        path.mkdir()
    elif way == "pipe":
        os.mkfifo(path)
    elif way == "socket":
        import socket

        here = os.getcwd()
        os.chdir(path.parent)  # the whole path may be too long
        with socket.socket(socket.AF_UNIX) as bound:
            bound.bind(path.name)
        os.chdir(here)
    elif way == "link":
        path.symlink_to(target)
    elif way == "itself":
        path.symlink_to(path.name)
    elif way == "unreadable":
        path.write_bytes(content)
        path.chmod(0)
    elif way == "empty":
        path.touch()


# Content ----------------------------------------------------------------------------------------


def load(path: Path) -> dict[str, Any]:
    import torch

    content: dict[str, Any] = torch.load(path, weights_only=True)
    return content


def weights(path: Path) -> dict[str, bytes]:
    """Return the bytes of the module's and the optimiser's tensors by name."""
    content = load(path)
    found = {name: tensor.numpy().tobytes() for name, tensor in content["state_dict"].items()}
    for index, state in content["optimizer_states"][0]["state"].items():
        found |= {f"optimizer.{index}.{k}": t.numpy().tobytes() for k, t in state.items()}
    return found


def edited(random: Random, content: dict[str, Any]) -> tuple[bytes, str]:
    """Change the content of a checkpoint in one place; return the new file, and what was done."""
    import torch

    path = mutations.descent(random, content)
    old = mutations.at(content, path)
    if isinstance(old, torch.Tensor) and random.random() < 0.8:
        name = random.choice([*TENSORS])
        changed, what = mutations.put(content, path, TENSORS[name](old)), name
    else:
        mutation = mutations.changed(random, content, [path])
        changed, what = mutation.tree, f"{mutation.what}: {mutations.shown(mutation.value)}"
    buffer = io.BytesIO()
    torch.save(changed, buffer)
    return buffer.getvalue(), f"{'.'.join(str(key) for key in path)}: {what}"


TENSORS: dict[str, Callable[[Any], Any]] = {
    "NaN": lambda t: t * float("nan"),
    "infinite": lambda t: t / 0,
    "a row less": lambda t: t[:-1] if t.dim() else t[None],
    "transposed": lambda t: t.T if t.dim() == 2 else t[None],
    "half precision": lambda t: t.half(),
    "double precision": lambda t: t.double(),
    "whole numbers": lambda t: t.long(),
    "complex": lambda t: t + 0j,
    "empty": lambda t: t.flatten()[:0],
    "a view": lambda t: t[None].expand(3, *t.shape)[0],
    "sparse": lambda t: t.to_sparse(),
    "a list": lambda t: t.tolist(),
    "doubled": lambda t: t * 2,
    "on no device": lambda t: t.to("meta"),
}
