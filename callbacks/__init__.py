"""Optional parts of a run; take one away and the method is still the same method."""

from callbacks.rollout_log import RolloutLog

__all__ = ["RolloutLog"]
