"""The first losses of every method on the untrained lab; a refactor must not move them.

After a change that is meant to move them: `pytest tests/integration/test_golden.py --update-golden`
and give the reason in the commit.
"""

from pathlib import Path

import pytest

from opd_lightning.data.mix import RolloutMix
from opd_lightning.data.prompts import PromptSource
from opd_lightning.methods import OPD, SFT, DivergenceOPD
from tests.integration.test_fit import fit, method_of, sft_method

GOLDEN = Path(__file__).parents[1] / "golden"


@pytest.mark.usefixtures("in_deep_lab")
@pytest.mark.parametrize("kind", [OPD, DivergenceOPD, SFT])
def test_losses(kind: type, request: pytest.FixtureRequest) -> None:
    if kind is SFT:
        demonstrations = PromptSource("lab/arithmetic/demonstrations.jsonl")
        seen = fit(
            sft_method(), mix=RolloutMix(recorded=1), train=demonstrations, samples_per_prompt=1
        )
    else:
        seen = fit(method_of(kind), micro_batches=2)
    losses = [logged["loss"] for logged in seen.logged]
    path = GOLDEN / f"{kind.__name__}.txt"
    if request.config.getoption("--update-golden"):
        path.write_text("".join(f"{loss:.6f}\n" for loss in losses))
    golden = [float(line) for line in path.read_text().split()]
    assert losses == pytest.approx(golden, abs=2e-5)
