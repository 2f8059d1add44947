"""Time and memory of each kind of teacher in `opd fit`, on the lab.

Each kind runs the same configuration with another `teacher`, in a fresh process; a server or a
cache is prepared first if needed. Time is the logged time per response token: of the stage
"teacher", in which the step waits for it, and of the whole step. Memory is the peak resident size
of the trainer relative to the run with the student without adapter as teacher, which has no second
model.

Run: opd lab build; python benchmarks/teachers.py [--steps 20] [--out teachers.json]
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from typing import Any

from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

OPD = [sys.executable, "-m", "opd_lightning"]
CONFIG = Path(__file__).parents[1] / "configs" / "lab"
TEACHERS = "opd_lightning.teachers."
LAB = "lab/arithmetic"
FROZEN = {"class_path": f"{TEACHERS}FrozenTeacher", "init_args": {"path": f"{LAB}/teacher"}}
DOMAINS = ("add-2", "add-3", "sub-2", "sub-3")
LORA = {"r": 8, "target_modules": ["q_proj", "v_proj"]}


def kinds(work: Path, address: str) -> dict[str, dict[str, Any]]:
    """Return the changes to the configuration, by kind."""

    def teacher(name: str, **init_args: Any) -> dict[str, Any]:
        return {"model": {"init_args": {"teacher": {"class_path": TEACHERS + name} | (
            {"init_args": init_args} if init_args else {})}}}  # fmt: skip

    update = {"trainer": {"callbacks": [{"class_path": "callbacks.EMATeacherUpdate"}]}}
    adapter_off = teacher("AdapterOffTeacher")
    adapter_off["model"]["init_args"]["student"] = {"lora": LORA}
    remote = teacher(
        "RemoteTeacher", path=f"{LAB}/teacher", servers=[address], key_file=str(work / "key")
    )
    remote_quiet = json.loads(json.dumps(remote))
    remote_quiet["model"]["init_args"]["overlap_top_k"] = 0
    return {
        "adapter off": adapter_off,
        "frozen": teacher("FrozenTeacher", path=f"{LAB}/teacher"),
        "frozen, offload": teacher("FrozenTeacher", path=f"{LAB}/teacher", offload=True),
        "EMA": teacher("EMATeacher", rate=0.01) | update,
        "by domain, 4 frozen": teacher("ByDomainTeacher", teachers=dict.fromkeys(DOMAINS, FROZEN)),
        "cross-tokenizer": teacher("CrossTokenizerTeacher", path=f"{LAB}/teacher"),
        "remote": remote_quiet,
        "remote, overlap 16": remote,
        "cached": {},  # another method and other responses: see `cached`
    }


@contextmanager
def server(work: Path) -> Iterator[str]:
    """Run `opd serve` for the lab's teacher and yield its address."""
    arguments = ["--model", f"{LAB}/teacher", "--key_file", work / "key"]
    arguments += ["--address_file", work / "address"]
    process = subprocess.Popen([*OPD, "serve", *map(str, arguments)], stdout=subprocess.DEVNULL)
    try:
        while not (work / "address").exists():
            if process.poll() is not None:
                raise SystemExit("the server did not start; run it by hand to see why")
            time.sleep(0.5)
        yield (work / "address").read_text().strip()
    finally:
        process.terminate()
        process.wait()


def cached(work: Path, steps: int) -> list[str]:
    """Write and score responses; return the arguments of a run that trains on them."""
    rows = work / "responses.jsonl"
    arguments = ["--config", str(CONFIG / "lightning_opd.yaml")]
    arguments += ["--model.init_args.teacher.init_args.cache", str(work / "cache")]
    prompts = ["--data.train.path", f"{LAB}/train.jsonl", "--data.train.limit", str(256 * steps)]
    subprocess.run([*OPD, "write-responses", *arguments, *prompts, "--out", str(rows)], check=True)
    arguments += ["--data.train.path", str(rows)]
    subprocess.run([*OPD, "cache-teacher", *arguments], check=True)
    return arguments


def measure(name: str, arguments: list[str], work: Path, steps: int) -> dict[str, Any]:
    run = work / name.replace(" ", "_")
    arguments += ["--trainer.max_steps", str(steps), "--trainer.val_check_interval", str(10**6)]
    arguments += ["--trainer.enable_progress_bar", "false", "--trainer.logger.init_args.save_dir"]
    arguments += [str(run), "--model.init_args.lr_scheduler", "null"]
    process = subprocess.Popen([*OPD, "fit", *arguments], stdout=subprocess.DEVNULL)
    _, status, usage = os.wait4(process.pid, 0)
    if status:
        raise SystemExit(f"{name}: opd fit ended with {status}")
    events = EventAccumulator(str(run), size_guidance={"scalars": 0}).Reload()

    def figure(tag: str) -> float:
        return median(x.value for x in events.Scalars(tag)[2:])  # the first ones warm up

    return {
        "teacher": figure("cost/teacher_us_per_token"),
        "step": figure("cost/step_us_per_token"),
        "mib": usage.ru_maxrss / 1024,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--only", nargs="*", help="kinds to measure")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    found: dict[str, dict[str, Any]] = {}
    with TemporaryDirectory() as folder, server(work := Path(folder)) as address:
        for name, changes in kinds(work, address).items():
            if options.only and name not in options.only:
                continue
            if name == "cached":
                arguments = cached(work, options.steps)
            else:
                (work / "kind.json").write_text(json.dumps(changes))
                arguments = ["--config", str(CONFIG / "opd.yaml"), "--config"]
                arguments += [str(work / "kind.json")]
            found[name] = measure(name, arguments, work, options.steps)
            row = found[name]
            print(f"{name:22s} teacher {row['teacher']:7.1f} us/token, step {row['step']:7.1f},"
                  f" peak {row['mib']:6.0f} MiB", flush=True)  # fmt: skip
    if options.out:
        options.out.write_text(json.dumps(found, indent=2) + "\n")


if __name__ == "__main__":
    main()
