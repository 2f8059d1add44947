"""Detection of steps whose loss, gradient or weights are not finite."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from opd_lightning.errors import EngineMismatchError, RunStoppedError, UserError, raised_by_all
from opd_lightning.metrics.sums import Means
from opd_lightning.processes import Ranks
from opd_lightning.types import RolloutBatch, TokenScores

ENGINE = "engine"


class SkippedSteps(nn.Module):
    """Counts steps whose loss or gradient is not finite and removes their gradients.

    The decision uses sums over micro-batches and ranks, so that all ranks decide alike. An
    optimiser leaves a parameter without a gradient unchanged: value, moments and step count.

    Args:
        stop_after: Number of consecutive steps, the last included, that end the run.
    """

    def __init__(self, stop_after: int) -> None:
        super().__init__()
        if stop_after < 1:
            raise UserError(
                f"model.init_args.stop_after_skips: got {stop_after}, expected at least 1"
            )
        self.stop_after = stop_after
        self.total = 0  # in this run
        self.in_a_row = 0
        # Shares of tokens whose values are not finite: log-probs by model, then the signal and
        # the loss by the part that made them, in this order.
        self.faulty = Means()
        self.parts = Means()

    def record(self, batch: RolloutBatch, mask: Tensor, **models: TokenScores) -> None:
        """Record, by model, which log-probs in `mask [B, R]` are not finite."""
        _record(self.faulty, batch, mask, {name: s.logprobs for name, s in models.items()})

    def record_engine(self, batch: RolloutBatch, mask: Tensor) -> None:
        """Record which log-probs of the engine in `mask [B, R]` are not finite."""
        _record(self.faulty, batch, mask, {ENGINE: batch.behaviour_logprobs})

    def record_part(
        self, batch: RolloutBatch, mask: Tensor, owner: object, kind: str, values: Tensor
    ) -> None:
        """Record which values `[B, R]` in `mask` are not finite.

        Args:
            batch: The micro-batch.
            mask: Tokens that are looked at, `[B, R]`.
            owner: Method, rule or term that computed the values.
            kind: What they are, such as "loss", for the message.
            values: The values.
        """
        _record(self.parts, batch, mask, {f"the {kind} of {type(owner).__name__}": values})

    def reset(self) -> None:
        """Discard the records of the current step."""
        self.faulty.reset()
        self.parts.reset()

    def skip(
        self,
        step: int,
        loss: Tensor,
        gradient_norm: Tensor,
        parameters: Iterable[nn.Parameter],
        *,
        loss_scale: float = 1.0,
    ) -> str | None:
        """Skip the step if needed; return a message for the user then, else None. Collective.

        Under float16, steps that a loss scale above 1 makes overflow are not faults: the scaler
        starts high and halves it until they fit. They are skipped, but not counted as in a row.

        Raises RunStoppedError at `stop_after` consecutive steps, and EngineMismatchError if
        log-probs of the engine are not finite: its next rollouts would not be better.
        """
        faulty, parts = _shares(self.faulty), _shares(self.parts)
        self.reset()
        if ENGINE in faulty:
            engine = EngineMismatchError(
                f"step {step}: the engine's log-probs are not finite on {faulty[ENGINE]:.2%} of "
                "the tokens that it sampled; its weights or its kernels are broken: restart the "
                "run, with engine dtype float32 if it happens again"
            )
            raise raised_by_all(engine)
        if loss.isfinite() and gradient_norm.isfinite():
            self.in_a_row = 0
            return None
        if loss.isfinite() and loss_scale > 1:
            _discard_gradients(parameters)
            self.total += 1
            return (
                f"step {step} skipped: its gradient overflows float16 at a loss scale of "
                f"{loss_scale:g}, which is lowered ({self.total} in this run)"
            )
        found = f"its loss is {float(loss):g} and its gradient's norm {float(gradient_norm):g}"
        for name, share in faulty.items():
            found += f", log-probs of the {name} are not finite on {share:.2%} of the tokens"
        if parts and not faulty:  # later parts read the values of the first
            part, share = next(iter(parts.items()))
            found += f", {part} is not finite on {share:.2%} of the tokens"
        if self.in_a_row + 1 >= self.stop_after:  # not counted: a resumed run repeats it
            too_many = RunStoppedError(
                f"step {step}: {found}; that makes {self.stop_after} in a row "
                "(model.init_args.stop_after_skips), so the run ends with the weights of before; "
                "lower the learning rate, or check what returns non-finite values"
            )
            raise raised_by_all(too_many)
        _discard_gradients(parameters)
        self.total += 1
        self.in_a_row += 1
        return (
            f"step {step} skipped: {found}; weights and optimiser stay as they were "
            f"({self.in_a_row} in a row, {self.stop_after} end the run; {self.total} in this run)"
        )

    def counts(self) -> dict[str, int]:
        """Return the counters for a checkpoint."""
        return {"total": self.total, "in_a_row": self.in_a_row}

    def resume(self, counts: Mapping[str, int]) -> None:
        """Restore the counters of a checkpoint; older checkpoints have none."""
        for name, count in counts.items():
            if not 0 <= count < 2**53:  # what a logged figure holds
                raise ValueError(f"skipped_steps.{name}: got {count!r:.30}, expected a count")
        self.total, self.in_a_row = int(counts.get("total", 0)), int(counts.get("in_a_row", 0))


def _record(means: Means, batch: RolloutBatch, mask: Tensor, values: Mapping[str, Tensor]) -> None:
    means.update(batch, {name: mask & ~value.isfinite() for name, value in values.items()})


def _shares(means: Means) -> dict[str, float]:
    """Return the shares above 0."""
    return {name: float(share) for name, share in means.compute().items() if share > 0}


def _discard_gradients(parameters: Iterable[nn.Parameter]) -> None:
    for parameter in parameters:
        parameter.grad = None


def check_weights(step: int, student: nn.Module, ranks: Ranks) -> None:
    """Raise RunStoppedError, on all ranks, if the optimiser left a weight that is not finite."""
    trained = {name: _local_shard(p) for name, p in student.named_parameters() if p.requires_grad}
    # With more processes than rows, as of a small LoRA, some have an empty shard.
    held = [weight for weight in trained.values() if weight.numel()]
    # The maximum norm cannot overflow, unlike a sum of squares, and propagates NaN.
    largest = torch.nn.utils.get_total_norm(held, norm_type=float("inf"))
    if ranks.sum(int(not largest.isfinite())):
        broken = [name for name, weight in trained.items() if not weight.isfinite().all()]
        name = next(names[0] for names in ranks.gather(broken) if names)
        error = RunStoppedError(
            f"step {step}: the optimiser left weights that are not finite, {name!r} among them; "
            "this step is neither saved nor pushed: resume from the last checkpoint with a "
            "lower learning rate"
        )
        raise raised_by_all(error)


def _local_shard(parameter: nn.Parameter) -> Tensor:
    """Return the local shard of a parameter."""
    weight = parameter.detach()
    return weight.to_local() if isinstance(weight, DTensor) else weight
