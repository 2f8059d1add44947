"""torch.compile of the decoder layers of a causal LM, one by one and in place.

All layers of a model share their code, so that it is compiled once, in a fraction of the time that
a whole model takes. Modules and the names of their weights stay as they are.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from functools import cache
from typing import Any

import torch
from torch import Tensor

from opd_lightning.errors import UserError, reason_of


def compile_layers(lm: Any, backend: str = "inductor") -> None:
    """Compile the layers of a causal LM at their first call, for all lengths and numbers of rows.

    Args:
        lm: Causal LM, adapted or not.
        backend: torch.compile's.

    Raises:
        UserError: The model does not name its layers.
    """
    from opd_lightning.models.sharding import decoder_layers  # imports Lightning

    layers = decoder_layers(lm)
    if not layers:
        raise UserError(
            f"compile: got true, but {type(lm).__name__} does not name its layers "
            "(_no_split_modules); set it to false"
        )
    for layer in layers:
        layer.compile(backend=backend, dynamic=True)
    lm.opd_compiled = True


def uncompiled(lm: Any) -> AbstractContextManager[None]:
    """Return a context in which compiled layers of the causal LM `lm` run as they are.

    Code that reads the number of its layer, as caches do, would be compiled for each.
    """
    if not getattr(lm, "opd_compiled", False):
        return nullcontext()
    stance: AbstractContextManager[None] = torch.compiler.set_stance("force_eager")
    return stance


@cache
def check_compiler() -> None:
    """Compile a small function, which takes seconds where torch has not compiled it before.

    Raises:
        UserError: It fails, as it does without a C++ compiler, or on a GPU without Triton.
    """
    device = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        torch.compile(_double, dynamic=True)(torch.ones(8, device=device))
    except Exception as error:  # the compiler may raise any type
        raise UserError(
            f"compile: got true, but torch.compile fails here ({reason_of(error, 160)}); install "
            "a C++ compiler, such as g++, or set it to false"
        ) from error


def _double(values: Tensor) -> Tensor:
    return 2 * values
