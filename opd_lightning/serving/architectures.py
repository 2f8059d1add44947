"""Models that vLLM computes otherwise than transformers, refused before weights load."""

from __future__ import annotations

from opd_lightning.errors import UserError
from opd_lightning.models.source import ModelSource

NOT_RELOADED = {"gpt_oss": "attention sinks"}
ALTERNATIVE = "use opd_lightning.rollouts.HFEngine"


def check_architecture(source: ModelSource, *, on_gpu: bool, pushed: bool) -> None:
    """Raise UserError if vLLM is known to compute other log-probs than the trainer.

    Args:
        source: The model.
        on_gpu: Whether vLLM runs on a GPU, or its CPU build.
        pushed: Whether weights are pushed to it.
    """
    config = source.config
    if pushed and (kind := config.get_text_config().model_type) in NOT_RELOADED:
        raise UserError(
            f"{source.role} {source.path!r}: vLLM keeps the old {NOT_RELOADED[kind]} of {kind} "
            f"when weights are pushed; {ALTERNATIVE}"
        )
    if not on_gpu and getattr(config.get_text_config(), "attn_logit_softcapping", None):
        raise UserError(
            f"{source.role} {source.path!r}: vLLM's CPU build computes attn_logit_softcapping "
            f"wrongly (inexact, or NaN); {ALTERNATIVE}, or vLLM on a GPU"
        )
    ours = _trained(source)
    theirs = (config.architectures or [ours])[0]
    if theirs != ours and theirs.endswith("ForConditionalGeneration"):
        raise UserError(
            f"{source.role} {source.path!r}: vLLM loads {theirs}, which has other weights than "
            f"the {ours} that is trained; {ALTERNATIVE}, or a folder of the text model alone"
        )


def check_backend(source: ModelSource) -> None:
    """Raise UserError if vLLM in the trainer's process would break the trainer's model.

    For some architectures vLLM runs transformers' class, which it changes for the whole process.
    Imports vLLM.
    """
    from vllm import ModelRegistry

    name = (source.config.architectures or [_trained(source)])[0]
    found = ModelRegistry.models.get(name)
    if found is None or getattr(found, "class_name", name).startswith("Transformers"):
        raise UserError(
            f"{source.role} {source.path!r}: vLLM has no model of its own for {name}, and would "
            "change transformers' in the trainer's process; use "
            "opd_lightning.rollouts.VLLMServerEngine (opd serve) or HFEngine"
        )


def _trained(source: ModelSource) -> str | None:
    """Return the name of the class that transformers loads; None if it comes with the model."""
    from transformers import MODEL_FOR_CAUSAL_LM_MAPPING

    kind = MODEL_FOR_CAUSAL_LM_MAPPING.get(type(source.config), None)
    return None if kind is None else kind.__name__
