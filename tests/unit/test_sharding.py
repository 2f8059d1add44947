"""Accepted strategies, and the number of processes that share the weights."""

from __future__ import annotations

from typing import Any, cast

import pytest
import torch
from lightning.pytorch.strategies import DDPStrategy, FSDPStrategy, ModelParallelStrategy
from torch.distributed.device_mesh import DeviceMesh

from opd_lightning.errors import UserError
from opd_lightning.models.sharding import HSDPStrategy, Sharding, check_strategy, processes_per_copy


@pytest.mark.parametrize(
    ("strategy", "message"),
    [
        (FSDPStrategy(), "got FSDPStrategy, expected ddp, or ModelParallelStrategy"),
        (ModelParallelStrategy(), "got data_parallel_size 2 and tensor_parallel_size 4"),
        (ModelParallelStrategy(4, 1), "got data_parallel_size 4 and tensor_parallel_size 1"),
        (HSDPStrategy(3), "shard_size: got 3 for 4 devices on 2 nodes"),
        (HSDPStrategy(16), "shard_size: got 16 for 4 devices on 2 nodes"),
        (HSDPStrategy(0), "shard_size: got 0 for 4 devices on 2 nodes"),
    ],
    ids=["fsdp1", "auto", "count", "no divisor", "too many", "none"],
)
def test_strategies_that_are_refused(strategy: Any, message: str) -> None:
    with pytest.raises(UserError, match=message):
        check_strategy(strategy, devices=4, nodes=2)


@pytest.mark.parametrize(
    ("strategy", "expected"),
    [
        (DDPStrategy(), 1),
        (ModelParallelStrategy(8, 1), 8),
        (HSDPStrategy(), 4),
        (HSDPStrategy(2), 2),
        (HSDPStrategy(8), 8),
    ],
)
def test_who_holds_a_copy_together(strategy: Any, expected: int) -> None:
    strategy.parallel_devices = [torch.device("cpu")] * 4
    strategy.num_nodes = 2
    check_strategy(strategy, devices=4, nodes=2)
    assert processes_per_copy(strategy) == expected


def test_a_model_without_named_layers_is_refused() -> None:
    sharding = Sharding(mesh=cast(DeviceMesh, None), device=torch.device("cpu"))
    with pytest.raises(UserError, match="does not name its layers"):
        sharding.shard(torch.nn.Linear(2, 2))
