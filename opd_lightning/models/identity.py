"""Identities of models: names derived from their content, equal on every machine."""

from __future__ import annotations

import os
from hashlib import blake2b
from pathlib import Path

from opd_lightning.errors import UserError

BLOCK = 4096  # bytes
BLOCKS = 64  # blocks read of each weight file


def model_identity(path: str) -> str:
    """Return `opd-` and 12 hex digits that hash config.json and the weights of a model folder.

    Of each weight file it hashes the name, the size and 64 evenly spaced blocks of 4 KiB, which
    takes milliseconds at any size. Models that differ only between these blocks get the same
    identity; training changes all weights of a matrix, so only manual edits can do that. The
    precision that a server computes in is not part of the identity.

    Args:
        path: Model folder, or hub name whose files are on this machine.
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
        digest.update(sample_of(file))
    return f"opd-{digest.hexdigest()}"


def sample_of(file: Path) -> bytes:
    """Return the name and size of a file and 64 evenly spaced blocks of it, of 4 KiB each."""
    size = file.stat().st_size
    parts = [f"\0{file.name} {size}\0".encode()]
    with file.open("rb") as stream:
        for block in range(BLOCKS):
            stream.seek(max(0, size - BLOCK) * block // (BLOCKS - 1))
            parts.append(stream.read(BLOCK))
    return b"".join(parts)


def _local_folder(path: str) -> Path:
    if os.path.isdir(path):
        return Path(path)
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(path, local_files_only=True))
    except (OSError, ValueError) as error:  # nothing cached, or not a valid name
        raise UserError(
            f"model {path!r}: neither a folder nor in this machine's Hugging Face cache; give the "
            "model folder"
        ) from error
