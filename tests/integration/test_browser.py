"""TensorBoard of a lab run in headless Chromium."""

from functools import partial
from pathlib import Path

import pytest

from opd_lightning.cli import main
from tests.browser import READ, browsing, chromium
from tests.tensorboard_server import tensorboard

CONFIG = Path(__file__).parents[2] / "configs" / "lab" / "opd.yaml"
STEPS = 3
# By tab: text of its page that depends on the run's data.
TABS = {
    "scalars": ["reward", "signal", "overlap", "depth_log_ratio_abs", "collapse"],
    "custom_scalars": [
        "Does it learn?",
        "sums: score and its 95 % interval",
        "◼ val/sums/score",
        "◼ loss",
        "◆ entropy/teacher",
        "Do they collapse?",
    ],
    "images": ["signal/by_depth", "step 0"],
    "histograms": ["signal/log_ratio"],
    "text": ["rollouts/text_summary", "mean log-prob", "step 0"],
    "hparams": ["method", "OPD", "optimizer.lr", "0.0025", "val/sums/score"],
}

# Of all pictures that are loaded: text alone would be there without them.
WIDTHS = """
(function find(node) {
  const here = node.nodeName === "IMG" && node.naturalWidth > 0 ? [node.naturalWidth] : [];
  const inside = [...(node.shadowRoot ? node.shadowRoot.childNodes : []), ...node.childNodes];
  return here.concat(...inside.map(find));
})(document.documentElement)
"""


def says(texts: list[str], said: str) -> bool:
    return all(text in said for text in texts)


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_every_tab_shows_the_run(in_lab: Path, tmp_path: Path) -> None:
    if chromium() is None:
        pytest.skip("no Chromium is installed")
    main(
        [
            *("fit", "--config", str(CONFIG)),
            f"--trainer.logger.init_args.save_dir={tmp_path / 'run'}",
            f"--trainer.max_steps={STEPS}",
            "--trainer.val_check_interval=2",
            "--trainer.enable_progress_bar=false",
            "--data.prompts_per_step=4",
            "--data.sampling.max_new_tokens=12",
        ]
    )
    with tensorboard(tmp_path / "run") as address, browsing(tmp_path / "profile") as page:
        for tab, texts in TABS.items():
            page.open("about:blank")  # the text of another tab is gone
            page.open(f"{address}#{tab}")
            said = page.wait_for(READ, partial(says, texts))
            assert not [text for text in texts if text not in said], (tab, said)
        page.open("about:blank")
        page.open(f"{address}#images")
        assert page.wait_for(WIDTHS, bool) == [336]
