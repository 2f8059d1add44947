"""The commands of `opd`, and its first page of help; nothing heavy is imported for either."""

from __future__ import annotations

from difflib import get_close_matches

from opd_lightning.errors import UserError

# Commands of Lightning's trainer and of ours, as they are typed.
TRAINER_COMMANDS = {
    "fit": "train a student",
    "validate": "score a student on the validation suites",
    "test": "score a student on the test suites",
    "check": "look at a run before it starts: settings, tokens, numbers, cost",
    "estimate": "memory and hours of a run, from the config.json of its models",
    "sample": "answer a prompt or chat, tokens coloured by what the teacher thinks of them",
    "export": "write a checkpoint's student as a Hugging Face folder",
    "write-responses": "write responses to the training prompts into a prompt file",
    "cache-teacher": "score recorded responses with the teacher once, in advance",
}
OTHER_COMMANDS = {
    "compare": "show runs side by side, as tables and curves",
    "configs": "list, show or copy the configurations that come with the program",
    "lab": "make tiny models and data to try things on; `opd lab demo` trains on them",
    "serve": "put a teacher or a student behind vLLM's server",
}
COMMANDS = TRAINER_COMMANDS | OTHER_COMMANDS

EXAMPLES = (
    "opd lab build                                    # tiny models and data",
    "opd fit --config configs/lab/opd.yaml            # train; the same command takes any YAML",
    "opd sample --config runs/lab-opd/config.yaml --ckpt_path last --prompt 347+589=",
)


def overview() -> str:
    """Return the text of `opd --help`."""
    width = max(len(name) for name in COMMANDS)
    lines = [
        "usage: opd COMMAND [--config FILE ...] [--OPTION VALUE ...]",
        "",
        "On-policy distillation of language models.",
        "",
        "commands:",
        *(f"  {name:{width}}  {text}" for name, text in COMMANDS.items()),
        "",
        "examples:",
        *(f"  {example}" for example in EXAMPLES),
        "",
        "`opd COMMAND --help` shows a command's options, `opd --version` the version.",
    ]
    return "\n".join(lines)


def check_command(command: str) -> None:
    """Raise UserError for an unknown command; underscores count as dashes."""
    if command.replace("_", "-") in COMMANDS:
        return
    if not command:
        raise UserError(f"expected a command: {', '.join(COMMANDS)} (`opd --help` describes them)")
    near = get_close_matches(command, COMMANDS, n=1)
    hint = f"did you mean {near[0]!r}?" if near else f"expected one of {', '.join(COMMANDS)}"
    raise UserError(f"got the command {command!r}; {hint} (`opd --help` describes them)")
