"""Bytes that a process sends: gradients and gathered weights of a step, weights of a push.

An all-gather or a reduce-scatter of b bytes over n processes sends `b (n - 1) / n` from each, an
all-reduce twice that: the cost of ring algorithms, which is minimal.
"""

from __future__ import annotations

from opd_lightning.preflight.plan import Plan, layers_and_rest, nbytes, trained


def step_traffic(plan: Plan) -> dict[str, float]:
    """Return the bytes of one optimiser step, by collective.

    DDP reduces gradients once a step. In every micro-batch, FSDP2 gathers each layer twice
    (forward and backward) and other parameters once, and scatters the gradients, under autocast
    in float32; over replicas (HSDP) each process also reduces its part. A sharded teacher's
    layers are gathered in every micro-batch, its other parameters once a step; a teacher that is
    the student itself gathers its layers once more.
    """
    layout, many = plan.layout, plan.micro_batches
    layers, rest = plan.units
    if layout.shards == 1:
        return {"all_reduce": 2 * _share(layout.world) * nbytes(trained(plan.parameters))}
    passes = 2 + plan.readings
    gathered = many * (passes * sum(nbytes(x, plan.autocast) for x in layers) + nbytes(rest))
    for teacher in plan.teachers:
        if teacher.sharded:
            own_layers, own_rest = layers_and_rest(teacher.model)
            gathered += many * sum(map(nbytes, own_layers)) + nbytes(own_rest)
    scattered = sum(nbytes(trained(x), plan.reduced) for x in layers) + nbytes(trained(rest))
    inside, across = _share(layout.shards), _share(layout.replicas)
    return {
        "all_gather": inside * gathered,
        "reduce_scatter": many * inside * scattered,
        "all_reduce": many * 2 * across * scattered / layout.shards,
    }


def push_traffic(plan: Plan) -> float:
    """Return the bytes that gather the student for one push: every weight once, in its dtype."""
    return _share(plan.layout.shards) * nbytes(plan.parameters)


def _share(processes: int) -> float:
    return (processes - 1) / processes
