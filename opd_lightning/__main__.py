"""The `opd` command, and `python -m opd_lightning`.

Worker processes import the main script again: nothing heavy may be imported at its top.
"""

import signal
import sys


def main() -> None:
    try:
        from opd_lightning.cli import main as run
    except KeyboardInterrupt:
        sys.exit(128 + signal.SIGINT)
    run()


if __name__ == "__main__":
    main()
