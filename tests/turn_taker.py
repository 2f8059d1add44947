"""A side of `benchmarks/peers` that does nothing: makes steps of three tokens, or fails."""

import sys
from time import sleep

from benchmarks.peers.turns import Turns

if __name__ == "__main__":
    turns = Turns()
    turns.start()
    print("as libraries do", end="")
    if sys.argv[1] == "fail":
        raise ValueError("a reason")
    sleep(0.02)
    while turns.end(3, {"sleep": 0.02}):
        sleep(0.02)
