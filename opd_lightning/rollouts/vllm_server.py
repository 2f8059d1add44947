"""Engine of vLLM servers, which `opd serve` runs on this machine or others."""

from __future__ import annotations

import logging
import os
import secrets
from collections.abc import Iterable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from opd_lightning.errors import EngineMismatchError, PushLostError, UserError
from opd_lightning.models.causal_lm import Dtype
from opd_lightning.models.folder_format import FolderFormat
from opd_lightning.models.source import ModelSource
from opd_lightning.models.weight_sums import EngineSum, WeightSum
from opd_lightning.processes import drain, is_first, run_on_first
from opd_lightning.rollouts.base import Engine, Request, Sampling
from opd_lightning.rollouts.checks import check_lengths, checked_weights
from opd_lightning.rollouts.push import Push
from opd_lightning.rollouts.push_folder import PushFolder
from opd_lightning.rollouts.push_transfer import PushTransfer
from opd_lightning.serving.addresses import is_every_interface
from opd_lightning.serving.answers import field, number, of_kind, shown
from opd_lightning.serving.architectures import check_architecture
from opd_lightning.serving.client import Servers
from opd_lightning.serving.generation import PATH, Response, read_response
from opd_lightning.serving.served_model import ServedModel
from opd_lightning.terminal.progress import Progress
from opd_lightning.types import Completion

log = logging.getLogger(__name__)

FIRST_WEIGHTS = "default"  # vLLM's label of the weights that a server starts with
NO_WEIGHTS = "asleep"
PUSHES = 2  # attempts; the second if a server was lost during the first and came back


