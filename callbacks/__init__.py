"""Optional callbacks of a run; none of them defines the method."""

from .capability_retention import CapabilityRetention
from .collapse_watch import CollapseWatch
from .ema_teacher import EMATeacherUpdate
from .phased_teacher_sampling import PhasedTeacherSampling
from .rng_state import RngState
from .rollout_log import RolloutLog
from .signal_plots import SignalPlots
from .slurm_requeue import SlurmRequeue

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
