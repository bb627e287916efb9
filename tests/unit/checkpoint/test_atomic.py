import pytest

from megatron_ext.checkpoint.atomic import atomic_write, fresh_directory, write_text
from megatron_ext.errors import CheckpointError


def test_a_file_is_replaced_whole_or_not_at_all(tmp_path):
    path = tmp_path / "new" / "file"
    with atomic_write(path) as temporary:
        temporary.write_text("one")
        assert not path.exists()
    with pytest.raises(RuntimeError), atomic_write(path) as temporary:  # noqa: PT012
        temporary.write_text("two")
        raise RuntimeError
    assert path.read_text() == "one"
    assert [p.name for p in path.parent.iterdir()] == ["file"]


def test_a_directory_appears_whole_or_not_at_all(tmp_path):
    with pytest.raises(RuntimeError), fresh_directory(tmp_path / "out") as temporary:  # noqa: PT012
        (temporary / "part").write_text("x")
        raise RuntimeError
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "out").mkdir()  # an empty one is fine
    with fresh_directory(tmp_path / "out") as temporary:
        (temporary / "part").write_text("x")
    assert [p.name for p in tmp_path.rglob("*")] == ["out", "part"]
    with pytest.raises(CheckpointError, match="exists already"), fresh_directory(tmp_path / "out"):
        pass


def test_a_failed_write_keeps_the_old_file(tmp_path):
    (tmp_path / "report.md").write_text("old")
    with pytest.raises(UnicodeEncodeError):
        write_text(tmp_path / "report.md", "new, but half a pair: \ud800")
    assert [(path.name, path.read_text()) for path in tmp_path.iterdir()] == [("report.md", "old")]
