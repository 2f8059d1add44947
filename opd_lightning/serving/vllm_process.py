"""Living with vLLM in one process: its environment, its process groups, its CPU head.

Facts of vLLM 0.32; each function says what would happen without it.
"""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from opd_lightning.models.weight_sums import EngineSum, engine_sums

# A prompt that is computed in pieces ends vLLM's CPU engine if its request has a seed: "CPU
# Generator does not use offset".
CPU_ARGUMENTS = {"enable_chunked_prefill": False}


def vllm_unavailable() -> str | None:
    """None if vLLM can be used here, else the reason in one line.

    Where vLLM is installed this imports it (8 s, once): nothing less tells a broken install.
    """
    if importlib.util.find_spec("vllm") is None:
        return "vLLM is not installed"
    _set_environment()
    try:
        import vllm.entrypoints.llm  # noqa: F401
        from vllm.platforms import current_platform
    except (ImportError, OSError, RuntimeError) as error:
        return f"vLLM is installed but does not import: {' '.join(str(error).split())[:200]}"
    if not current_platform.device_type:
        return "the installed vLLM was built for hardware that this machine lacks"
    return None


def _set_environment() -> None:
    """Defaults that vLLM reads when it is imported; what the user has set wins."""
    # In-process, so that weights can be pushed from an iterator and nothing is forked.
    os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
    if not torch.cuda.is_available():
        # vLLM would pin this process's threads to cores of its own choice.
        os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", "nobind")


@contextmanager
def launcher_variables() -> Iterator[None]:
    """RANK and LOCAL_RANK, by which vLLM's external launcher finds its GPU, for a while.

    SLURM has other names for them, and Lightning reads LOCAL_RANK as "processes were launched".
    """
    device = torch.cuda.current_device() if torch.cuda.is_available() else 0
    rank = dist.get_rank() if dist.is_initialized() else 0
    wanted = {"RANK": str(rank), "LOCAL_RANK": str(device)}
    added = {name: value for name, value in wanted.items() if name not in os.environ}
    os.environ.update(added)
    try:
        yield
    finally:
        for name in added:
            del os.environ[name]


def destroy_vllm_groups() -> None:
    """What vLLM's clean-up does to its process groups, less the default one.

    They must go first: destroying the default group beside them raises.
    """
    from vllm.distributed import parallel_state

    parallel_state.destroy_model_parallel()
    parallel_state.get_world_group().destroy()
    parallel_state._WORLD = None


def sums_in_vllm(model: Any) -> list[EngineSum]:
    """Runs in vLLM's worker, which fuses what Hugging Face has apart."""
    return engine_sums(_weights(model), getattr(model, "packed_modules_mapping", {}))


@torch.no_grad()
def _weights(model: Any) -> Iterator[tuple[str, Tensor]]:
    """Parameters by vLLM's names.

    On the CPU a linear layer keeps nothing but oneDNN's packed copy of its weight; multiplied with
    the identity it gives the weight back, exactly.
    """
    for prefix, module in model.named_modules():
        for name, weight in module.named_parameters(recurse=False):
            if name == "weight" and weight.numel() == 0 and hasattr(module, "cpu_linear"):
                identity = torch.eye(module.input_size_per_partition, dtype=weight.dtype)
                weight = module.cpu_linear(identity, weight, None)
            yield f"{prefix}.{name}", weight


def repack_heads(model: Any) -> None:
    """Rebuild what vLLM 0.32's CPU head really multiplies by: a packed copy of its weight.

    After a reload the copy of a head that is tied to the embedding still holds the old weight.
    """
    from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead

    for module in model.modules():
        if isinstance(module, ParallelLMHead):
            module.quant_method.process_weights_after_loading(module)


def undo_reload(model: Any) -> None:
    """Make a model whole whose reload was broken off: layers that it had not reached are as before.

    Without this they have no memory, and the next reload adds to what this one had loaded.
    """
    from vllm.model_executor.model_loader.reload import layerwise

    for layer in model.modules():
        info = layerwise.get_layerwise_info(layer)
        if info.can_load():
            layerwise._place_kernel_tensors(layer, info)
            info.reset()
