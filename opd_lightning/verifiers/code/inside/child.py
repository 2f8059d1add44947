"""Entry point of the processes that run programs and tests, confined.

Run by path as `python child.py SETTINGS`: a JSON object with

- `mode`: "script" runs a program as the main module, on its standard input and output; "host" runs
  it as a module and answers calls of its functions; "judge" runs tests against a host;
- `source`: file descriptor of the program's or the tests' text;
- `seconds`, `memory_bytes`, `file_bytes`: limits;
- `folder`, `readable`: for Landlock, without bubblewrap; else null;
- `verdict`: file descriptor of the judge's answer.

The host never sees the tests: it receives a function name and arguments, and returns a value.
Changes to its own process therefore cannot make a wrong value pass. The judge runs none of the
program's code.
"""

import ast
import builtins
import importlib
import json
import os
import sys
import types
from collections.abc import Callable
from typing import Any

import confine
import exchange

SHOWN = 300  # characters of a value or statement in a verdict


def main() -> None:
    settings = json.loads(sys.argv[1])
    with open(settings["source"], "rb") as file:
        source = file.read().decode()
    confine.set_limits(settings["seconds"], settings["memory_bytes"], settings["file_bytes"])
    if settings["folder"] is not None:
        confine.die_with_parent()
        os.chdir(settings["folder"])
        if settings["readable"] is not None:
            confine.hide_files([settings["folder"], os.devnull], settings["readable"])
    confine.forbid_calls()
    sys.argv = ["program.py"]
    # Made by `site`, which is not imported without packages.
    vars(builtins).update(exit=sys.exit, quit=sys.exit)
    del sys.path[0]  # this folder: its modules are no program's
    if settings["mode"] == "script":
        run_script(source)
    elif settings["mode"] == "host":
        run_host(source)
    else:
        run_judge(source, settings["verdict"])


def run_script(source: str) -> None:
    """Run a program as the main module; an error ends the process with code 1 and one line."""
    module = types.ModuleType("__main__")
    sys.modules["__main__"] = module
    try:
        exec(compile(source, "program.py", "exec"), module.__dict__)
    except Exception as error:
        sys.stdout.flush()
        print(_named(error), file=sys.stderr, flush=True)
        os._exit(1)


# The program's side -----------------------------------------------------------------------------


def run_host(source: str) -> None:
    """Run a program as a module, then answer calls until the judge ends."""
    line = exchange.Line(os.dup(0), os.dup(1))
    silence = os.open(os.devnull, os.O_RDWR)
    for fd in (0, 1, 2):
        os.dup2(silence, fd)
    module = types.ModuleType("program")
    sys.modules["program"] = module
    try:
        exec(compile(source, "program.py", "exec"), module.__dict__)
    except BaseException as error:
        line.send({"error": _named(error)})
        return
    line.send({"names": {name: _kind(value) for name, value in list(vars(module).items())}})
    objects: list[object] = []
    while True:
        request = line.receive()
        try:
            line.send(_answer(request, module, objects))
        except exchange.ClosedError:
            raise
        except BaseException as error:
            line.send({"error": _named(error), "type": type(error).__name__})


def _answer(
    request: dict[str, Any], module: types.ModuleType, objects: list[object]
) -> dict[str, Any]:
    """Call what a request names, and return its value and the arguments as they are then."""
    owner = module if request["object"] is None else objects[request["object"]]
    args = exchange.decode(request["args"])
    named = exchange.decode(request["named"])
    value = getattr(owner, request["name"])
    if request["call"]:
        value = value(*args, **named)
    elif callable(value):
        return {"callable": True}
    reply = {"args": exchange.encode(args)}
    if type(value).__module__ == "program":  # an instance of the program's own class
        objects.append(value)
        return reply | {"object": len(objects) - 1}
    return reply | {"value": exchange.encode(value)}


def _kind(value: object) -> dict[str, Any]:
    """Describe a name of the program for tests: a callable, a module, or a value."""
    if isinstance(value, types.ModuleType):
        return {"module": value.__name__}
    if callable(value):
        return {"callable": True}
    try:
        return {"value": exchange.encode(value)}
    except Exception:
        return {}


# The tests' side --------------------------------------------------------------------------------


class ProgramError(Exception):
    """The program raised an exception, or ended."""


