"""Options that need no value: jsonargparse requires one for every option."""

from collections.abc import Sequence

FLAGS = ("--card", "--group", "--json")


def with_values(args: Sequence[str]) -> list[str]:
    """Return command-line words with `true` after flags that no value follows."""
    words: list[str] = []
    for word, after in zip(args, [*args[1:], ""], strict=True):
        words.append(word)
        if word in FLAGS and after not in ("true", "false"):
            words.append("true")
    return words
