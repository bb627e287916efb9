from pathlib import Path

import pytest

from megatron_ext.checkpoint.atomic import replacing
from megatron_ext.errors import ConfigError
from megatron_ext.training.directory import CONFIG, check_save


def test_a_rank_that_comes_later_may_find_the_first_one_writing(tmp_path: Path) -> None:
    with replacing(tmp_path / "run" / CONFIG) as temporary:
        temporary.write_text("job: pretrain")
        check_save(tmp_path / "run", "pretrain", None)
    check_save(tmp_path / "run", "pretrain", None)
    with pytest.raises(ConfigError, match="holds a 'pretrain' job"):
        check_save(tmp_path / "run", "prune", None)
