"""docs/scaling.md has the figures of the program that it names, and its configurations are read."""

import re
from pathlib import Path

import pytest
import yaml

from benchmarks.scaling.models import SHAPES, VOCABULARY, cached_bytes, model
from benchmarks.scaling.tables import TABLES
from opd_lightning.commands.lightning_cli import OPDCLI

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "scaling.md").read_text()
# Published: 10^9 parameters, and those that are no embedding.
BILLIONS = {"0.6B": (0.6, 0.4), "1.7B": (1.7, 1.4), "4B": (4.0, 3.6), "32B": (32.8, 31.2)}


@pytest.mark.parametrize("name", SHAPES)
def test_the_models_are_the_published_ones(name: str) -> None:
    """Counted by hand: projections, three matrices of the gated product, norms, embedding, head."""
    hidden, layers, heads, key_heads, intermediate, tied = SHAPES[name]
    projections = 2 * hidden * 128 * heads + 2 * hidden * 128 * key_heads
    layer = projections + 3 * hidden * intermediate + 2 * hidden + 2 * 128
    embeddings = VOCABULARY * hidden * (1 if tied else 2)
    every = sum(p.numel() for p in model(name).parameters())
    assert every == layers * layer + hidden + embeddings
    assert (round(every / 1e9, 1), round((every - embeddings) / 1e9, 1)) == BILLIONS[name]
    assert cached_bytes(name) == 2 * 2 * layers * key_heads * 128


# Adapters of the largest model take seconds to build, even without weights.
SLOW = ("plans", "others")


@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=pytest.mark.slow if n in SLOW else ()) for n in TABLES]
)
def test_the_page_has_what_the_program_prints(name: str) -> None:
    assert TABLES[name]() in PAGE


@pytest.mark.parametrize("block", re.findall(r"```yaml\n(.*?)```", PAGE, re.DOTALL))
def test_the_page_s_configurations_are_accepted(
    block: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    overlay = tmp_path / "plan.yaml"
    overlay.write_text(block)
    files = ("--config", str(ROOT / "configs" / "opd.yaml"), "--config", str(overlay))
    monkeypatch.setattr(OPDCLI, "instantiate_classes", lambda cli: None)
    monkeypatch.setattr(OPDCLI, "_run_subcommand", lambda cli, subcommand: None)
    given = yaml.safe_load(block)["data"]["max_tokens_per_micro_batch"]
    assert OPDCLI(["fit", *files]).config.fit.data.max_tokens_per_micro_batch == given
