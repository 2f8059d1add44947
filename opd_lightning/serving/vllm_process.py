"""Workarounds for vLLM in the same process: environment, process groups, CPU head.

They hold for vLLM 0.32 and 0.33. Each function documents what would happen without it.
"""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist

from opd_lightning.terminal.imports import without_collections

# Chunked prefill crashes vLLM's CPU engine if the request has a seed: "CPU Generator does not use
# offset".
CPU_ARGUMENTS = {"enable_chunked_prefill": False}


def vllm_unavailable() -> str | None:
    """Return None if vLLM can be used here, else the reason in one line.

    Imports vLLM if it is installed (8 s, once): only the import reveals a broken installation.
    """
    if importlib.util.find_spec("vllm") is None:
        return "vLLM is not installed"
    _set_environment()
    try:
        with without_collections():
            import vllm.entrypoints.llm  # noqa: F401
            from vllm.platforms import current_platform
    except (ImportError, OSError, RuntimeError) as error:
        return f"vLLM is installed but does not import: {' '.join(str(error).split())[:200]}"
    if not current_platform.device_type:
        return "the installed vLLM was built for hardware that this machine lacks"
    return None


def _set_environment() -> None:
    """Set defaults that vLLM reads at import; variables set by the user win."""
    # In-process, so that weights can be pushed from an iterator and no process is forked.
    os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
    if not torch.cuda.is_available():
        # Otherwise vLLM pins this process's threads to cores that it chooses.
        os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", "nobind")


@contextmanager
def launcher_variables() -> Iterator[None]:
    """Set RANK and LOCAL_RANK, from which vLLM's external launcher takes its GPU, temporarily.

    SLURM has other names for them, and Lightning's LOCAL_RANK, which it reads as "processes were
    launched", is not the GPU with `trainer.devices: [2, 3]`.
    """
    device = torch.cuda.current_device() if torch.cuda.is_available() else 0
    rank = dist.get_rank() if dist.is_initialized() else 0
    wanted = {"RANK": str(rank), "LOCAL_RANK": str(device)}
    before = {name: os.environ.get(name) for name in wanted}
    os.environ.update(wanted)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


def destroy_vllm_groups() -> None:
    """Destroy vLLM's process groups as its clean-up does, except the default group.

    They must be destroyed first: destroying the default group while they exist raises. With tensor
    parallelism only its worker processes have them.
    """
    from vllm.distributed import parallel_state

    parallel_state.destroy_model_parallel()
    if parallel_state._WORLD is not None:
        parallel_state._WORLD.destroy()
        parallel_state._WORLD = None


def repack(model: Any) -> None:
    """Rebuild the packed copies of weights that vLLM's CPU build multiplies by.

    After a reload, the copy of a head tied to the embedding still holds the old weight, and experts
    hold the new weights in the order of the folder instead of the packed one.
    """
    from vllm.model_executor.layers.fused_moe.routed_experts import RoutedExperts
    from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead

    for module in model.modules():
        if isinstance(module, ParallelLMHead):
            module.quant_method.process_weights_after_loading(module)
        elif isinstance(module, RoutedExperts):
            module.quant_method.moe_kernel.fused_experts.process_weights_after_loading(module)


def undo_reload(model: Any) -> None:
    """Repair a model whose reload was aborted: restore the layers that were not reloaded yet.

    Without this they have no memory, and the next reload adds to the weights of this one.
    """
    from vllm.model_executor.model_loader.reload import layerwise

    for layer in model.modules():
        info = layerwise.get_layerwise_info(layer)
        if info.can_load():
            layerwise._place_kernel_tensors(layer, info)
            info.reset()
