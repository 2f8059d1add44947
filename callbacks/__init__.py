"""Optional callbacks of a run; none of them defines the method."""

from callbacks.capability_retention import CapabilityRetention
from callbacks.collapse_watch import CollapseWatch
from callbacks.ema_teacher import EMATeacherUpdate
from callbacks.phased_teacher_sampling import PhasedTeacherSampling
from callbacks.rng_state import RngState
from callbacks.rollout_log import RolloutLog
from callbacks.signal_plots import SignalPlots
from callbacks.slurm_requeue import SlurmRequeue

__all__ = [
    "CapabilityRetention",
    "CollapseWatch",
    "EMATeacherUpdate",
    "PhasedTeacherSampling",
    "RngState",
    "RolloutLog",
    "SignalPlots",
    "SlurmRequeue",
]
