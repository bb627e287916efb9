"""Models by their name on the Hugging Face hub: fetched once, and then a directory like any other."""

import re
from pathlib import Path

from megatron_ext.errors import ConfigError

_NAME = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*(@[\w./-]+)?")
_FILES = ("*.json", "*.safetensors", "pytorch_model*.bin", "*.txt", "*.model", "*.jinja", "LICENSE*", "README.md")
SECONDS = 5.0
"""To wait for the hub's first answer."""


def directory(given: Path) -> Path:
    """A directory as it is; a name such as `Qwen/Qwen3-0.6B`, or `ORG/NAME@REVISION`, where the hub's cache keeps it.

    Weights that lie in the cache already need no network. What is fetched is never run.

    Raises:
        ConfigError: There is no such directory, and the hub has no such model or does not answer.
    """
    if given.exists() or not _NAME.fullmatch(str(given)):
        return given
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    name, _, revision = str(given).partition("@")
    try:
        found = snapshot_download(
            name, revision=revision or None, allow_patterns=list(_FILES), etag_timeout=SECONDS, ignore_patterns=["*/*"]
        )
    except LocalEntryNotFoundError as error:
        what = "no such directory, and the Hugging Face hub does not answer"
        raise ConfigError(what, got=given, legal="a directory, or a network") from error
    except (HfHubHTTPError, HFValidationError, OSError) as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise ConfigError(f"no such directory, and not on the Hugging Face hub: {reason}", got=given) from error
    return Path(found)
