"""A stand-in for a server with several workers: real HTTP, real gloo, no vLLM."""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Self

import torch
from torch import Tensor

from opd_lightning.serving.gloo_group import GlooGroup
from tests.http_server import Server


class StandIn:
    """Stand-in that answers the requests of a push; each worker keeps the received tensors.

    Args:
        model: Name of the served model.
        workers: Number of workers, as with tensor parallelism.
        gpus: GPU reported by each worker.
    """

    def __init__(self, model: str, *, workers: int, gpus: Sequence[str | None] = ()) -> None:
        self.model = model
        self.gpus = gpus or [None] * workers
        self.ranks: list[int] = []
        self.received: list[dict[str, Tensor]] = [{} for _ in range(workers)]
        self.sizes: list[int] = []  # bytes of every chunk
        self.groups: set[str] = set()
        self.fails_at: int | None = None
        self._members: list[GlooGroup] = []
        self._group: str | None = None
        self._label = "default"
        self._pool = ThreadPoolExecutor(workers)
        self._http = Server(self._answer)
        self.url = self._http.url

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._http.stop()
        self._pool.shutdown()

    @property
    def keys(self) -> set[str]:
        """Keys of the requests."""
        return {asked["key"] for asked in self._http.asked}

    def _answer(self, asked: dict[str, Any]) -> tuple[int, Any]:
        try:
            return 200, self._do(asked)
        except Exception as error:
            self._leave()
            return 500, {"error": str(error)}

    def _do(self, asked: dict[str, Any]) -> Any:
        match asked["path"]:
            case "/v1/models":
                return {"data": [{"id": self.model, "max_model_len": 64}]}
            case "/version":
                import vllm

                return {"version": vllm.__version__}
            case "/get_world_size":
                return {"world_size": len(self.received)}
            case "/weight_info":
                return {"weight_version": self._label}
            case "/update_weight_version":
                self._label = asked["new_version"]
            case "/collective_rpc" if asked["method"] == "transfer_state":
                return {"results": [[self._group, gpu] for gpu in self.gpus]}
            case "/collective_rpc":
                self._leave()
            case "/init_weight_transfer_engine":
                self._join(asked["init_info"])
            case "/update_weights":
                if asked["update_info"].get("names"):  # vLLM 0.33 omits repeated values
                    self._info = asked["update_info"]
                info = self._info
                list(self._pool.map(lambda i: self._receive(i, info), range(len(self.received))))
            case "/reset_prefix_cache":
                return {"success": True}
        return {}

    def _join(self, init_info: dict[str, Any]) -> None:
        self.ranks = [init_info["rank_offset"] + i for i in range(len(self.received))]
        self._most = init_info["packed_buffer_size_bytes"]
        place = (init_info["master_address"], init_info["master_port"])
        options = {"world_size": init_info["world_size"], "timeout": init_info["timeout"]}
        self._members = list(
            self._pool.map(lambda rank: GlooGroup.join(*place, rank=rank, **options), self.ranks)
        )
        self._group = init_info["group"]
        self.groups.add(self._group)

    def _leave(self) -> None:
        self._group = None
        while self._members:
            self._members.pop().destroy()

    def _receive(self, worker: int, info: dict[str, Any]) -> None:
        from opd_lightning.serving.transfer_receiver import chunks

        dtypes = [getattr(torch, name) for name in info["dtype_names"]]
        described = list(zip(info["names"], info["shapes"], dtypes, strict=True))
        for count, chunk in enumerate(chunks(described, self._most)):
            if count == self.fails_at:
                raise RuntimeError("no more")
            sizes = [torch.Size(shape).numel() * dtype.itemsize for _, shape, dtype in chunk]
            packed = torch.empty(sum(sizes), dtype=torch.uint8)
            self._members[worker].broadcast(packed)
            self.sizes.append(packed.numel())
            parts = zip(chunk, packed.split(sizes), strict=True)
            for (name, shape, dtype), part in parts:
                self.received[worker][name] = part.view(dtype).view(shape)
