"""Build hook: the names under which `callbacks/` and `configs/` are installed."""

from typing import Any

from hatchling.builders.hooks.plugin.interface import BuildHookInterface


class InstalledNames(BuildHookInterface):
    """Put both folders into the wheel under names that no other distribution uses.

    An editable install needs no copies: there, both are read from the checkout.
    """

    def initialize(self, version: str, build_data: dict[str, Any]) -> None:
        """Add the two folders to a wheel; `version` is "standard" or "editable"."""
        if version == "standard":
            build_data["force_include"] |= {
                "callbacks": "opd_lightning_callbacks",
                "configs": "opd_lightning/configs",
            }
