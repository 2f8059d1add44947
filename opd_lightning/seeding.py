"""Seeds that are functions of coordinates, never of call order."""

import hashlib

# What a seed is for; part of its coordinates, so that two uses never share a stream.
PROMPT_ORDER, TRAINING_SAMPLE, EVALUATION_SAMPLE, AUTHOR, GUIDANCE = range(5)
WRITTEN_SAMPLE, SHOWN_SAMPLE = range(5, 7)


def derive_seed(*coordinates: int) -> int:
    """A 31-bit seed for (purpose, run seed, step, prompt index, sample index, ...).

    The same coordinates give the same seed on every rank, machine and Python version, and
    different ones give unrelated seeds, so a resumed run draws what the unbroken one would have.
    """
    text = ",".join(str(int(c)) for c in coordinates)
    digest = hashlib.blake2b(text.encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") & 0x7FFFFFFF
