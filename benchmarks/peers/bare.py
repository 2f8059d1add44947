"""A side of the comparison: the stages of a step by hand, in torch and vLLM alone.

The limit for what has to be computed: nothing is checked, logged or saved, one vocabulary matrix is
multiplied by once, and rows of similar length share a micro-batch. Run by
`python -m benchmarks.peers`.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

os.environ |= {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_CPU_OMP_THREADS_BIND": "nobind"}
os.environ |= {"VLLM_LOGGING_LEVEL": "ERROR", "VLLM_CPU_KVCACHE_SPACE": "1"}

import torch
from torch.nn.utils import clip_grad_norm_
from transformers import AutoModelForCausalLM, AutoTokenizer
from vllm import LLM, SamplingParams

from benchmarks.peers.sizes import EOS, PAD, SIZES
from benchmarks.peers.turns import Turns, stages_of
from opd_lightning.serving.vllm_process import CPU_ARGUMENTS, repack
from opd_lightning.timing import StepTimer


def hidden_states(model: Any, ids: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    return model.model(input_ids=ids, attention_mask=mask, use_cache=False).last_hidden_state


def train(world: Path, name: str, precision: str) -> None:
    size, turns, dtype = SIZES[name], Turns(), getattr(torch, precision)
    student, teacher = (
        AutoModelForCausalLM.from_pretrained(world / role, dtype=kind)
        for role, kind in (("student", torch.float32), ("teacher", dtype))
    )
    optimizer = torch.optim.AdamW(student.parameters(), lr=1e-6, weight_decay=0.0)
    llm = LLM(
        str(world / "student"), dtype=precision, max_model_len=size.prompt + size.response,
        enforce_eager=True, skip_tokenizer_init=True, **CPU_ARGUMENTS,
    )  # fmt: skip
    sampling = SamplingParams(max_tokens=size.response, stop_token_ids=[EOS], detokenize=False)
    tokenizer = AutoTokenizer.from_pretrained(world / "student")
    rows = [json.loads(line)["prompt"][0] for line in (world / "prompts.jsonl").open()]
    prompts = tokenizer([row["content"] for row in rows])["input_ids"]
    step, going, timer = 0, True, StepTimer()
    turns.start()
    while going:
        timer.next_step()
        chosen = [prompts[(step * size.rows + i) % len(prompts)] for i in range(size.rows)]
        weights = {"weights_iterator": iter(student.state_dict().items())}
        with timer.stage("sync"):
            llm.collective_rpc("reload_weights", kwargs=weights)
            llm.apply_model(repack)
        asked = [{"prompt_token_ids": p} for p in chosen]
        with timer.stage("generate"):
            outputs = llm.generate(asked, sampling, use_tqdm=False)
        written = [list(output.outputs[0].token_ids) for output in outputs]
        texts = [(len(p), p + ids) for p, ids in zip(chosen, written, strict=True)]
        texts.sort(key=lambda text: len(text[1]))
        tokens = sum(map(len, written))
        width = size.rows // size.micro_batches
        for first in range(0, size.rows, width):
            part = texts[first : first + width]
            longest = len(part[-1][1])
            ids = torch.tensor([ids + [PAD] * (longest - len(ids)) for _, ids in part])
            place = torch.arange(longest)
            mask = place < torch.tensor([len(ids) for _, ids in part])[:, None]
            read = mask[:, 1:] & (place[1:] >= torch.tensor([start for start, _ in part])[:, None])
            with torch.no_grad(), timer.stage("teacher"):
                states = hidden_states(teacher, ids, mask)[:, :-1][read]
            with torch.no_grad(), timer.stage("head"):
                theirs = teacher.lm_head(states).float().log_softmax(-1)
            with torch.autocast("cpu", dtype, enabled=precision != "float32"):
                with timer.stage("student"):
                    states = hidden_states(student, ids, mask)[:, :-1][read]
                with timer.stage("head"):
                    ours = student.lm_head(states).float().log_softmax(-1)
                    loss = (ours.exp() * (ours - theirs)).sum() / tokens
            with timer.stage("backward"):
                loss.backward()
        with timer.stage("optimizer"):
            clip_grad_norm_(student.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
        step += 1
        timer.next_step()
        going = turns.end(tokens, stages_of(timer))


if __name__ == "__main__":
    train(Path(sys.argv[1]), sys.argv[2], sys.argv[3])
