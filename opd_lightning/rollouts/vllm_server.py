"""vLLM servers as an engine: `opd serve` runs them, on this machine or others."""

from __future__ import annotations

import secrets
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from opd_lightning.causal_lm import Dtype
from opd_lightning.errors import EngineMismatchError, UserError
from opd_lightning.model_source import ModelSource
from opd_lightning.rollouts.base import Engine, Request, Sampling
from opd_lightning.rollouts.checks import check_lengths, checked_weights, parameter_shapes
from opd_lightning.rollouts.push_folder import PushFolder
from opd_lightning.rollouts.weight_sums import EngineSum, WeightSum
from opd_lightning.serving.client import Servers
from opd_lightning.serving.served_model import ServedModel
from opd_lightning.types import Completion, StopReason

FIRST_WEIGHTS = "default"  # what vLLM calls the weights that a server starts with
NO_WEIGHTS = "asleep"


class VLLMServerEngine(Engine):
    """Samples with vLLM servers that share the work; every rank asks the same ones.

    A push writes the weights to a folder once, and every server loads them from there. Each
    response says which weights wrote it, and others than those pushed last end the run.

    Args:
        servers: Addresses, such as http://127.0.0.1:8000, or files written by `opd serve
            --address_file`, which are waited for. Pushes need servers of `--weights pushed` that
            no other run uses.
        key_file: File with the servers' key; None takes the environment variable OPD_SERVER_KEY.
        push_folder: Where pushed weights go: the same path here and on every server's machine, and
            this run's own. None for an engine that is never pushed to, such as a demonstrator's.
        dtype: Precision of what is written there. Give the servers' own, for less would lose and
            more would only be thrown away.
        patience: Seconds that servers, or their address files, are waited for.
        timeout: Seconds that one request may take.
    """

    def __init__(
        self,
        servers: list[str],
        *,
        key_file: str | None = None,
        push_folder: str | None = None,
        dtype: Dtype = "float32",
        patience: float = 600.0,
        timeout: float = 600.0,
    ) -> None:
        self.servers = Servers(servers, key_file=key_file, patience=patience, timeout=timeout)
        self.push_folder = push_folder
        self.dtype: Dtype = dtype
        self.weights_dtype = getattr(torch, dtype)
        self.version = -1
        self._label = FIRST_WEIGHTS
        self._folder = PushFolder(Path(push_folder), self.weights_dtype) if push_folder else None

    def check(self, source: ModelSource, *, max_length: int) -> None:
        """The servers have the model, take `max_length` tokens and, if need be, pushes."""
        served = ServedModel(source.path, self.servers, role="engine.servers")
        if served.room < max_length:
            raise UserError(
                f"engine.servers: got room for {served.room} tokens, expected at least "
                f"{max_length}; start them with --max_length {max_length}"
            )
        self._model = served.name
        versions = {answer["version"] for answer in self.servers.read("/version")}
        if len(versions) > 1:
            raise UserError(f"engine.servers: got vLLM {sorted(versions)}, expected one version")
        if self._folder is not None:
            self._read_labels()

    def start(self, source: ModelSource, *, max_length: int) -> None:
        """Find the servers, and check them again: they may have changed."""
        self.check(source, max_length=max_length)
        self._eos_ids = list(source.eos_ids)
        self._max_length = max_length
        if self._folder is not None:
            self._shapes = parameter_shapes(source)
            _once(self._folder.clear)

    def load_weights(self, version: int, weights: Iterable[tuple[str, Tensor]]) -> None:
        """Replace all weights of all servers. Every rank must come; the first writes and tells.

        A name or shape that does not fit is a `UserError`; the servers then keep what they had.
        """
        if (folder := self._folder) is None:
            raise UserError("engine.push_folder: got null, expected a folder to push weights by")
        stream = checked_weights(weights, self._shapes)
        self._label = _once(lambda: self._push(folder, version, stream), lambda: _drain(stream))
        self.version = version

    def generate(self, requests: Sequence[Request], sampling: Sampling) -> list[Completion]:
        """One completion per request, in the order of the requests."""
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
                    "ignore_eos": True,  # the line above is the whole list
                    "logprobs": 0,  # the sampled token's alone
                    "detokenize": False,
                },
            }
            for request in requests
        ]
        futures = self.servers.spread("/inference/v1/generate", bodies)
        try:
            return [self._to_completion(future.result()["choices"][0]) for future in futures]
        finally:
            for future in futures:
                future.cancel()  # the others, if one has failed

    def weight_sums(self) -> list[EngineSum]:
        """Of all servers, those apart whose GPUs share the weights."""
        answers = self.servers.everywhere("/collective_rpc", {"method": "pushed_sums"})
        return [
            EngineSum(tuple(names), dtype, WeightSum(*value))
            for answer in answers
            if len(answer["results"]) == 1
            for names, dtype, value in answer["results"][0]
        ]

    def sleep(self) -> None:
        """Free the servers' weights and KV caches until `wake`. Does nothing on the CPU."""
        self._label = _once(self._put_to_sleep)
        self.version = -1

    def wake(self) -> None:
        """Take the memory back; the weights are rubbish until they are pushed again."""
        _once(lambda: self.servers.everywhere("/wake_up"))

    def close(self) -> None:
        """Hang up and delete what was pushed; the servers go on."""
        self.servers.close()
        if self._folder is not None and _is_first():  # no waiting: a rank may have died
            self._folder.clear()
        self._label = FIRST_WEIGHTS
        self.version = -1

    def _push(self, folder: PushFolder, version: int, weights: Iterable[tuple[str, Tensor]]) -> str:
        """The label of what every server has now."""
        # Another run, or this one before it was resumed, had the same step with other weights.
        label = f"{version}-{secrets.token_hex(4)}"
        try:
            written = folder.write(label, weights)
        finally:
            _drain(weights)
        # First, so that a server that fails to load passes neither for the old nor the new.
        self.servers.everywhere("/update_weight_version", {"new_version": label})
        self.servers.everywhere(
            "/collective_rpc", {"method": "load_pushed", "args": [str(written)]}
        )
        for answer in self.servers.everywhere("/reset_prefix_cache"):
            if not answer["success"]:
                raise EngineMismatchError(
                    "a server kept its prefix cache from before the push, since others were asking "
                    "it; give each run servers of its own"
                )
        for found in self._read_labels():
            _check_label(found, label)
        return label

    def _read_labels(self) -> list[str]:
        try:
            return [answer["weight_version"] for answer in self.servers.read("/weight_info")]
        except UserError as error:
            raise UserError(f"{error}; does the server take pushes (--weights pushed)?") from error

    def _put_to_sleep(self) -> str:
        self.servers.everywhere("/update_weight_version", {"new_version": NO_WEIGHTS})
        self.servers.everywhere("/sleep?level=2")
        return FIRST_WEIGHTS  # which no server has until it is pushed to

    def _to_completion(self, choice: dict[str, Any]) -> Completion:
        for span in choice["weight_versions"]:
            _check_label(span["version"], self._label)
        stop_reason = StopReason.EOS if choice["finish_reason"] == "stop" else StopReason.LENGTH
        logprobs = [token["logprob"] for token in choice["logprobs"]["content"]]
        return Completion(choice["token_ids"], logprobs, stop_reason)


def _check_label(found: str, expected: str) -> None:
    if found != expected:
        raise EngineMismatchError(
            f"a server has weights {found!r}, expected {expected!r}: it was started again, or "
            "another run pushes to it; give each run servers of its own, then resume it"
        )


def _drain(weights: Iterable[tuple[str, Tensor]]) -> None:
    """Gathering the weights takes all ranks, to the end."""
    for _ in weights:
        pass


def _is_first() -> bool:
    return not dist.is_initialized() or dist.get_rank() == 0


def _once(first: Callable[[], Any], others: Callable[[], Any] = lambda: None) -> Any:
    """The first rank does `first`, the others `others`; all get its result, or raise its error."""
    if not dist.is_initialized():
        return first()
    dist.barrier()  # nobody is asking the servers for anything any more
    try:
        outcome = [first() if _is_first() else others()]
    except Exception as error:
        outcome = [error]
    own = outcome[0]
    dist.broadcast_object_list(outcome, src=0)
    for result in (outcome[0], own):
        if isinstance(result, Exception):
            raise result
    return outcome[0]
