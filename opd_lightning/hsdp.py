"""Old path of `HSDPStrategy`, which configurations name."""

from opd_lightning.models.sharding import HSDPStrategy

__all__ = ["HSDPStrategy"]
