"""Seeds that depend on coordinates, never on call order."""

import hashlib

# Purpose of a seed, its first coordinate, so that two uses never share a random stream.
PROMPT_ORDER, TRAINING_SAMPLE, EVALUATION_SAMPLE, AUTHOR, GUIDANCE = range(5)
WRITTEN_SAMPLE, SHOWN_SAMPLE, TOKEN_CHOICE, STEP_ORDER, TRUST_REGION = range(5, 10)


def derive_seed(*coordinates: int) -> int:
    """Return a 31-bit seed for (purpose, run seed, step, prompt index, sample index, ...).

    The same coordinates give the same seed on every rank, machine and Python version, different
    ones give unrelated seeds. A resumed run therefore draws what an uninterrupted one draws.
    """
    text = ",".join(str(int(c)) for c in coordinates)
    digest = hashlib.blake2b(text.encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") & 0x7FFFFFFF
