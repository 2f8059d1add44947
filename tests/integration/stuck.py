"""Program `stuck WAY`: hangs, in one of three ways, in a call with a time limit of a second."""

import ctypes
import signal
import sys
import time

from opd_lightning.rollouts.time_limit import TimeLimit


def busy() -> None:
    while True:
        pass


def deaf() -> None:
    ctypes.PyDLL(None).sleep(600)  # holding Python's global lock


def stubborn() -> None:
    while True:
        try:
            time.sleep(600)
        except KeyboardInterrupt:
            print("interrupted", file=sys.stderr)


if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        with TimeLimit(1.0, lambda: "rank 3, step 4", "the setting").of("the call"):
            globals()[sys.argv[1]]()
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        sys.exit(1)
