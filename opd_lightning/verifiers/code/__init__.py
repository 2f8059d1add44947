"""Programs as responses: run in sandboxes, against tests."""

from opd_lightning.verifiers.code.verifier import CodeVerifier

__all__ = ["CodeVerifier"]
