"""Files that would run code, or lead out of their directory, if they were believed."""

import io
import pickle
import tarfile
import zipfile
from argparse import Namespace
from dataclasses import replace
from pathlib import Path
from signal import Signals

import pytest
import torch
from torch.distributed._shard.sharded_tensor import metadata
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import _MEM_FORMAT_ENCODING, Metadata, MetadataIndex, StorageMeta

from benchmarks.reliability.pickles import calls, calls_in_2, unicode, word
from megatron_ext.checkpoint import checksums, layout
from megatron_ext.checkpoint.reader import CheckpointReader
from megatron_ext.checkpoint.writer import writing
from megatron_ext.errors import CheckpointError, MegatronExtError, UntrustedError
from megatron_ext.models import axes
from megatron_ext.models.presets import PRESETS

ARCH = replace(PRESETS["tiny-hybrid"].architecture, pattern="M*", hidden_size=16, padded_vocab_size=32)


MKDIR = {
    "a function": ("posix", "mkdir"),
    "a module of a module that an index names": ("pathlib", "os.mkdir"),
    "a module of torch's": ("torch.distributed.checkpoint.filesystem", "os.mkdir"),
    "a module two steps away": ("torch", "serialization.os.mkdir"),
    "a module of the collections": ("collections", "_sys.modules"),
    "the namespace of a function": ("torch._utils", "_rebuild_tensor_v2.__globals__"),
    "a function of torch's that unpickles": ("torch.storage", "_load_from_bytes"),
    "a function that is only deprecated": ("torch._utils", "_import_dotted_name"),
    "a method of a class that an index names": ("pathlib", "PosixPath.mkdir"),
    "eval": ("builtins", "eval"),
    "getattr": ("builtins", "getattr"),
    "import": ("builtins", "__import__"),
    "a class that is no part of an index": ("subprocess", "Popen"),
    "the constructor of a dynamic library": ("ctypes", "CDLL"),
    "another library's loader": ("numpy", "load"),
}


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> Path:
    """A complete step, to be copied and spoilt."""
    path = tmp_path_factory.mktemp("made") / "model"
    with writing(path, ARCH, Namespace(seed=1)) as writer:
        for key, shape in axes.tensors(ARCH).items():
            writer.write(key, torch.zeros(shape))
    return path / "release"


@pytest.fixture
def step(made: Path, tmp_path: Path) -> Path:
    """A complete step, in a directory of its own."""
    copy = tmp_path / "run" / "iter_0000001"
    copy.mkdir(parents=True)
    for file in made.iterdir():
        (copy / file.name).write_bytes(file.read_bytes())
    return copy


def archive(path: Path, content: bytes) -> None:
    """A file as of `torch.save`, with this pickle in it."""
    buffer = io.BytesIO()
    torch.save({"iteration": 1}, buffer)
    with zipfile.ZipFile(buffer) as before, zipfile.ZipFile(path, "w") as after:
        for name in before.namelist():
            after.writestr(name, content if name.endswith("data.pkl") else before.read(name))


@pytest.mark.parametrize("write", [calls, calls_in_2])
@pytest.mark.parametrize("target", MKDIR.values(), ids=MKDIR)
def test_an_index_runs_nothing(step: Path, tmp_path: Path, target: tuple[str, str], write) -> None:
    (step / ".metadata").write_bytes(write(*target, str(tmp_path / "hit")))
    with pytest.raises(UntrustedError, match=rf"asks for {target[0]}\.{target[1]}"):
        layout.find(step.parent)
    assert not (tmp_path / "hit").exists()


@pytest.mark.parametrize("target", MKDIR.values(), ids=MKDIR)
def test_the_arguments_run_nothing(step: Path, tmp_path: Path, target: tuple[str, str]) -> None:
    archive(step / "common.pt", calls_in_2(*target, str(tmp_path / "hit")))
    with pytest.raises(UntrustedError, match=rf"asks for {target[0]}\.{target[1]}"):
        layout.common(step)
    assert not (tmp_path / "hit").exists()


def instance(path: str) -> bytes:
    return b"(S'" + path.encode() + b"'\niposix\nmkdir\n."


def instance_of(path: str) -> bytes:
    return b"(cposix\nmkdir\nS'" + path.encode() + b"'\no."


