"""Texts that a model may write, for verifiers: mathematics, code, patterns' worst cases, noise."""

from __future__ import annotations

from collections.abc import Callable
from random import Random

from tests.fuzz.mutations import TEXTS

ANSWERS = (
    "4", "-17", "1/2", "0.5", "\\frac{1}{2}", "x^2+1", "(1,2)", "\\{1,2,3\\}", "[0,1)", "\\pi",
    "50\\%", "1,000", "3\\sqrt{2}", "x=3", "\\begin{pmatrix}1&2\\\\3&4\\end{pmatrix}", "yes",
    "\\text{Monday}", "10^{6}", "\\infty", "12:30", "é", "", "2^{10}",
)  # fmt: skip
PIECES = (
    *ANSWERS, "\\boxed{", "}", "{", "$", "$$", "\\[", "\\]", "\\(", "\\)", "\\frac", "\\frac{",
    "\\sqrt[", "^", "_", "!", "!!", "\\sum_{i=1}^{n}", "\\int", "\\lim", "\\log_", "\\cdot",
    "\\times", "=", "<", ",", ";", ";4", "answer: 4", "The answer is", "\n", "\t", " ", "\\", "&",
    "%", "#", "1e400", "0x10", "NaN", "inf", "I", "E", "oo", "lambda",
    "__import__('os').system('true')", "def f():\n return 1", "```python\n", "```", "print(4)",
    "<|end|>", "**", "//", "\\left(", "\\right)", "\\overline{", "\\binom{5}{2}", "Matrix([[1]])",
    "factorial(10)", "zoo", "S.Half",
)  # fmt: skip


def text(random: Random, *, heavy: float = 0.04) -> str:
    """Return a response; a share `heavy` of them may take as long as a verifier lets them."""
    if random.random() < heavy:
        return random.choice(_HEAVY)(random)
    return random.choice((_pieces, _pieces, _boxed, _boxed, _noise, _long))(random)


def _pieces(random: Random) -> str:
    return "".join(random.choice(PIECES) for _ in range(random.choice((1, 3, 10, 40))))


def _boxed(random: Random) -> str:
    inside = "".join(random.choice(PIECES) for _ in range(random.choice((1, 1, 2, 5))))
    return f"{_pieces(random)} \\boxed{{{inside}}}{random.choice(('', '.', ' ', inside))}"


def _noise(random: Random) -> str:
    if random.random() < 0.5:
        return random.choice(TEXTS) * random.choice((1, 3, 100))
    drawn = (
        random.choice((0x7F, 0x2FF, 0xFFFF, 0x10FFFF)) for _ in range(random.choice((1, 20, 300)))
    )
    return "".join(chr(random.randrange(most)) for most in drawn)


def _long(random: Random) -> str:
    """Long, and yet quick to read."""
    piece = random.choice(
        ("a", " ", "\n", "ab ", "é", "\\", "7 ", "the answer is ", "x+", "\u200b")
    )
    return piece * random.choice((1000, 20_000, 200_000)) + random.choice(ANSWERS)


def _repeated(piece: str, *times: int) -> Callable[[Random], str]:
    return lambda random: piece * random.choice(times)


def _inside(before: str, core: str, after: str, *depths: int) -> Callable[[Random], str]:
    def make(random: Random) -> str:
        depth = random.choice(depths)
        return f"\\boxed{{{before * depth}{core}{after * depth}}}"

    return make


_HEAVY: tuple[Callable[[Random], str], ...] = (
    _repeated("7", 5000, 90_000, 1_000_000),
    _repeated("1,", 500, 5000),
    _repeated("\\boxed{1}", 100, 6000),
    _repeated("$1$ ", 100, 5000),
    _repeated("a" * 40 + "!", 1, 1000),
    _inside("\\frac{1}{", "2", "}", 20, 100, 500),
    _inside("(", "1", ")", 10, 14, 100, 5000),
    _inside("{", "1", "}", 10, 140, 5000),
    _inside("\\sqrt{", "2", "}", 20, 140, 1000),
    _inside("1+(", "x", ")", 20, 140),
    _inside("2^{", "2", "}", 3, 6, 50),
    _inside("-", "1", "", 100, 5000),
    lambda random: f"\\boxed{{{random.choice((20, 10**4, 10**7))}!}}",
    lambda random: f"\\boxed{{10^{{{random.choice((100, 10**5, 10**10))}}}}}",
    lambda random: "\\boxed{9^{9^{9^{9}}}}",
    lambda random: f"\\boxed{{{'7' * random.choice((4300, 4301, 50_000))}}}",
    lambda random: f"\\boxed{{0.{'3' * random.choice((400, 20_000))}}}",
    lambda random: f"\\boxed{{\\sum_{{i=1}}^{{{random.choice((10, 10**8))}}} i!}}",
    lambda random: f"\\boxed{{x^{{{random.choice((50, 3000))}}} = (x+1)^{{300}}}}",
    lambda random: "\\boxed{\\binom{1000000}{500000}}",
)