def run_judge(source: str, verdict: int) -> None:
    """Run tests against a host and write the verdict, JSON, to a file descriptor."""
    line = exchange.Line(os.dup(0), os.dup(1))
    silence = os.open(os.devnull, os.O_RDWR)
    for fd in (0, 1):
        os.dup2(silence, fd)
    tree = ast.parse(source)
    total = sum(isinstance(node, ast.Assert) for node in tree.body)
    passed, failure = 0, None
    try:
        names = _names(line)
        for node in tree.body:
            if (failure := _run(node, source, names)) is not None:
                break
            passed += isinstance(node, ast.Assert)
    except (ProgramError, exchange.ClosedError) as error:
        failure = str(error)
    # Tests without an assert at top level, such as check(candidate), are one.
    passed = passed if total else int(failure is None)
    counts = {"passed": passed, "total": total or 1}
    with open(verdict, "wb") as file:
        file.write(json.dumps(counts | {"failure": failure}).encode())


def _run(node: ast.stmt, source: str, names: dict[str, Any]) -> str | None:
    """Run a statement of the tests; return why it failed, or None."""
    shown = " ".join((ast.get_source_segment(source, node) or "").split())[:SHOWN]
    test = node.test if isinstance(node, ast.Assert) else None
    try:
        if isinstance(test, ast.Compare) and len(test.ops) == 1 and isinstance(test.ops[0], ast.Eq):
            left, right = (_value(part, names) for part in (test.left, test.comparators[0]))
            return None if left == right else f"{shown}: got {repr(left)[:SHOWN]}"
        exec(compile(ast.Module([node], []), "tests.py", "exec"), names)
    except AssertionError as error:
        text = str(error)[:SHOWN]
        return f"{shown}: {text}" if text else shown
    except exchange.ClosedError as error:
        raise ProgramError(f"{shown}: {error}") from None
    except Exception as error:
        text = str(error) if isinstance(error, ProgramError) else _named(error)
        return f"{shown}: {text}"[: 2 * SHOWN]
    return None


def _value(node: ast.expr, names: dict[str, Any]) -> object:
    return eval(compile(ast.Expression(node), "tests.py", "eval"), names)


def _names(line: exchange.Line) -> dict[str, Any]:
    """Return the namespace of the tests: what the program defines, to be called over the line."""
    message = line.receive()
    if "error" in message:
        raise ProgramError(f"the program ended: {str(message['error'])[:SHOWN]}")
    names: dict[str, Any] = {"__name__": "tests"}
    for name, kind in dict(message.get("names", {})).items():
        if kind.get("module") in sys.stdlib_module_names:
            names[name] = importlib.import_module(kind["module"])
        elif kind.get("callable"):
            names[name] = _caller(line, name)
        elif "value" in kind and not name.startswith("__"):
            names[name] = exchange.decode(kind["value"])
    return names


def _caller(line: exchange.Line, name: str, owner: int | None = None) -> Callable[..., object]:
    def call(*args: object, **named: object) -> object:
        return _ask(line, owner, name, args, named, call=True)

    call.__name__ = name
    return call


class Remote:
    """An instance of a class of the program, whose methods and attributes the program computes."""

    def __repr__(self) -> str:
        return "an instance of a class of the program"

    def __init__(self, line: exchange.Line, number: int) -> None:
        self._line = line
        self._number = number

    def __getattr__(self, name: str) -> object:
        if name.startswith("__"):
            raise AttributeError(name)
        return _ask(self._line, self._number, name, (), {}, call=False)


def _ask(
    line: exchange.Line,
    owner: int | None,
    name: str,
    args: tuple[object, ...],
    named: dict[str, object],
    *,
    call: bool,
) -> object:
    """Have the program call a function or read an attribute; update changed arguments."""
    line.send(
        {
            "object": owner,
            "name": name,
            "args": exchange.encode(list(args)),
            "named": exchange.encode(named),
            "call": call,
        }
    )
    reply = line.receive()
    if "error" in reply:
        raise _error(str(reply.get("type")), str(reply["error"])[:SHOWN])
    if reply.get("callable"):
        return _caller(line, name, owner)
    if call:
        for mine, theirs in zip(args, exchange.decode(reply["args"]), strict=False):
            _become(mine, theirs)
    if "object" in reply:
        return Remote(line, int(reply["object"]))
    return exchange.decode(reply.get("value"))


def _error(kind: str, text: str) -> Exception:
    """Return a `ProgramError` that tests can also catch as the program's class of exception."""
    base: Any = getattr(builtins, kind, None)
    try:
        return type(kind, (ProgramError, base), {})(text)
    except TypeError:  # no exception, or one with other arguments
        return ProgramError(text)


def _become(mine: Any, theirs: Any) -> None:
    """Give a mutable argument the contents that the program's copy has after the call."""
    if type(mine) is not type(theirs):
        return
    if isinstance(mine, list):
        mine[:] = theirs
    elif isinstance(mine, dict | set):
        mine.clear()
        mine.update(theirs)


def _named(error: BaseException) -> str:
    return f"{type(error).__name__}: {error}"[:SHOWN]


if __name__ == "__main__":
    main()
