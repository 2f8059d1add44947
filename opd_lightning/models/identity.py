"""A name for a model's content: the same weights have it on every machine."""

from __future__ import annotations

import os
from hashlib import blake2b
from pathlib import Path

from opd_lightning.errors import UserError

BLOCK = 4096  # bytes
BLOCKS = 64  # of each weight file


def model_identity(path: str) -> str:
    """`opd-` and 12 hex digits of what config.json and the weights of a model folder say.

    Each weight file counts with its name, its size and 64 blocks of 4 KiB, evenly spaced over it:
    milliseconds at any size. Two models that differ nowhere but between these blocks are taken for
    one; training moves all weights of a matrix, so that takes an edit by hand. The precision that a
    server computes in is not part of it.

    Args:
        path: Model folder, or a hub name whose files are on this machine.
    """
    folder = _local_folder(path)
    files = sorted(folder.glob("*.safetensors")) or sorted(folder.glob("*.bin"))
    if not files or not (folder / "config.json").is_file():
        raise UserError(
            f"model {path!r}: no config.json and weights (safetensors or bin) on this machine to "
            "know it by; give the model folder"
        )
    digest = blake2b((folder / "config.json").read_bytes(), digest_size=6)
    for file in files:
        size = file.stat().st_size
        digest.update(f"\0{file.name} {size}\0".encode())
        with file.open("rb") as stream:
            for block in range(BLOCKS):
                stream.seek(max(0, size - BLOCK) * block // (BLOCKS - 1))
                digest.update(stream.read(BLOCK))
    return f"opd-{digest.hexdigest()}"


def _local_folder(path: str) -> Path:
    if os.path.isdir(path):
        return Path(path)
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(path, local_files_only=True))
    except (OSError, ValueError) as error:  # nothing cached, or no name at all
        raise UserError(
            f"model {path!r}: neither a folder nor in this machine's Hugging Face cache; give the "
            "model folder"
        ) from error
