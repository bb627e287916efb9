"""Names of models on the hub: fetched by its own client, told in words where there is none."""

from pathlib import Path

import huggingface_hub
import pytest
from huggingface_hub.errors import LocalEntryNotFoundError, RepositoryNotFoundError

from megatron_ext.conversion import hub
from megatron_ext.errors import ConfigError


def test_directories_and_what_is_no_name_stay_as_they_are(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("org/name").mkdir(parents=True)
    for given in ("org/name", "/models/llama", "models", "a/b/c", "../b"):
        assert hub.directory(Path(given)) == Path(given)


def test_a_name_is_fetched_without_its_code(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = {}

    def fetch(name: str, **how: object) -> str:
        asked.update(how, name=name)
        return str(tmp_path)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", fetch)
    assert hub.directory(Path("Qwen/Qwen3-0.6B@main")) == tmp_path
    assert (asked["name"], asked["revision"]) == ("Qwen/Qwen3-0.6B", "main")
    assert not [pattern for pattern in asked["allow_patterns"] if "py" in pattern and "pytorch" not in pattern]


@pytest.mark.parametrize(
    ("error", "message"),
    [(LocalEntryNotFoundError("offline"), "hub does not answer"), (OSError("no route"), "not on the Hugging Face hub")],
)
def test_a_hub_that_does_not_answer_is_told(error: Exception, message: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(name: str, **how: object) -> str:
        raise error

    monkeypatch.setattr(huggingface_hub, "snapshot_download", fail)
    with pytest.raises(ConfigError, match=message):
        hub.directory(Path("org/name"))
    assert issubclass(RepositoryNotFoundError, OSError)
