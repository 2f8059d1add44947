"""Availability of the Hugging Face hub."""

from __future__ import annotations

from functools import cache

from opd_lightning.errors import reason_of

# Seconds. The hub answers within one; transformers would try each file for half a minute.
TIMEOUT = 5.0


@cache
def hub_unavailable() -> str | None:
    """Return None if the hub answers, else the reason why only its cache on disk can be read.

    Sends one request per process, and none if HF_HUB_OFFLINE is set.
    """
    from huggingface_hub import constants, get_session, is_offline_mode

    if is_offline_mode():
        return "HF_HUB_OFFLINE is set"
    try:
        get_session().head(constants.ENDPOINT, timeout=TIMEOUT)
    except Exception as error:  # from an HTTP library, a proxy or a certificate
        reason = reason_of(error, 60)
        return f"{constants.ENDPOINT} does not answer ({reason})"
    return None
