"""Plans for 1, 8 and 64 GPUs: the tables of docs/scaling.md.

Memory and traffic are those that `opd check` predicts (`opd_lightning.preflight`), of models that
exist as shapes alone. Seconds are arithmetic on the assumptions below; none of them is measured.

Run: python benchmarks/scaling.py
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cache
from typing import Any, NamedTuple

import torch
from peft import LoraConfig, get_peft_model
from transformers import Qwen3Config, Qwen3ForCausalLM

from opd_lightning.preflight.activations import Widths
from opd_lightning.preflight.layout import Layout
from opd_lightning.preflight.memory import gathered_bytes, held_bytes, process_memory
from opd_lightning.preflight.plan import Plan, TeacherModel, nbytes
from opd_lightning.preflight.traffic import push_traffic, step_traffic

GB = 1e9
VOCABULARY = 151_936


class Shape(NamedTuple):
    """A published Qwen3, whose heads are 128 wide."""

    hidden: int
    layers: int
    heads: int
    key_heads: int
    intermediate: int
    tied: bool


SHAPES = {
    "1.7B": Shape(2048, 28, 16, 8, 6144, True),
    "4B": Shape(2560, 36, 32, 8, 9728, True),
    "32B": Shape(5120, 64, 64, 8, 25600, False),
}
TEACHERS = {"1.7B": "4B", "4B": "32B", "32B": "32B"}  # the last is its own start

# A GPU of the H100 kind: 80 GB, of which 5 are left to CUDA, NCCL and fragments.
ROOM = 75 * GB
PEAK = 989e12  # dense bfloat16, operations a second
TRAINING = 0.35  # of the peak that the student's passes reach
SCORING = 0.45  # of the peak that the teacher's passes and prefills reach
HBM = 0.6 * 3350 * GB  # bytes a second that decoding reads
NODE = 300 * GB  # bytes a second that a GPU sends to others of its node
NETWORK = 40 * GB  # and to other nodes: one port of 400 Gbit/s each
FOLDER = 2 * GB  # of a shared folder, for one reader or writer
CALL = 50e-6  # seconds of a collective whatever its size
PER_NODE = 8

# A step: rollouts, and tokens of prompts and responses, on average and at most.
ROLLOUTS, PROMPT, MEAN, MOST = 512, 512, 2048, 4096
ROWS = 2  # of a micro-batch
AT_ONCE = 256  # VLLMEngine.max_num_seqs
LORA = LoraConfig(r=32, target_modules="all-linear")


@cache
def config(name: str) -> Any:
    s = SHAPES[name]
    return Qwen3Config(
        vocab_size=VOCABULARY,
        hidden_size=s.hidden,
        intermediate_size=s.intermediate,
        num_hidden_layers=s.layers,
        num_attention_heads=s.heads,
        num_key_value_heads=s.key_heads,
        head_dim=128,
        tie_word_embeddings=s.tied,
    )


@cache
def model(name: str, *, lora: bool = False, half: bool = False) -> Any:
    with torch.device("meta"):
        plain = Qwen3ForCausalLM(config(name)).to(torch.bfloat16 if half or lora else torch.float32)
        return get_peft_model(plain, LORA) if lora else plain


@dataclass(frozen=True)
class Run:
    """A way to train a student on some GPUs."""

    student: str
    trainers: int  # GPUs that train
    shards: int  # 1: DDP; all trainers: FSDP2; else HSDP
    lora: bool = False
    checkpointing: bool = True
    rows: int = ROWS
    remote: bool = False  # whether the teacher is behind servers of its own
    servers: int = 0  # GPUs beside them that write

    @property
    def strategy(self) -> str:
        if self.trainers == 1:
            return "one device"
        return {1: "DDP", self.trainers: "FSDP2"}.get(self.shards, f"HSDP, groups of {self.shards}")

    @property
    def micro_batches(self) -> int:
        return max(1, ROLLOUTS // (self.trainers * self.rows))

    @cache  # noqa: B019
    def plan(self) -> Plan:
        student = model(self.student, lora=self.lora)
        teacher = TeacherModel(model(TEACHERS[self.student], half=True), sharded=True)
        return Plan(
            student=student,
            config=config(self.student),
            optimizer=torch.optim.AdamW([p for p in student.parameters() if p.requires_grad]),
            layout=Layout(
                world=self.trainers,
                shards=self.shards,
                per_node=min(self.trainers, PER_NODE),
                copies_gradients=self.shards == 1 and self.trainers > 1,
            ),
            precision="bf16-mixed",
            checkpointing=self.checkpointing,
            on_gpu=True,
            rows=self.rows,
            length=2 * PROMPT + MOST,
            response=MOST,
            micro_batches=self.micro_batches,
            teachers=[] if self.remote else [teacher],
            engine=0 if self.servers else self.engine_bytes,
            engine_sleeps=True,
        )

    @property
    def engine_bytes(self) -> int:
        """Weights in bfloat16, and the KV cache of 32 of the longest sequences."""
        cache = 32 * (2 * PROMPT + MOST) * cached_bytes(self.student)
        return nbytes(list(model(self.student, half=True).parameters())) + cache

    @property
    def bandwidth(self) -> float:
        """Of the slowest link that gathering and scattering pass."""
        across = self.trainers if self.shards == 1 else self.shards
        return NODE if across <= PER_NODE else NETWORK

    # Seconds ------------------------------------------------------------------------------

    def student_seconds(self) -> float:
        passes = 6 if self.lora else 8 if self.checkpointing else 6
        return passes / 2 * forward_operations(self.student) / (PEAK * TRAINING * self.trainers)

    def traffic_seconds(self) -> float:
        """Gathers and scatters within a copy of the weights, all-reduces over the network."""
        sent = step_traffic(self.plan())
        reduced = sent.pop("all_reduce")
        link = NODE if self.trainers <= PER_NODE else NETWORK
        return sum(sent.values()) / self.bandwidth + reduced / link

    def teacher_seconds(self) -> float:
        return 0.0 if self.remote else teacher_gpu_seconds(self.student) / self.trainers

    def step_seconds(self) -> float:
        """Servers write the next step's rollouts meanwhile; an engine in the process does not."""
        trains = max(self.student_seconds() + self.teacher_seconds(), self.traffic_seconds())
        writes = self.generate_seconds()
        return (max(writes, trains) if self.servers else writes + trains) + self.push_seconds()

    def fits(self) -> bool:
        return sum(process_memory(self.plan()).fullest().values()) <= ROOM

    def generate_seconds(self) -> float:
        if not self.servers:
            return decoding_seconds(self.student, ROLLOUTS / self.trainers, 1)
        gpus = gpus_of_engine(self.student)
        return decoding_seconds(self.student, ROLLOUTS / (self.servers // gpus), gpus)

    def push_seconds(self) -> float:
        return gather_seconds(self) + (
            push_folder_seconds(self) if self.servers else push_process_seconds(self)
        )


@cache
def forward_operations(name: str) -> float:
    """Of one forward pass over a step: two a weight and token, and attention's products."""
    widths = Widths.of(config(name))
    tokens = ROLLOUTS * (PROMPT + MEAN)
    matrices = sum(p.numel() for p in model(name).parameters() if p.dim() > 1)
    if not SHAPES[name].tied:
        matrices -= VOCABULARY * widths.hidden  # looked up, not multiplied by
    attention = 2 * widths.layers * widths.queries * (PROMPT + MEAN)  # half of 4: causal
    return tokens * (2 * matrices + attention)


@cache
def teacher_gpu_seconds(student: str) -> float:
    return forward_operations(TEACHERS[student]) / (PEAK * SCORING)


@cache
def cached_bytes(name: str) -> int:
    """KV cache of a token, in bfloat16."""
    return 2 * Widths.of(config(name)).cache


@cache
def gpus_of_engine(name: str) -> int:
    """That share one copy: weights in bfloat16 fill at most half of their memory."""
    return next(n for n in (1, 2, 4, 8) if weight_bytes(name) <= 0.5 * n * ROOM)


@cache
def weight_bytes(name: str) -> int:
    return nbytes(list(model(name, half=True).parameters()))


@cache
def decoding_seconds(name: str, rows: float, gpus: int) -> float:
    """A step's rollouts on one engine: prefill, full batches, then the longest response alone."""
    weights, operations = weight_bytes(name), weight_bytes(name)  # 2 bytes, and 2 a token
    room = max(1.0, (0.9 * gpus * ROOM - weights) / ((PROMPT + MEAN) * cached_bytes(name)))
    at_once = min(rows, AT_ONCE, room)

    def step(batch: float) -> float:
        read = weights + batch * (PROMPT + MEAN / 2) * cached_bytes(name)
        return read / (HBM * gpus) + batch * operations / (PEAK * SCORING * gpus)

    prefill = rows * PROMPT * operations / (PEAK * SCORING * gpus)
    return prefill + rows / at_once * MEAN * step(at_once) + (MOST - MEAN) * step(1)


def gather_seconds(run: Run) -> float:
    """One collective a tensor, in the master weights' dtype."""
    plan = run.plan()
    calls = len(list(plan.student.parameters())) * CALL if run.shards > 1 else 0.0
    return push_traffic(plan) / run.bandwidth + calls


def push_process_seconds(run: Run) -> float:
    return (nbytes(list(model(run.student).parameters())) + weight_bytes(run.student)) / HBM


def push_folder_seconds(run: Run) -> float:
    """The first process writes, then every server reads at a speed of its own."""
    return 2 * weight_bytes(run.student) / FOLDER


def push_broadcast_seconds(run: Run) -> float:
    return weight_bytes(run.student) / NETWORK


# Tables -------------------------------------------------------------------------------------


def table(heads: list[str], rows: list[list[Any]]) -> str:
    lines = [heads, ["---"] * len(heads), *rows]
    return "\n".join("| " + " | ".join(str(cell) for cell in line) + " |" for line in lines)


def gb(size: float) -> str:
    return f"{size / GB:.1f}"


def models_table() -> str:
    heads = ["student", "hidden", "layers", "heads", "KV heads", "intermediate", "embedding tied",
             "parameters", "of them in layers", "largest layer"]  # fmt: skip
    rows = []
    for name, s in SHAPES.items():
        every = sum(p.numel() for p in model(name).parameters())
        layer = sum(p.numel() for p in model(name).model.layers[0].parameters())
        rows.append([name, *s[:5], "yes" if s.tied else "no", f"{every:,}",
                     f"{layer * s.layers:,}", f"{layer:,}"])  # fmt: skip
    return table(heads, rows)


def layouts(name: str) -> list[Run]:
    ways = [(1, 1), (8, 1), (8, 8), (64, 8), (64, 16), (64, 64)]
    return [Run(name, world, shards, remote=True, servers=1) for world, shards in ways]


def memory_table() -> str:
    heads = ["student", "GPUs", "strategy", "weights", "gradients", "AdamW", "DDP's buckets",
             "bf16 copies or gathered", "gradients on their way", "activations", "head",
             "fullest moment", "fits"]  # fmt: skip
    rows = []
    for name in SHAPES:
        for run in layouts(name):
            memory = process_memory(run.plan())
            part = memory.always | memory.training
            total = sum(memory.fullest().values())
            copies = part.get("gathered", part.get("autocast_copies", 0))
            cells = [part["weights"], part["gradients"], part["optimizer"], part["ddp_buckets"],
                     copies, part.get("gathered_gradients", 0), part["activations"],
                     part["head"], total]  # fmt: skip
            rows.append([name, run.trainers, run.strategy, *map(gb, cells),
                         "yes" if total <= ROOM else "no"])  # fmt: skip
    return table(heads, rows)


def activations_table() -> str:
    heads = ["student", "tokens", "kept", "with gradient checkpointing", "head"]
    rows = []
    for name in SHAPES:
        for many in (1, 2, 4):
            both = [
                process_memory(
                    Run(name, 1, 1, checkpointing=c, rows=many, remote=True).plan()
                ).training
                for c in (False, True)
            ]
            tokens = f"{many} x {2 * PROMPT + MOST:,}"
            rows.append([name, tokens, *(gb(x["activations"]) for x in both), gb(both[1]["head"])])
    return table(heads, rows)


def others_table() -> str:
    heads = ["model", "teacher: whole", "1/8", "1/64", "gathered while a step trains",
             "EMA teacher: whole", "1/64", "student under LoRA: weights",
             "gradients and AdamW"]  # fmt: skip
    rows = []
    for name in SHAPES:
        half, full = model(name, half=True), model(name)
        layouts = [Layout(world=n, shards=n) for n in (1, 8, 64)]
        cells = [held_bytes(half.parameters(), x) for x in layouts]
        cells.append(gathered_bytes(half, layouts[1]))
        cells += [held_bytes(full.parameters(), x) for x in (layouts[0], layouts[2])]
        lora = process_memory(Run(name, 1, 1, remote=True, lora=True).plan()).always
        cells += [lora["weights"], lora["gradients"] + lora["optimizer"]]
        rows.append([name, *map(gb, cells)])
    return table(heads, rows)


def engines_table() -> str:
    heads = ["student", "weights, bf16", "KV cache a token", "GPUs an engine",
             f"sequences of {PROMPT + MEAN:,} tokens in it", "ms a decoding step of 1 row",
             f"of {AT_ONCE}", "tokens/s"]  # fmt: skip
    rows = []
    for name in SHAPES:
        gpus, size = gpus_of_engine(name), cached_bytes(name)
        room = (0.9 * gpus * ROOM - weight_bytes(name)) / ((PROMPT + MEAN) * size)
        one, many = (
            (weight_bytes(name) + n * (PROMPT + MEAN / 2) * size) / (HBM * gpus)
            + n * weight_bytes(name) / (PEAK * SCORING * gpus)
            for n in (1, min(AT_ONCE, room))
        )
        speed = ROLLOUTS * MEAN / decoding_seconds(name, ROLLOUTS, gpus)
        rows.append([name, gb(weight_bytes(name)) + " GB", f"{size / 1024:.0f} KiB", gpus,
                     f"{room:.0f}", f"{1e3 * one:.1f}", f"{1e3 * many:.1f}",
                     f"{speed:,.0f}"])  # fmt: skip
    return table(heads, rows)


def traffic_table() -> str:
    heads = ["student", "GPUs", "strategy", "micro-batches", "gathered", "scattered", "reduced",
             "gathered for a push", "seconds a step",
             "seconds of the student's passes"]  # fmt: skip
    rows = []
    for name in SHAPES:
        for run in layouts(name)[1:]:
            plan = run.plan()
            sent = step_traffic(plan)
            cells = [sent.get(x, 0.0) for x in ("all_gather", "reduce_scatter", "all_reduce")]
            rows.append([name, run.trainers, run.strategy, run.micro_batches, *map(gb, cells),
                         gb(push_traffic(plan)), f"{run.traffic_seconds():.1f}",
                         f"{run.student_seconds():.1f}"])  # fmt: skip
    return table(heads, rows)


def push_table() -> str:
    heads = ["student", "bytes for an engine", "gather: DDP", "8 shards, one node", "64 shards",
             "copy in process", "shared folder", "NCCL broadcast"]  # fmt: skip
    rows = []
    for name in SHAPES:
        runs = [Run(name, w, s, remote=True) for w, s in ((8, 1), (8, 8), (64, 64))]
        cells = [*map(gather_seconds, runs), push_process_seconds(runs[0]),
                 push_folder_seconds(runs[0]), push_broadcast_seconds(runs[0])]  # fmt: skip
        rows.append([name, gb(weight_bytes(name)) + " GB", *(f"{x:.2f} s" for x in cells)])
    return table(heads, rows)


@cache
def choose(name: str, gpus: int) -> Run | None:
    """The quickest that fits; LoRA, and a teacher elsewhere, only where nothing else does."""
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
            return min(fitting, key=Run.step_seconds)  # of equals the largest micro-batch
    return None


def plans_table() -> str:
    heads = ["student", "GPUs", "trains", "trainers", "engines", "teacher", "rows x micro-batches",
             "GB of a trainer", "write", "student", "teacher", "traffic", "push", "step",
             "response tokens/s"]  # fmt: skip
    rows = []
    for name in SHAPES:
        for gpus in (1, 8, 64):
            if (run := choose(name, gpus)) is None:
                rows.append([name, gpus, "nothing fits", *[""] * 12])
                continue
            seconds = [run.generate_seconds(), run.student_seconds(), run.teacher_seconds(),
                       run.traffic_seconds(), run.push_seconds(), run.step_seconds()]  # fmt: skip
            size = gpus_of_engine(name)
            engines = f"{run.servers // size} servers of {size}" if run.servers else "asleep"
            elsewhere = math.ceil(teacher_gpu_seconds(name) / seconds[1] / 2) * 2
            teacher = f"{elsewhere} GPUs elsewhere" if run.remote else "here"
            memory = sum(process_memory(run.plan()).fullest().values())
            rows.append([name, gpus, "LoRA" if run.lora else "all",
                         f"{run.trainers}, {run.strategy}", engines,
                         f"{TEACHERS[name]}, {teacher}", f"{run.rows} x {run.micro_batches}",
                         gb(memory), *(f"{x:.1f} s" for x in seconds),
                         f"{ROLLOUTS * MEAN / seconds[-1]:,.0f}"])  # fmt: skip
    return table(heads, rows)


def configuration(name: str, gpus: int) -> str:
    """What to write beside a method's configuration for the plan of so many GPUs."""
    run = choose(name, gpus)
    assert run is not None
    lines = [f"# {name} on {gpus} GPUs", "model:", "  init_args:", "    student:"]
    lines += [f"      path: Qwen/Qwen3-{name}", "      gradient_checkpointing: true"]
    if run.lora:
        lines += ["      dtype: bfloat16", "      lora: {r: 32, target_modules: all-linear}"]
    lines += ["    teacher:", "      class_path: opd_lightning.teachers.FrozenTeacher"]
    lines += [f"      init_args: {{path: Qwen/Qwen3-{TEACHERS[name]}, dtype: bfloat16}}", "data:"]
    if run.servers:
        lines += ["  engine:", "    class_path: opd_lightning.rollouts.VLLMServerEngine"]
        lines += ["    init_args:", "      dtype: bfloat16", "      key_file: servers/key"]
        many = run.servers // gpus_of_engine(name)
        lines += ["      push_folder: servers/push", f"      servers: # {many} of them"]
        lines += ["        - servers/rollouts-0.address", "  max_staleness: 1"]
    else:
        share = math.ceil(100 * run.engine_bytes / ROOM) / 100
        lines += [
            "  engine:",
            "    class_path: opd_lightning.rollouts.VLLMEngine",
            "    init_args:",
        ]
        lines += ["      dtype: bfloat16", "      sleep_while_training: true"]
        lines += [f"      gpu_memory_utilization: {share}"]
    lines += [f"  prompts_per_step: {ROLLOUTS}", f"  sampling: {{max_new_tokens: {MOST}}}"]
    nodes = max(1, run.trainers // PER_NODE)
    lines += ["trainer:", "  precision: bf16-mixed", f"  devices: {run.trainers // nodes}"]
    lines += [f"  num_nodes: {nodes}", f"  accumulate_grad_batches: {run.micro_batches}"]
    if run.shards == run.trainers > 1:
        lines += [
            "  strategy:",
            "    class_path: lightning.pytorch.strategies.ModelParallelStrategy",
        ]
        lines += [f"    init_args: {{data_parallel_size: {run.trainers}, tensor_parallel_size: 1}}"]
    elif run.shards > 1:
        lines += ["  strategy:", "    class_path: opd_lightning.hsdp.HSDPStrategy"]
        lines += [f"    init_args: {{shard_size: {run.shards}}}"]
    elif run.trainers > 1:
        lines += ["  strategy: ddp"]
    return "```yaml\n" + "\n".join(lines) + "\n```"


def balance_table() -> str:
    heads = ["student", "teacher", "GPU-seconds to write", "of the student's passes",
             "of the teacher's", "GPUs that write for one that trains"]  # fmt: skip
    rows = []
    for name in SHAPES:
        gpus = gpus_of_engine(name)
        writes = gpus * decoding_seconds(name, ROLLOUTS, gpus)
        trains, teaches = Run(name, 1, 1).student_seconds(), teacher_gpu_seconds(name)
        cells = [f"{x:.0f}" for x in (writes, trains, teaches)]
        rows.append([name, TEACHERS[name], *cells, f"{writes / (trains + teaches):.2f}"])
    return table(heads, rows)


TABLES = {
    "models": models_table,
    "memory": memory_table,
    "activations": activations_table,
    "others": others_table,
    "engines": engines_table,
    "traffic": traffic_table,
    "push": push_table,
    "balance": balance_table,
    "plans": plans_table,
    "one GPU": lambda: configuration("1.7B", 1),
    "a node": lambda: configuration("4B", 8),
    "eight nodes": lambda: configuration("32B", 64),
}


def main() -> None:
    for name, make in TABLES.items():
        print(f"<!-- benchmarks/scaling.py: {name} -->\n{make()}\n")


if __name__ == "__main__":
    main()
