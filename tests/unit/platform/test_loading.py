"""What Megatron's restricted unpickler lets through."""

import io
import os
import pickle
from typing import Any

import pytest
import torch
from megatron.core.safe_globals import SafeUnpickler
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import save

from megatron_ext.errors import UntrustedError
from megatron_ext.platform import loading


class Bomb:
    """Makes a directory, wherever it is unpickled."""

    def __init__(self, path: str) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return os.mkdir, (self.path,)


@pytest.fixture
def restricted(monkeypatch: pytest.MonkeyPatch) -> None:
    """The replaced method, for one test."""
    monkeypatch.setattr(SafeUnpickler, "find_class", loading._find_class)


def test_a_storage_within_a_pickle_runs_nothing(restricted: None, tmp_path) -> None:
    inner = io.BytesIO()
    torch.save(Bomb(str(tmp_path / "hit")), inner)
    text = inner.getvalue()
    outer = b"\x80\x04\x8c\x0dtorch.storage\x8c\x10_load_from_bytes\x93B" + len(text).to_bytes(4, "little") + text
    with pytest.raises(pickle.UnpicklingError, match=r"posix\.mkdir"):
        SafeUnpickler(io.BytesIO(outer + b"\x85R.")).load()
    assert not (tmp_path / "hit").exists()


def test_a_tensor_is_unpickled_and_nothing_else_is(restricted: None) -> None:
    tensor = torch.arange(4.0)
    assert torch.equal(SafeUnpickler(io.BytesIO(pickle.dumps(tensor))).load(), tensor)
    with pytest.raises(pickle.UnpicklingError, match=r"builtins\.eval is not loaded"):
        SafeUnpickler(io.BytesIO(pickle.dumps(eval))).load()


def test_a_tensor_that_is_none_is_refused_in_words(tmp_path) -> None:
    save({"w": torch.zeros(3)}, checkpoint_id=tmp_path, no_dist=True)
    (file,) = tmp_path.glob("*.distcp")
    size = file.stat().st_size
    content = io.BytesIO()
    torch.save(Bomb(str(tmp_path / "hit")), content)
    assert len(content.getvalue()) <= size
    index = pickle.loads((tmp_path / ".metadata").read_bytes())
    (place,) = index.storage_data.values()
    place.offset, place.length = 0, len(content.getvalue())
    (tmp_path / ".metadata").write_bytes(pickle.dumps(index))
    file.write_bytes(content.getvalue())
    with pytest.raises(UntrustedError, match=r"posix\.mkdir"):
        loading._in_words(load)({"w": torch.zeros(3)}, checkpoint_id=tmp_path, no_dist=True)
    assert not (tmp_path / "hit").exists()
