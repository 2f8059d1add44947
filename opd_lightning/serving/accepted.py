"""Requests that a server accepts: the routes of trainers, and the fields of their bodies.

vLLM ignores unknown fields, accepts "1" and true as 1, and has routes that stop or change the
server. Requests that trainers do not send are refused here, in one line that names the cause.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from typing import Any

from opd_lightning.models import strict_json
from opd_lightning.serving.answers import shown

Check = Callable[[str, Any], None]


class RefusedError(ValueError):
    """A request that the server does not accept.

    Args:
        reason: One line.
        status: HTTP status of the answer.
    """

    def __init__(self, reason: str, status: int = 400) -> None:
        super().__init__(reason)
        self.status = status


class Limits:
    """Limits of the served model on requests.

    Attributes:
        vocabulary: Number of token ids; None until the model is known.
        check_push: Raises RefusedError for a folder that does not hold the model's weights; None
            where weights are fixed.
    """

    vocabulary: int | None = None
    check_push: Callable[[str], None] | None = None


LIMITS = Limits()


def check(method: str, path: str, query: str, body: bytes) -> Any:
    """Return the decoded body of a request that trainers send; None if there is none.

    Args:
        method: HTTP method.
        path: Route, without the query.
        query: Text after the question mark.
        body: The whole body.

    Raises:
        RefusedError: If trainers do not send such requests.
    """
    if path not in ROUTES:
        raise RefusedError(f"got the route {shown(path)}, which this server does not have", 404)
    allowed, check_body, queries = ROUTES[path]
    if method != allowed:
        raise RefusedError(f"{path}: got {shown(method)}, expected {allowed}", 405)
    if query and query not in queries:
        raise RefusedError(f"{path}: got the query {shown(query)}, expected none")
    if check_body is None:
        if body:
            raise RefusedError(f"{path}: got a body of {len(body)} bytes, expected none")
        return None
    told = _decoded(body) if body else {}
    check_body("", told)
    return told


def _decoded(body: bytes) -> Any:
    """Decode strict JSON: UTF-8, no key twice, no NaN, no number that becomes infinite."""
    try:
        return strict_json.loads(
            body.decode("utf-8"), parse_constant=_constant, parse_float=_finite
        )
    except RefusedError:
        raise
    except RecursionError as error:
        raise RefusedError("body: it is nested too deeply") from error
    except ValueError as error:  # invalid JSON or UTF-8, or a number with too many digits
        raise RefusedError(f"body: expected JSON, {' '.join(str(error).split())[:150]}") from error


def _constant(word: str) -> float:
    raise RefusedError(f"body: got {word}, expected JSON, which has no such number")


def _finite(word: str) -> float:
    number = float(word)
    if math.isinf(number):
        raise RefusedError(f"body: got {shown(word)}, a number above what a float holds")
    return number


# Checks of values -------------------------------------------------------------------------------


def fields(*, needs: tuple[str, ...] = (), **known: Check) -> Check:
    """Return a check of an object: no field but the known ones, and all that it needs.

    A field that is null counts as left out.
    """

    def check(name: str, value: Any) -> None:
        if not isinstance(value, Mapping):
            raise RefusedError(f"{name or 'body'}: got {shown(value)}, expected an object")
        prefix = f"{name}." if name else ""
        for key, inner in value.items():
            if key not in known:
                raise RefusedError(f"got the field {prefix}{shown(key)}, which is not known here")
            if inner is not None:
                known[key](prefix + key, inner)
        for key in needs:
            if value.get(key) is None:
                raise RefusedError(f"{prefix}{key}: got none, expected one")

    return check


def whole(low: int = -(2**63), high: int = 2**63 - 1) -> Check:
    """Return a check of a whole number between `low` and `high`."""

    def check(name: str, value: Any) -> None:
        if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
            raise RefusedError(
                f"{name}: got {shown(value)}, expected a whole number from {low} to {high}"
            )

    return check


def number(low: float, high: float) -> Check:
    """Return a check of a number between `low` and `high`."""

    def check(name: str, value: Any) -> None:
        is_number = isinstance(value, int | float) and not isinstance(value, bool)
        if not is_number or not low <= value <= high:
            raise RefusedError(
                f"{name}: got {shown(value)}, expected a number from {low} to {high}"
            )

    return check


def one_of(*values: Any) -> Check:
    """Return a check of a value that must be one of few."""

    def check(name: str, value: Any) -> None:
        if not any(value == one and type(value) is type(one) for one in values):
            words = " or ".join(json.dumps(one) for one in values)
            raise RefusedError(f"{name}: got {shown(value)}, expected {words}")

    return check


def flag(name: str, value: Any) -> None:
    """Check for true or false."""
    one_of(True, False)(name, value)


def text(name: str, value: Any) -> None:
    """Check for a text of some characters."""
    if not isinstance(value, str) or not 1 <= len(value) <= 4096 or not value.isprintable():
        raise RefusedError(
            f"{name}: got {shown(value)}, expected a text of at most 4096 characters"
        )


def items(of: Check, count: int | None = None) -> Check:
    """Return a check of a list, of `count` values if it is given."""

    def check(name: str, value: Any) -> None:
        if not isinstance(value, list) or count not in (None, len(value)):
            expected = "a list" if count is None else f"a list of {count}"
            raise RefusedError(f"{name}: got {shown(value)}, expected {expected}")
        for inner in value:
            of(name, inner)

    return check


def token_ids(least: int = 0) -> Check:
    """Return a check of a list of token ids."""

    def check(name: str, value: Any) -> None:
        if not isinstance(value, list) or len(value) < least:
            raise RefusedError(f"{name}: got {shown(value)}, expected a list of token ids")
        most = 2**31 if LIMITS.vocabulary is None else LIMITS.vocabulary
        for found in value:  # no function calls: a trainer's requests hold thousands
            if type(found) is not int or not 0 <= found < most:
                raise RefusedError(f"{name}: got token id {shown(found)}, expected 0 to {most - 1}")

    return check


def anything(name: str, value: Any) -> None:
    """Leave the check to vLLM."""


COUNT = whole(0, 2**31 - 1)
SAMPLING = fields(
    n=whole(1, 2**31 - 1),
    temperature=number(0, 2),
    top_p=number(0, 1),
    top_k=whole(-1, 2**31 - 1),
    min_p=number(0, 1),
    presence_penalty=number(-2, 2),
    frequency_penalty=number(-2, 2),
    repetition_penalty=number(0, 100),
    seed=whole(),
    max_tokens=whole(1, 2**31 - 1),
    min_tokens=COUNT,
    stop_token_ids=token_ids(),
    ignore_eos=flag,
    logprobs=whole(-1, 2**31 - 1),
    prompt_logprobs=whole(-1, 2**31 - 1),
    prompt_logprob_token_ids=items(anything),  # matrices may be large, and vLLM checks them
    prompt_logprob_start=COUNT,
    allowed_token_ids=token_ids(1),
    detokenize=one_of(False),  # there is no tokenizer
)
GENERATE = fields(
    needs=("token_ids", "sampling_params"),
    model=text,
    request_id=text,
    token_ids=token_ids(1),
    sampling_params=SAMPLING,
)


def _call(name: str, value: Any) -> None:
    """Check a call of a method of the workers."""
    method = value.get("method") if isinstance(value, Mapping) else None
    args = CALLS.get(method, anything) if isinstance(method, str) else anything
    needs = ("method",) if args is _none else ("method", "args")
    fields(needs=needs, method=one_of(*CALLS), args=args)(name, value)


def _none(name: str, value: Any) -> None:
    if value != []:
        raise RefusedError(f"{name}: got {shown(value)}, expected none")


# Methods of `PushWorker`, with their arguments.
CALLS: dict[str, Check] = {
    "load_pushed": items(text, 1),
    "pushed_sums": items(items(text), 1),
    "transfer_state": _none,
    "leave_transfer": _none,
}
JOIN = fields(
    needs=(
        "master_address",
        "master_port",
        "rank_offset",
        "world_size",
        "transport",
        "group",
        "timeout",
    ),
    master_address=text,
    master_port=whole(1, 65535),
    rank_offset=whole(1, 2**20),
    world_size=whole(2, 2**20),
    transport=one_of("gloo", "nccl"),
    group=text,
    timeout=number(0.001, 86400),
    packed=flag,
    packed_buffer_size_bytes=whole(1, 2**40),
    packed_num_buffers=whole(1, 2**10),
    nccl_unique_id_b64=text,
)

# By path: the method, the check of the body (None: there is none), and the queries.
ROUTES: dict[str, tuple[str, Check | None, tuple[str, ...]]] = {
    **dict.fromkeys(
        (
            "/health", "/ping", "/version", "/metrics", "/metrics/", "/load", "/v1/models",
            "/weight_info", "/get_world_size", "/is_sleeping", "/is_paused",
        ),
        ("GET", None, ()),
    ),
    "/inference/v1/generate": ("POST", GENERATE, ()),
    "/collective_rpc": ("POST", _call, ()),
    "/update_weight_version": ("POST", fields(needs=("new_version",), new_version=text), ()),
    "/reset_prefix_cache": ("POST", fields(), ()),
    "/sleep": ("POST", fields(), ("level=1", "level=2")),
    "/wake_up": ("POST", fields(), ()),
    "/init_weight_transfer_engine": ("POST", fields(needs=("init_info",), init_info=JOIN), ()),
    "/start_weight_update": ("POST", fields(), ()),
    "/update_weights": ("POST", fields(needs=("update_info",), update_info=anything), ()),
    "/finish_weight_update": ("POST", fields(), ()),
}  # fmt: skip
