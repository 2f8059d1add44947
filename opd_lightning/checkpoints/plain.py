"""Restricted loading of tensors and plain data, so that a checkpoint cannot run code.

Files are read with torch's `weights_only`. A folder of shards has two kinds of pickles that torch
would load unrestricted: `.metadata`, and non-tensor data in shards. They are checked first.
"""

from __future__ import annotations

import io
import pickle
import re
from enum import Enum
from pathlib import Path
from typing import Any

import torch
from torch.distributed.checkpoint.metadata import BytesStorageMetadata, Metadata

_ALLOWED = {
    "torch.distributed.checkpoint.metadata": {
        "BytesStorageMetadata",
        "ChunkStorageMetadata",
        "Metadata",
        "MetadataIndex",
        "StorageMeta",
        "TensorProperties",
        "TensorStorageMetadata",
        "_MEM_FORMAT_ENCODING",
    },
    "torch.distributed.checkpoint.filesystem": {"_StorageInfo"},
    "torch.serialization": {"_get_layout"},
    "torch": {"Size"},
    "pathlib": {"PosixPath"},
    "pathlib._local": {"PosixPath"},
}


def load(file: Path | io.BytesIO, *, mmap: bool = False) -> Any:
    """Load a file to the CPU; with `mmap`, tensors are read from the disk on access.

    Raises:
        pickle.UnpicklingError: If it contains more than tensors and plain data.
        Exception: If it is damaged; of any type.
    """
    try:
        return torch.load(file, map_location="cpu", mmap=mmap or None, weights_only=True)
    except pickle.UnpicklingError as error:
        name = re.search(r"GLOBAL:? ?'?([\w.]+)", str(error))
        raise _refusal(name[1] if name else "or changed bytes") from error


def metadata_of(folder: Path) -> Metadata:
    """Load the metadata of a folder of shards, after checking its pickles.

    Raises:
        pickle.UnpicklingError: If they contain more than tensors and plain data.
    """
    for file in folder.glob("*.metadata"):  # torch may prefer another to `.metadata`
        with file.open("rb") as stream:
            _Metadata(stream).load()
    with (folder / ".metadata").open("rb") as stream:
        metadata: Metadata = _Metadata(stream).load()
    for index, place in metadata.storage_data.items():
        if isinstance(metadata.state_dict_metadata.get(index.fqn), BytesStorageMetadata):
            with (folder / place.relative_path).open("rb") as stream:
                stream.seek(place.offset)
                load(io.BytesIO(stream.read(place.length)))
    return metadata


class _Metadata(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if (module, name) == ("builtins", "getattr"):
            return _member
        found = module == "torch" and isinstance(getattr(torch, name, None), torch.dtype)
        if found or name in _ALLOWED.get(module, ()):
            return super().find_class(module, name)
        raise _refusal(f"{module}.{name}")


def _member(of: Any, name: str) -> Enum:
    """Stand in for the `getattr` by which some releases of Python 3.11 pickle enum members."""
    if not (isinstance(of, type) and issubclass(of, Enum)):
        raise _refusal("builtins.getattr")
    return of[name]


def _refusal(name: str) -> pickle.UnpicklingError:
    return pickle.UnpicklingError(
        f"it holds more than tensors and plain data ({name}), which could run a program"
    )
