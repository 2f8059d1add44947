"""Messages of the argument parser as one line in this program's words."""

from __future__ import annotations

import re
from traceback import extract_tb

from opd_lightning.errors import shortened

# Lines of jsonargparse that do not state the cause: type unions, dumps of the value.
_NOISE = re.compile(
    r"^(Does not validate against any of the Union subtypes|Subtypes: .*|Errors:"
    r"|Given value type: .*|Given value: (?!\S+$).*"
    r"|Expected a <class 'NoneType'>.*|Expected a path but .*|tip: .*)$"
)
# A mistake inside a class that was given; what else its parameter accepts is no cause.
_INSIDE = "Problem with given class_path"
_ALTERNATIVE = "expected a"
# What a parameter accepts in place of a class.
_CLASS = re.compile(
    r"Not a valid subclass of (\w+)(\. Got value: .*)?\n\s*"
    r"Subclass types expect one of:(\n\s*- a .*)*"
)
# Applied in order; later patterns match replacements of earlier ones.
_WORDS = [
    (r"Parser key \"(?:fit\.|validate\.|test\.)?([^\"]*)\": ?", r"\1: "),
    (
        r"the following arguments are required: (?:fit\.|validate\.|test\.)?([^\s;]+)",
        r"\1: got nothing, expected a value",
    ),
    (r"(?:Group|Subcommand) '([^']*)' does not accept option '([^']*)'", r"\1.\2 is not accepted"),
    (
        r'expected "subcommand" to be one of \{([^}]*)\}, but it was not provided\.?',
        r"expected a command: \1",
    ),
    (
        r"argument subcommand: invalid choice: ('[^']*') \(choose from ([^)]*)\)",
        r"got the command \1, expected \2",
    ),
    (r"unrecognized arguments: ", "not accepted: "),
    (r"Unexpected config:? ?", "expected settings, as 'key: value', got "),
    (r"Unable to load config ", "expected options, or a YAML file of them, got "),
    (r"Expected a dot import path string: [^.,;\s]*", "expected the import path of a class"),
    (r"Problem with given class_path ('[^']*'):", r"\1:"),
    (r"Problems parsing config: ", "is no YAML: "),
    (r"Expected an? <class 'int'>", "expected a whole number"),
    (r"Expected an? <class 'float'>", "expected a number"),
    (r"Expected an? <class 'str'>", "expected a text"),
    (r"Expected an? <class 'bool'>", "expected true or false"),
    (r"Expected an? <class '(?:list|tuple|set|collections\.abc\.\w+)'>", "expected a list"),
    (r"Expected an? <class 'dict'>", "expected a table of names and values"),
    (r"Expected an? typing\.Literal\[([^\]]*)\]", r"expected one of \1"),
    (r"<(?:class|enum) '(?:[\w.]*\.)?(\w+)'>", r"\1"),
    (r"(?:\.|;) (?:Got|Given) value: ", ", got "),
    (r"\bgot None\b", "got null"),
    (r"\b([\w.]+): (\1: )+", r"\1: "),
    (r"Type typing\.Callable.*? expects a function or a callable class: ", ""),
    (r", got Namespace\(.*$", ""),
    # Places of nested classes: "model: 'a.Class': teacher: 'a.Teacher': path: ...".
    (r"\b([\w.]+): '[\w.]+': (?=[a-z_]\w*: )", r"\1."),
    (r"^([\w.]+)[:.] ?([a-z_]\w*): (?=[a-z_]\w*: )", r"\1.\2."),
]  # fmt: skip


def hint(prog: str) -> str:
    """Return a hint to the help of the parser `prog`; nested parsers point to `opd --help`."""
    command = prog.replace(" [options]", "").replace("_", "-")  # as it is typed
    return f"`{command if command.startswith('opd') else 'opd'} --help` lists what is accepted"


def failed_import(error: BaseException | None) -> str | None:
    """Return the line of a module whose import raised what a parser reports, with its class."""
    while error is not None and error.__cause__ is not None:
        error = error.__cause__
    frames = extract_tb(error.__traceback__) if error is not None else []
    raised = [frame for frame in frames if frame.name == "<module>"]
    if not raised:
        return None
    return f"{type(error).__name__} in {raised[-1].filename!r}, line {raised[-1].lineno}"


def one_line(message: str) -> str:
    """Return the causes in a parser's message, outermost first, at most 400 characters."""
    message = _CLASS.sub(r"expected a class of \1 (class_path and init_args)\2", message)
    lines = [line for line in message.splitlines() if line.strip()]
    inside = [_depth(line) for line in lines if _INSIDE in line]
    causes = []
    for line in lines:
        text = line.strip().removeprefix("- ")
        is_other = text.lower().startswith(_ALTERNATIVE) and _depth(line) <= max(inside, default=-1)
        if not is_other and not _NOISE.match(text):
            causes.append(text)
    text = " ".join(cause if cause.endswith(":") else cause + ";" for cause in causes)
    text = text.rstrip(";")
    for pattern, words in _WORDS:
        text = re.sub(pattern, words, text)
    # Parsers that try twice repeat a cause with other quotes.
    parts = {part.replace('"', "'"): part for part in text.split("; ")}
    return shortened("; ".join(parts.values()))


def _depth(line: str) -> int:
    """Return the indentation of a line, in characters; a list's dash is a part of it."""
    return len(line) - len(line.lstrip(" -"))
