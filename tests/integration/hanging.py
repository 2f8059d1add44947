"""Program `hanging FOLDER STALENESS`: trains in the untrained lab, the working folder.

The engine's third call hangs. Checkpoints go to FOLDER.
"""

import signal
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from lightning.pytorch.callbacks import ModelCheckpoint

from opd_lightning.rollouts import HFEngine, Request, Sampling
from opd_lightning.types import Completion
from tests.integration.test_fit import fit
from tests.integration.test_interrupted import method


class HangingEngine(HFEngine):
    calls = 0

    def generate(self, requests: Sequence[Request], sampling: Sampling) -> list[Completion]:
        self.calls += 1
        if self.calls == 3:
            time.sleep(600)
        return super().generate(requests, sampling)


def main(folder: Path, staleness: int) -> None:
    fit(
        method(staleness=staleness),
        engine=HangingEngine(),
        steps=4,
        callbacks=[ModelCheckpoint(folder, every_n_train_steps=100, save_last=True)],
        max_staleness=staleness,
        engine_time_limit=3.0,
    )


if __name__ == "__main__":
    # Background jobs of shells ignore it.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    main(Path(sys.argv[1]), int(sys.argv[2]))