def class_made(path: str) -> bytes:
    return b"\x80\x02cposix\nmkdir\n" + unicode(path) + b"\x85\x81."


def keywords(path: str) -> bytes:
    return b"\x80\x04" + word("pathlib") + word("os.mkdir") + b"\x93)}" + word("path") + word(path) + b"s\x92."


@pytest.mark.parametrize("write", [instance, instance_of, class_made, keywords])
def test_an_index_runs_nothing_by_any_instruction(step: Path, tmp_path: Path, write) -> None:
    (step / ".metadata").write_bytes(write(str(tmp_path / "hit")))
    with pytest.raises(UntrustedError, match="asks for"):
        layout.read_metadata(step)
    assert not (tmp_path / "hit").exists()


def test_an_index_cannot_alter_a_class(step: Path) -> None:
    module = "torch.distributed.checkpoint.metadata"
    state = b"N}" + word("__eq__") + word(module) + word("Metadata") + b"\x93s\x86b."
    (step / ".metadata").write_bytes(b"\x80\x04" + word(module) + word("MetadataIndex") + b"\x93" + state)
    before = MetadataIndex.__eq__
    with pytest.raises(UntrustedError, match="alters the class MetadataIndex"):
        layout.read_metadata(step)
    assert MetadataIndex.__eq__ is before


def legacy(path: Path, content: bytes) -> None:
    """The form of `torch.save` before archives: pickles, one after another; the first is to be a number."""
    path.write_bytes(content)


def tar(path: Path, content: bytes) -> None:
    """The form of `torch.save` before that."""
    with tarfile.open(path, "w") as file:
        for name in ("storages", "tensors", "pickle"):
            entry = tarfile.TarInfo(name)
            entry.size = len(content)
            file.addfile(entry, io.BytesIO(content))


@pytest.mark.parametrize("write", [legacy, tar])
def test_arguments_in_an_older_form_run_nothing(step: Path, tmp_path: Path, write) -> None:
    write(step / "common.pt", calls("posix", "mkdir", str(tmp_path / "hit")))
    with pytest.raises(CheckpointError, match=r"common\.pt"):
        layout.common(step)
    assert not (tmp_path / "hit").exists()


def test_arguments_among_the_tensors_run_nothing(step: Path, tmp_path: Path) -> None:
    place = layout.read_metadata(step)
    archive(tmp_path / "bytes", calls_in_2("posix", "mkdir", str(tmp_path / "hit")))
    (step / "evil.distcp").write_bytes((tmp_path / "bytes").read_bytes())
    size = (step / "evil.distcp").stat().st_size
    place.storage_data[MetadataIndex(layout.COMMON_STATE)] = _StorageInfo("evil.distcp", 0, size)
    (step / ".metadata").write_bytes(pickle.dumps(place))
    with pytest.raises(UntrustedError, match=r"asks for posix\.mkdir"):
        layout.common(step)
    assert not (tmp_path / "hit").exists()


