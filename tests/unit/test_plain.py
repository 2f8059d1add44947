"""Allowed types in a checkpoint's pickles."""

import pickle
from pathlib import Path
from typing import Any

import pytest
from torch.distributed.checkpoint.metadata import _MEM_FORMAT_ENCODING, Metadata

from opd_lightning.checkpoints.plain import metadata_of


class Attribute:
    """Pickled as a call of `getattr`."""

    def __init__(self, of: Any, name: str) -> None:
        self.of, self.name = of, name

    def __reduce__(self) -> tuple[Any, ...]:
        return getattr, (self.of, self.name)


def written(folder: Path, planner_data: Any) -> Path:
    content = Metadata(state_dict_metadata={}, planner_data=planner_data, storage_data={})
    (folder / ".metadata").write_bytes(pickle.dumps(content))
    return folder


def test_a_member_of_an_enumeration_may_be_pickled_by_name(tmp_path: Path) -> None:
    member = _MEM_FORMAT_ENCODING.TORCH_CHANNELS_LAST
    for pickled in (member, Attribute(_MEM_FORMAT_ENCODING, member.name)):
        assert metadata_of(written(tmp_path, pickled)).planner_data is member


@pytest.mark.parametrize(("of", "name"), [(Metadata, "__init__"), ("", "join")])
def test_other_attributes_are_refused(of: Any, name: str, tmp_path: Path) -> None:
    harmful = Attribute(of, name)
    with pytest.raises(pickle.UnpicklingError, match=r"more than .* plain data \(builtins.getattr"):
        metadata_of(written(tmp_path, harmful))
