"""Bytes that a process sends: gradients and gathered weights of a step, weights of a push.

An all-gather or a reduce-scatter of b bytes over n processes sends `b (n - 1) / n` from each, an
all-reduce twice that: what rings need, and nothing needs less.
"""

from __future__ import annotations

from opd_lightning.preflight.plan import Plan, layers_and_rest, nbytes, trained


def step_traffic(plan: Plan) -> dict[str, float]:
    """Of one optimiser step, by collective.

    DDP adds gradients up once a step. FSDP2 gathers, in every micro-batch, each layer twice
    (forward and back) and once what is no layer, and scatters the gradients, under autocast in
    float32; over replicas (HSDP) each process adds its part up besides. Of a sharded teacher the
    layers are gathered in every micro-batch, the rest once a step; one that is the student itself
    gathers its layers once more.
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
    """Gathering the student for one push: every weight once, in its own dtype."""
    return _share(plan.layout.shards) * nbytes(plan.parameters)


def _share(processes: int) -> float:
    return (processes - 1) / processes
