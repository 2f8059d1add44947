"""Every lab configuration trains through `opd fit`; with vLLM twice, with the same curve."""

import re
from pathlib import Path

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from opd_lightning.cli import main

CONFIGS = Path(__file__).parents[2] / "configs"
LAB = sorted(path.stem for path in (CONFIGS / "lab").glob("*.yaml"))
ENGINE = "opd_lightning.rollouts.VLLMEngine"


def prepared(name: str, folder: Path, *more: str) -> Path:
    """Return the configuration with a separate run folder, after the commands of its header."""
    text = (CONFIGS / "lab" / f"{name}.yaml").read_text()
    path = folder / f"{name}.yaml"
    text = text.replace(f"runs/lab-{name.replace('_', '-')}", str(folder))
    # Trained by other configurations: see test_merging.py.
    text = re.sub(r"runs/lab-experts-\w+/student", "lab/skills/start", text)
    path.write_text(text)
    commands = path.read_text().split("\nseed_everything")[0].replace("\\\n#", "")
    for command in re.findall(r"^#   opd ((?:write-|cache-).*)$", commands, re.MULTILINE):
        words = [str(path) if word.endswith(f"{name}.yaml") else word for word in command.split()]
        main([*words, *more])
    return path


def curve(name: str, run: Path, *more: str, steps: int) -> dict[str, list[float]]:
    """Train a few small steps and return every scalar that is no time."""
    text = (CONFIGS / "lab" / f"{name}.yaml").read_text()
    several = int(re.findall(r"samples_per_prompt: (\d+)", text)[0] if "samples_per" in text else 1)
    run.mkdir()
    shorter = [
        *more,
        f"--trainer.max_steps={steps}",
        f"--trainer.val_check_interval={steps}",
        f"--trainer.logger.init_args.save_dir={run}",
        "--trainer.enable_progress_bar=false",
        "--data.prompts_per_step=8",
        f"--data.samples_per_prompt={min(several, 2)}",
        "--data.sampling.max_new_tokens=10",
    ]
    config = prepared(name, run, *shorter)
    main(["fit", "--config", str(config), *shorter])
    events = EventAccumulator(str(run))
    events.Reload()
    tags = [t for t in events.Tags()["scalars"] if not t.startswith(("time/", "cost/", "tokens_"))]
    found = {tag: [event.value for event in events.Scalars(tag)] for tag in tags}
    assert len(found["loss"]) == steps
    assert any(tag.startswith("val/") for tag in found)
    return found


# Each has something that the others of these lack: commands that come first, demonstrations, views,
# a running average, measurements of the start.  All configurations are built, and all methods
# trained, by other tests that are not slow.
QUICK = ("edge_opd", "lightning_opd", "retention", "sdft", "sg_opd")


@pytest.mark.usefixtures("in_lab")
@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=() if n in QUICK else pytest.mark.slow) for n in LAB]
)
def test_trains(name: str, tmp_path: Path) -> None:
    found = curve(name, tmp_path / "run", steps=1)
    # Nothing that these random models write earns a reward, and experts that are the student
    # itself teach it nothing.
    unrewarded = ("grpo", "rlsd", "sdpo", "seqkd", "experts_sums", "experts_programs")
    learns = name not in (*unrewarded, "mopd", "exopd_merge")
    assert (max(found["optim/gradient_norm"]) > 0) is learns


@pytest.mark.slow
@pytest.mark.vllm
@pytest.mark.usefixtures("in_lab")
@pytest.mark.parametrize("name", LAB)
def test_trains_on_vllm_twice_alike(name: str, tmp_path: Path) -> None:
    vllm = ("--config", str(CONFIGS / "engine" / "vllm.yaml"))
    first, second = (curve(name, tmp_path / run, *vllm, steps=2) for run in ("first", "second"))
    assert first == second
