"""The run directory: what a job may write where, and what it leaves there for people."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from megatron_ext.checkpoint import checksums
from megatron_ext.checkpoint.atomic import write_text
from megatron_ext.checkpoint.huggingface import hf_assets
from megatron_ext.checkpoint.outputs import check_writable, contents, hold_run
from megatron_ext.checkpoint.resume import has_checkpoint
from megatron_ext.errors import ConfigError
from megatron_ext.reports import metrics_file, yaml_text
from megatron_ext.reports.provenance import git_commit, versions

if TYPE_CHECKING:
    from megatron_ext.training.job import RunConfig

CONFIG = "config.yaml"
AFRESH = "another directory; or remove the file: with --load of the same directory, the run writes it anew"
PROGRESS = ("iteration", "num_floating_point_operations_so_far")
"""What Megatron notes among its arguments while it works, and is no flag."""


def check_save(save: Path, job: str, load: Path | None) -> None:
    """Refuse a directory that belongs to something else.

    Raises:
        ConfigError: It holds another kind of job, a checkpoint this run does not continue, or foreign files; or nothing
            can be written there.
    """
    check_writable(save)
    if not save.exists() or not contents(save):
        return
    config = save / CONFIG
    continues = load is not None and load.resolve() == save.resolve()
    if config.is_file():
        owner = _owner(config)
        if owner != job:
            raise ConfigError(f"--save: this directory holds a {owner!r} job", got=save, legal="another directory")
    elif not continues:
        raise ConfigError("--save: this directory is not empty and no run of ours", got=save, legal="a new directory")
    if has_checkpoint(save) and not continues:
        raise ConfigError(
            "--save: this directory holds a run with checkpoints", got=save,
            legal=f"--load {save} to continue it, or another directory",
        )  # fmt: skip


def _owner(config: Path) -> str | None:
    """The job that wrote a `config.yaml`."""
    try:
        content = yaml_text.read(config.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError, OSError) as error:
        reason = str(error).splitlines()[0]
        raise ConfigError(f"--save: the run's {CONFIG} is damaged: {reason}", got=config, legal=AFRESH) from error
    if not isinstance(content, dict):
        raise ConfigError(f"--save: the run's {CONFIG} is damaged: no settings", got=config, legal=AFRESH)
    return content.get("job")


def lock_run_directory(run: "RunConfig") -> None:
    """Let no other job write into the run directory while this one works (rank 0), before anything is started.

    Raises:
        ConfigError: Another job writes there.
    """
    if run.args.save and run.args.rank == 0:
        hold_run(Path(run.args.save), (CONFIG, metrics_file.FILE, checksums.FILE))


def create_run_directory(run: "RunConfig") -> None:
    """Write `config.yaml` and the tokenizer into the run directory (rank 0)."""
    if run.args.save and run.args.rank == 0:
        save = Path(run.args.save)
        save.mkdir(parents=True, exist_ok=True)
        write_text(save / CONFIG, config_yaml(run))
        if run.args.tokenizer_model is not None:
            hf_assets.keep_tokenizer(Path(run.args.tokenizer_model), save)


def config_yaml(run: "RunConfig") -> str:
    """The run as YAML: job, model, versions, the source's commit, and every flag."""
    content: dict[str, Any] = {
        "job": run.job.name,
        "model": run.model_source,
        "family": run.job.family.name,
        "architecture": run.model.to_dict(),
        "versions": versions(),
        "commit": git_commit(),
        "flags": {k: _plain(v) for k, v in sorted(vars(run.args).items()) if k[0] != "_" and k not in PROGRESS},
    }
    if not run.job.family.reads_text:
        from megatron_ext.training.job import task_of

        content["units"] = dict(task_of(run).units)
    return yaml_text.write(content)


def _plain(value: Any) -> Any:
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    # The exact types: signals and other enumerations are integers too.
    return value if value is None or type(value) in (bool, int, float, str) else str(value)
