"""Rollout engines: `class_path: opd_lightning.rollouts.HFEngine`, `.VLLMEngine` ..."""

from opd_lightning.rollouts.base import Engine, Request, Sampling
from opd_lightning.rollouts.hf import HFEngine
from opd_lightning.rollouts.vllm_local import VLLMEngine
from opd_lightning.rollouts.vllm_server import VLLMServerEngine

__all__ = ["Engine", "HFEngine", "Request", "Sampling", "VLLMEngine", "VLLMServerEngine"]