def test_members_of_enumerations_may_be_pickled_by_name(step: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As Python 3.11 does it, and torch before 2.3 under another name."""
    before = layout.read_metadata(step)
    monkeypatch.setattr(_MEM_FORMAT_ENCODING, "__reduce_ex__", lambda self, _: (getattr, (type(self), self.name)))
    monkeypatch.setattr(Signals, "__reduce_ex__", lambda self, _: (getattr, (type(self), self.name)))
    older = metadata.MEM_FORMAT_ENCODING.__module__.encode()
    text = pickle.dumps(before, 2)
    newer = _MEM_FORMAT_ENCODING.__module__.encode()
    for name in (b"TensorProperties", b"_MEM_FORMAT_ENCODING"):
        text = text.replace(b"c%s\n%s" % (newer, name), b"c%s\n%s" % (older, name.lstrip(b"_")))
    assert text.count(older) == 2
    assert text.count(b"getattr") == 1
    (step / ".metadata").write_bytes(text)
    assert layout.read_metadata(step).state_dict_metadata == before.state_dict_metadata
    torch.save({"args": Namespace(exit_signal=Signals.SIGTERM)}, step / "common.pt")
    assert layout.common(step)["args"].exit_signal is Signals.SIGTERM


def test_a_tensor_runs_nothing(step: Path, tmp_path: Path) -> None:
    place = layout.read_metadata(step)
    archive(step / "evil.distcp", calls_in_2("posix", "mkdir", str(tmp_path / "hit")))
    size = (step / "evil.distcp").stat().st_size
    key = next(key for key in place.storage_data if key.fqn == axes.EMBEDDING)
    place.storage_data[key] = _StorageInfo("evil.distcp", 0, size)
    (step / ".metadata").write_bytes(pickle.dumps(place))
    (step / checksums.FILE).unlink()  # as whoever means harm would
    with pytest.raises(UntrustedError, match=r"asks for posix\.mkdir"):
        CheckpointReader(step).read(axes.EMBEDDING)
    assert not (tmp_path / "hit").exists()


def test_arguments_of_wrong_types_are_told(step: Path) -> None:
    torch.save({"args": Namespace(**{**vars(layout.common(step)["args"]), "hidden_size": "16"})}, step / "common.pt")
    with pytest.raises(MegatronExtError):
        layout.architecture(step)


def test_a_class_of_megatrons_is_neither_imported_nor_made(tmp_path: Path) -> None:
    content = (
        b"\x80\x02}" + unicode("bomb") + b"cmegatron.core\nos.mkdir\n" + unicode(str(tmp_path / "hit")) + b"\x85Rs."
    )
    archive(tmp_path / "common.pt", content)
    assert layout.common(tmp_path) == {}
    assert not (tmp_path / "hit").exists()


@pytest.mark.parametrize("name", ["../../outside/x", "/etc/passwd", "a/../../x", "\0"])
def test_an_index_names_no_file_elsewhere(step: Path, tmp_path: Path, name: str) -> None:
    (tmp_path / "outside").mkdir()
    (step / "__0_0.distcp").rename(tmp_path / "outside" / "x")
    place = layout.read_metadata(step)
    for key, info in place.storage_data.items():
        place.storage_data[key] = _StorageInfo(name, info.offset, info.length)
    (step / ".metadata").write_bytes(pickle.dumps(place))
    with pytest.raises(UntrustedError, match=r"outside|no name of a file"):
        CheckpointReader(step)


@pytest.mark.parametrize("name", ["__0_0.distcp", ".metadata", "metadata.json"])
def test_a_link_is_not_followed_out_of_a_checkpoint(step: Path, tmp_path: Path, name: str) -> None:
    (step / name).rename(tmp_path / "elsewhere")
    (step / name).symlink_to(tmp_path / "elsewhere")
    with pytest.raises(UntrustedError, match="leads out of the directory"):
        CheckpointReader(step)


def test_a_checkpoint_itself_may_be_a_link(step: Path, tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(step.parent)
    assert CheckpointReader(tmp_path / "link").shapes == CheckpointReader(step).shapes


WRONG = {
    "no index": 3,
    "no places": Metadata({}, storage_data=None, storage_meta=StorageMeta()),
    "places that are none": Metadata({}, storage_data={MetadataIndex("a"): "file"}),
    "a negative place": Metadata({}, storage_data={MetadataIndex("a"): _StorageInfo("x", -5, 5)}),
    "an entry that is none": Metadata({"a": 5}, storage_data={}),  # type: ignore[dict-item]
}


@pytest.mark.parametrize("content", WRONG.values(), ids=WRONG)
def test_an_index_of_wrong_types_is_damaged(step: Path, content: object) -> None:
    (step / ".metadata").write_bytes(pickle.dumps(content))
    with pytest.raises(CheckpointError, match="not an index of tensors"):
        layout.verify(step)


def test_reading_objects_leaves_what_others_declared_safe(tmp_path: Path) -> None:
    torch.save({"args": Namespace(a=1)}, tmp_path / "common.pt")
    with torch.serialization.safe_globals([Namespace]):
        before = torch.serialization.get_safe_globals()
        assert layout.common(tmp_path)["args"] == Namespace(a=1)
        assert set(torch.serialization.get_safe_globals()) == set(before)
    assert layout.common(tmp_path)["args"] == Namespace(a=1)
    assert Namespace not in torch.serialization.get_safe_globals()
