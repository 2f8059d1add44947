"""Fastest plans that fit into memory, and their configurations."""

from __future__ import annotations

from functools import cache

from benchmarks.scaling.models import TEACHERS
from benchmarks.scaling.run import Run
from benchmarks.scaling.speeds import LONGEST, MOST, PER_NODE, ROLLOUTS, gpus_of_engine


@cache
def choose(name: str, gpus: int) -> Run | None:
    """Return the fastest plan that fits; LoRA and a remote teacher only if nothing else does."""
    for remote, lora in ((False, False), (False, True), (True, False), (True, True)):
        ways = [
            Run(name, trainers, shards, lora, rows=rows, remote=remote, servers=gpus - trainers)
            for trainers in dict.fromkeys((gpus, gpus * 3 // 4, gpus // 2))
            for shards in dict.fromkeys((1, 8, 16, trainers))
            for rows in (4, 2, 1)
            if trainers and trainers % shards == 0 and ROLLOUTS % (trainers * rows) == 0
            if (gpus - trainers) % gpus_of_engine(name) == 0
        ]
        if fitting := [run for run in ways if run.fits()]:
            return min(fitting, key=Run.step_seconds)  # of equal ones, the largest micro-batch
    return None


def configuration(name: str, gpus: int) -> str:
    """Return the YAML of the plan for `gpus` GPUs, to add to the config of a method."""
    run = choose(name, gpus)
    assert run is not None
    lines = [f"# {name} on {gpus} GPUs", "model:", "  init_args:", "    student:"]
    lines += [f"      path: Qwen/Qwen3-{name}", "      gradient_checkpointing: true"]
    if run.lora:
        lines += ["      dtype: bfloat16", "      lora: {r: 32, target_modules: all-linear}"]
    lines += ["    teacher:", "      class_path: opd_lightning.teachers.FrozenTeacher"]
    lines += [f"      init_args: {{path: Qwen/Qwen3-{TEACHERS[name]}, dtype: bfloat16}}"]
    lines += ["data:", *_engine(run)]
    lines += [f"  prompts_per_step: {ROLLOUTS}", f"  sampling: {{max_new_tokens: {MOST}}}"]
    lines += [f"  max_tokens_per_micro_batch: {run.rows * LONGEST}"]
    nodes = max(1, run.trainers // PER_NODE)
    lines += ["trainer:", "  precision: bf16-mixed", f"  devices: {run.trainers // nodes}"]
    lines += [f"  num_nodes: {nodes}"]
    return "```yaml\n" + "\n".join([*lines, *_strategy(run)]) + "\n```"


def _engine(run: Run) -> list[str]:
    if run.servers:
        many = run.servers // gpus_of_engine(run.student)
        return [
            "  engine:",
            "    class_path: opd_lightning.rollouts.VLLMServerEngine",
            "    init_args:",
            "      dtype: bfloat16",
            "      key_file: servers/key",
            "      push_folder: servers/push",
            f"      servers: # {many} of them",
            "        - servers/rollouts-0.address",
            "  max_staleness: 1",
        ]
    return [
        "  engine:",
        "    class_path: opd_lightning.rollouts.VLLMEngine",
        "    init_args:",
        "      dtype: bfloat16",
        "      sleep_while_training: true",
        f"      gpu_memory_utilization: {run.engine_share}",
    ]


def _strategy(run: Run) -> list[str]:
    if run.trainers == 1:
        return []
    if run.shards == 1:
        return ["  strategy: ddp"]
    name, arguments = "opd_lightning.models.sharding.HSDPStrategy", f"shard_size: {run.shards}"
    if run.shards == run.trainers:
        name = "lightning.pytorch.strategies.ModelParallelStrategy"
        arguments = f"data_parallel_size: {run.trainers}, tensor_parallel_size: 1"
    return ["  strategy:", f"    class_path: {name}", f"    init_args: {{{arguments}}}"]