class VLLMServerEngine(Engine):
    """Engine that samples with vLLM servers; every rank sends requests to the same servers.

    Each response names the weights that generated it; any but the last pushed end the run.

    Args:
        servers: Addresses, such as http://127.0.0.1:8000, or address files written by `opd serve
            --address_file`, which are waited for. Pushes need servers of `--weights pushed` that
            no other run uses.
        key_file: File with the servers' key; None takes the environment variable OPD_SERVER_KEY.
        push: How weights are sent to the servers: through a folder from which every server loads
            them; or by vLLM's weight transfer, over NCCL between GPUs or over gloo (TCP) between
            any machines. The latter two are for trusted networks only.
        push_folder: For `push: folder`: the same path here and on every server's machine, used by
            no other run. None for an engine without pushes, such as a demonstrator's.
        push_host: For nccl and gloo: address of this machine at which servers reach the sender.
            None takes the local address of the route to them.
        dtype: Precision of the pushed weights. Should be the servers': a lower one loses precision,
            a higher one is wasted.
        patience: Seconds to wait for servers or their address files.
        timeout: Seconds that one request may take; over nccl and gloo, a push.
    """

    def __init__(
        self,
        servers: list[str],
        *,
        key_file: str | None = None,
        push: Literal["folder", "nccl", "gloo"] = "folder",
        push_folder: str | None = None,
        push_host: str | None = None,
        dtype: Dtype = "float32",
        patience: float = 600.0,
        timeout: float = 600.0,
    ) -> None:
        self.servers = Servers(servers, key_file=key_file, patience=patience, timeout=timeout)
        self.push = push
        self.push_folder = push_folder
        self.push_host = push_host
        self.dtype: Dtype = dtype
        self.weights_dtype = getattr(torch, dtype)
        self._label = FIRST_WEIGHTS
        self._push_method = self._make_push_method(timeout)

    def check(self, source: ModelSource, *, max_length: int) -> None:
        """Check that the servers have the model and support `max_length` tokens and pushes."""
        method = self._push_method
        # `opd serve` checks this for its device.
        check_architecture(source, on_gpu=True, pushed=method is not None)
        if method is not None:
            run_on_first(method.check_here)
        served = ServedModel(source.path, self.servers, role="engine.servers")
        if served.max_model_len < max_length:
            raise UserError(
                f"engine.servers: got a context of {served.max_model_len} tokens, "
                f"expected at least {max_length}; start them with --max_length {max_length}"
            )
        self._model = served.identity
        versions = set(self.servers.get_all("/version", partial(field, name="version", kind=str)))
        if len(versions) > 1:
            raise UserError(f"engine.servers: got vLLM {sorted(versions)}, expected one version")
        if method is not None:
            self._read_labels()
            run_on_first(lambda: method.check(self.servers))

    def start(self, source: ModelSource, *, max_length: int) -> None:
        """Connect to the servers and check them again: they may have changed."""
        self.check(source, max_length=max_length)
        self._eos_ids = list(source.eos_ids)
        self._vocabulary = int(source.config.get_text_config().vocab_size)
        self._max_length = max_length
        if (method := self._push_method) is not None:
            self._format = FolderFormat.of(source, self.weights_dtype)
            run_on_first(lambda: method.start(self.servers, self._format.tensors))

    def load_weights(self, version: int, weights: Iterable[tuple[str, Tensor]]) -> None:
        """Replace all weights of all servers. Every rank must call it; rank 0 pushes.

        `weights` is iterated again if a server was lost meanwhile and came back. A name or shape
        that does not fit raises `UserError`; the servers' responses are then refused, unless the
        push failed before a folder was complete.
        """
        if (method := self._push_method) is None:
            raise UserError("engine.push_folder: got null, expected a folder to push weights by")
        for attempt in range(1, PUSHES + 1):
            stream = self._format.convert(checked_weights(weights, self._format.shapes))
            try:
                self._label = run_on_first(
                    partial(self._push, method, version, stream), partial(drain, stream)
                )
                break
            except PushLostError as error:
                if attempt == PUSHES or isinstance(weights, Iterator):
                    raise
                log.warning("%s; pushing again", error)
        self.version = version

    def generate(self, requests: Sequence[Request], sampling: Sampling) -> list[Completion]:
        """Return one completion per request, in the order of the requests."""
        check_lengths(requests, sampling, self._max_length)
        bodies = [
            {
                "model": self._model,
                "token_ids": request.prompt_ids,
                "sampling_params": {
                    "temperature": sampling.temperature,
                    "top_p": sampling.top_p,
                    "top_k": sampling.top_k,
                    "max_tokens": sampling.max_new_tokens,
                    "seed": request.seed,
                    "stop_token_ids": self._eos_ids,
                    "ignore_eos": True,  # `stop_token_ids` is complete
                    "logprobs": 0,  # only the sampled token's
                    "detokenize": False,
                },
            }
            for request in requests
        ]
        with Progress("generate", len(bodies), "response", within=True) as bar:
            return self._ask(bodies, bar, sampling.max_new_tokens)

    def weight_sums(self) -> list[EngineSum]:
        """Return the sums of all servers' parameters, except servers with tensor parallelism."""
        body = {"method": "pushed_sums", "args": [list(self._format.tensors)]}
        answers = self.servers.post_all("/collective_rpc", body, _sums)
        return self._format.in_model(one for sums in answers for one in sums)

    def sleep(self) -> None:
        """Free the servers' weights and KV caches until `wake`. Does nothing on the CPU."""
        self._label = run_on_first(self._put_to_sleep)
        self.version = -1

    def wake(self) -> None:
        """Allocate the memory again; the weights are undefined until the next push."""
        run_on_first(lambda: self.servers.post_all("/wake_up"))

    def close(self) -> None:
        """Close the connections and delete pushed weights; the servers continue to run."""
        self.servers.close()
        if self._push_method is not None and is_first():  # no waiting for lost ranks
            self._push_method.close()
        self._label = FIRST_WEIGHTS
        self.version = -1

    def _make_push_method(self, timeout: float) -> Push | None:
        if self.push == "folder":
            if self.push_host is not None:
                raise UserError("engine.push_host: got one with push: folder; leave it out")
            folder = self.push_folder
            return PushFolder(Path(os.path.expanduser(folder))) if folder else None
        if self.push_folder is not None:
            raise UserError(f"engine.push_folder: got one with push: {self.push}; leave it out")
        if self.push_host is not None and is_every_interface(self.push_host):
            raise UserError(
                f"engine.push_host: got {self.push_host!r}, every interface of this machine; give "
                "the one address that the servers reach"
            )
        return PushTransfer(self.push, host=self.push_host, timeout=timeout)

    def _push(self, method: Push, version: int, weights: Iterable[tuple[str, Tensor]]) -> str:
        """Push the weights and return their label."""
        # Random: another run, or this one before it was resumed, may have had other weights at
        # the same step.
        label = f"{version}-{secrets.token_hex(4)}"
        try:
            method.send(label, weights)
        finally:
            drain(weights)
        success = partial(field, name="success", kind=bool)
        resets = self.servers.post_all("/reset_prefix_cache", read=success)
        for url, is_reset in zip(self.servers.urls, resets, strict=True):
            if not is_reset:
                raise EngineMismatchError(
                    f"the server {url} kept its prefix cache from before the push, since others "
                    "were asking it; give each run servers of its own"
                )
        for url, found in zip(self.servers.urls, self._read_labels(), strict=True):
            if found == FIRST_WEIGHTS:  # requests are repeated, but not the label of the push
                raise PushLostError(
                    f"the server {url} was started again during a push; see its log for the "
                    "cause, then resume the run"
                )
            _check_label(found, label)
        return label

    def _read_labels(self) -> list[str]:
        try:
            label = partial(field, name="weight_version", kind=str)
            return self.servers.get_all("/weight_info", label)
        except UserError as error:
            raise UserError(f"{error}; does the server take pushes (--weights pushed)?") from error

    def _put_to_sleep(self) -> str:
        self.servers.post_all("/update_weight_version", {"new_version": NO_WEIGHTS})
        self.servers.post_all("/sleep?level=2")
        return FIRST_WEIGHTS  # no server has this label before the next push

    def _ask(self, bodies: list[dict[str, Any]], bar: Progress, most: int) -> list[Completion]:
        def read(answer: Any) -> Response:
            bar.update()
            return read_response(
                answer, most=most, vocabulary=self._vocabulary, eos_ids=self._eos_ids
            )

        futures = self.servers.submit(PATH, bodies, [read] * len(bodies))
        try:
            return [self._of_these_weights(future.result()) for future in futures]
        finally:
            for future in futures:
                future.cancel()  # if one has failed, the others

    def _of_these_weights(self, response: Response) -> Completion:
        for label in response.labels:
            _check_label(label, self._label)
        return response.completion


def _sums(answer: Any) -> list[EngineSum]:
    """Return the sums of a server's parameters; none of a server with several workers."""
    results = field(answer, "results", list)
    if len(results) != 1:
        return []
    sums = []
    for one in of_kind(results[0], "results", list):
        names, dtype, value = _parts(one)
        named = tuple(of_kind(name, "results", str) for name in _parts(names, None))
        total, norm, elements = _parts(value)
        numbers = number(total, "results"), number(norm, "results")
        whole = of_kind(elements, "results", int)
        sums.append(EngineSum(named, of_kind(dtype, "results", str), WeightSum(*numbers, whole)))
    return sums


def _parts(value: Any, count: int | None = 3) -> list[Any]:
    parts = of_kind(value, "results", list)
    if count is not None and len(parts) != count:
        raise ValueError(f"results: got {shown(parts)}, expected a list of {count}")
    return parts


def _check_label(found: str, expected: str) -> None:
    if found != expected:
        raise EngineMismatchError(
            f"a server has weights {shown(found)}, expected {expected!r}: it was started again, or "
            "another run pushes to it; give each run servers of its own, then resume it"
        )
