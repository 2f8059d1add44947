"""Seal of a checkpoint's file: a digest of all its entries, in the comment of the archive.

A program that rewrites the file with changed content also writes valid entry checksums; such a file
lacks the seal.
"""

from __future__ import annotations

import hashlib
import json
import struct
import zipfile
from typing import BinaryIO

PREFIX = b"opd-lightning "
END = b"PK\x05\x06"  # signature of the archive's last record, which the comment follows
END_BYTES = 22  # length of that record; its last two bytes are the length of the comment


def seal(file: BinaryIO) -> None:
    """Seal an archive that torch has written; it must be open for reading and writing."""
    with zipfile.ZipFile(file) as archive:
        comment = PREFIX + _digest(archive)
    file.seek(-END_BYTES, 2)
    if file.read(len(END)) != END:
        raise ValueError("the archive has a comment")
    file.seek(-2, 2)
    file.write(struct.pack("<H", len(comment)) + comment)


def is_sealed(archive: zipfile.ZipFile) -> bool:
    """Return whether an archive has a seal.

    Raises:
        ValueError: If the seal does not match the content.
    """
    if not archive.comment:
        return False
    if archive.comment != PREFIX + _digest(archive):
        raise ValueError("the seal does not match the content")
    return True


def _digest(archive: zipfile.ZipFile) -> bytes:
    entries = sorted((one.filename, one.file_size, one.CRC) for one in archive.infolist())
    return hashlib.sha256(json.dumps(entries).encode()).hexdigest().encode()
