"""Published methods, one LightningModule per family; docs/methods.md has the table."""

from opd_lightning.methods.aopd import AOPD
from opd_lightning.methods.crisp import CRISP
from opd_lightning.methods.distilled_rl import DistilledRL
from opd_lightning.methods.distillm2 import DistiLLM2
from opd_lightning.methods.edge_opd import EDGEOPD
from opd_lightning.methods.entropy_switch import EntropySwitch
from opd_lightning.methods.g_opd import GOPD
from opd_lightning.methods.gkd import GKD
from opd_lightning.methods.gold import GOLD
from opd_lightning.methods.grpo import GRPO
from opd_lightning.methods.lens_opd import LensOPD
from opd_lightning.methods.lightning_opd import LightningOPD
from opd_lightning.methods.opd import OPD, DivergenceOPD
from opd_lightning.methods.opsd import OPSD, OPSDK1
from opd_lightning.methods.rlsd import RLSD
from opd_lightning.methods.sdft import SDFT
from opd_lightning.methods.sdpo import SDPO
from opd_lightning.methods.sft import SFT
from opd_lightning.methods.sg_opd import SGOPD
from opd_lightning.methods.tropd import TrOPD
from opd_lightning.training.base import DistillationModule
from opd_lightning.training.composed import ComposedMethod
from opd_lightning.training.switched import SwitchedMethod

__all__ = [
    "AOPD",
    "CRISP",
    "EDGEOPD",
    "GKD",
    "GOLD",
    "GOPD",
    "GRPO",
    "OPD",
    "OPSD",
    "OPSDK1",
    "RLSD",
    "SDFT",
    "SDPO",
    "SFT",
    "SGOPD",
    "ComposedMethod",
    "DistiLLM2",
    "DistillationModule",
    "DistilledRL",
    "DivergenceOPD",
    "EntropySwitch",
    "LensOPD",
    "LightningOPD",
    "SwitchedMethod",
    "TrOPD",
]
