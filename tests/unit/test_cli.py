import json
import subprocess
import sys
from importlib.metadata import version
from types import SimpleNamespace

import pytest

from megatron_ext import cli
from megatron_ext.errors import ConfigError
from megatron_ext.models import presets_table
from megatron_ext.models.presets import PRESETS

HEAVY = ("torch", "megatron", "transformers", "matplotlib", "numpy", "rich")
ROW = {"params": 10, "non_embedding_params": 5, "val_loss": 2.0, "tokens": 100, "seconds": 1.0,
       "tokens_per_second": 100.0, "pattern": "M-"}  # fmt: skip


def looking(run):
    """A subcommand that runs this."""

    class Look(cli.Command):
        def load(self):
            return SimpleNamespace(main=run, add_arguments=lambda parser: None)

    return Look("look up", "")


def test_help_answers_without_importing_anything_heavy():
    code = (
        "import sys; from megatron_ext import cli\n"
        "try: cli.main(['--help'])\nexcept SystemExit as end: assert end.code == 0\n"
        f"print('imported:', [name for name in {HEAVY} if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.endswith("imported: []\n")
    for name, command in cli.COMMANDS.items():
        assert name in done.stdout
        assert command.summary[:20] in done.stdout


def test_flags_of_commands_are_known_without_torch() -> None:
    code = "import argparse, sys; from megatron_ext import cli\n"
    code += "for name, command in cli.COMMANDS.items():\n"
    code += "    for each in [*command.actions.values(), *([command] if command.flags != 'job' else [])]:\n"
    code += "        each.add_arguments(argparse.ArgumentParser())\n"
    code += "print('imported:', [name for name in ('torch', 'megatron', 'transformers') if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.endswith("imported: []\n")


def test_what_the_programs_load_first_imports_no_megatron():
    """The platform is installed in `parse_command_line`, before anything of Megatron is imported."""
    code = "import sys; from megatron_ext.training import dry_run, forward, loop\n"
    code += "from megatron_ext.conversion import verify\nfrom megatron_ext.distillation import job\n"
    code += "from megatron_ext.distillation.logit_cache import write\nfrom megatron_ext.inference import session\n"
    code += "from megatron_ext.pretraining import job\nfrom megatron_ext.training import validation\n"
    code += "from megatron_ext.pruning import job\n"
    code += "print('imported:', [name for name in ('megatron.core', 'megatron.training') if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.endswith("imported: []\n")


def test_the_version_names_what_results_depend_on():
    code = (
        "import sys; from megatron_ext import cli\n"
        "try: cli.main(['--version'])\nexcept SystemExit as end: assert end.code == 0\n"
        f"print('imported:', [name for name in {HEAVY} if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    ours, others = version("megatron-ext"), f"megatron-core {version('megatron-core')}, torch {version('torch')}"
    assert done.stdout.startswith(f"megatron-ext {ours} ({others}, Python 3.12")
    assert done.stdout.endswith("imported: []\n")


@pytest.mark.parametrize("name", list(cli.COMMANDS))
def test_every_subcommand_explains_itself(name, capsys):
    try:
        status = cli.main([name, "--help"])
    except SystemExit as end:  # argparse's
        status = end.code
    assert status == 0
    assert f"usage: megatron-ext {name}" in capsys.readouterr().out


def test_only_the_chosen_subcommand_is_loaded(monkeypatch):
    others = {name: cli.Command(c.summary, "no.such.module") for name, c in cli.COMMANDS.items() if name != "presets"}
    monkeypatch.setattr(cli, "COMMANDS", others | {"presets": cli.COMMANDS["presets"]})
    assert cli.main(["presets", "--json"]) == 0


@pytest.mark.parametrize("words", [[], ["prestes"], ["presets", "extra"], ["data"], ["data", "--max-bytes", "0"]])
def test_a_wrong_command_line_ends_with_status_2(words, capsys):
    with pytest.raises(SystemExit) as end:
        cli.main(words)
    assert end.value.code == 2
    assert "usage: megatron-ext" in capsys.readouterr().err


def test_the_command_that_was_meant_is_named(capsys):
    with pytest.raises(SystemExit) as end:
        cli.main(["evalute", "runs/tiny"])
    assert end.value.code == 2
    assert "no such command: did you mean 'evaluate'? one of demo, data" in capsys.readouterr().err


def test_a_users_mistake_is_one_message_and_status_2(monkeypatch, capsys):
    def fail(args):
        raise ConfigError("the sky is green", got="green", legal="blue")

    monkeypatch.setattr(cli, "COMMANDS", {"look": looking(fail)})
    assert cli.main(["look"]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err == "error: the sky is green\n  got:   green\n  legal: blue\n"


def test_a_fault_of_ours_is_not_hidden(monkeypatch):
    def fail(args):
        raise KeyError("ours")

    monkeypatch.setattr(cli, "COMMANDS", {"look": looking(fail)})
    with pytest.raises(KeyError):
        cli.main(["look"])


def test_presets_shows_counted_beside_published(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "40")  # a narrow terminal must not cut numbers
    assert cli.main(["presets"]) == 0
    out = capsys.readouterr().out
    lines = {line.split()[0]: line for line in out.splitlines() if line.split()}
    assert set(PRESETS) < set(lines)
    assert lines["mamba2-hybrid-8b"].split()[1:] == ["M-M-M--...", "(56)", "4,096", "8.65B", "8.65B", "1"]
    assert lines["llama3.1-minitron-4b-width"].split()[1:4] == ["32", "x", "*-"]
    assert "4.51B (3.72B) 4.5B (3.7B)" in lines["llama3.1-minitron-4b-width"]
    assert "\n1 An Empirical Study of Mamba-based Language Models, arXiv 2406.07887" in out
    assert all(len(line) <= 80 for line in lines.values() if line.split()[0] in PRESETS)


def test_presets_as_json_is_complete(capsys):
    assert cli.main(["presets", "--json"]) == 0
    values = json.loads(capsys.readouterr().out)
    assert list(values) == list(PRESETS)
    hybrid = values["mamba2-hybrid-8b"]
    assert hybrid["architecture"]["pattern"] == PRESETS["mamba2-hybrid-8b"].architecture.pattern
    assert hybrid["published"] == "8.65B"
    assert round(hybrid["parameters"] / 1e9, 2) == 8.65
    assert hybrid["parameters"] - hybrid["non_embedding_parameters"] == 2 * 256_000 * 4096


@pytest.mark.parametrize(
    ("pattern", "shown"),
    [
        ("M" * 56, "56 x M"),
        ("*-" * 16, "16 x *-"),
        ("M-*-M-", "M-*-M-"),
        ("M-*-" * 3 + "M", "M-*-M-*-M-*-M"),
        ("M*-M--M*M-M*-MM-", "M*-M--M... (16)"),
        ("M", "M"),
    ],
)
def test_patterns_are_shortened_without_lying(pattern, shown):
    assert presets_table._abbreviated(pattern) == shown


def test_report_draws_a_demo_and_a_training_run_again(tmp_path, capsys):
    (tmp_path / "report.json").write_text(json.dumps(dict.fromkeys(("teacher", "pruned", "distilled", "scratch"), ROW)))
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "loss": 3.0}\n{"step": 2, "loss": 2.0}\n')
    assert cli.main(["report", str(tmp_path)]) == 0
    assert "wrote" in capsys.readouterr().out
    assert "| teacher | 10 | 5 | 2.000 |" in (tmp_path / "report.md").read_text()
    for name in ("report.png", "metrics.png"):
        assert (tmp_path / name).read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({}, "nothing to report on"),
        ({"report.json": "{"}, "not JSON"),
        ({"report.json": "[]"}, "not an object"),
        ({"report.json": "{}"}, "lacks measurements"),
        ({"metrics.jsonl": ""}, "no step was logged"),
    ],
)
def test_report_refuses_what_is_not_a_run(tmp_path, capsys, content, message):
    for name, text in content.items():
        (tmp_path / name).write_text(text)
    assert cli.main(["report", str(tmp_path)]) == 2
    err = capsys.readouterr().err
    assert err.startswith("error: ")
    assert message in err
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(content)


def test_report_names_a_missing_directory(tmp_path, capsys):
    assert cli.main(["report", str(tmp_path / "nowhere")]) == 2
    assert "no such run directory" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "meant"),
    [
        (["generate", "somewhere", "--promt", "hi"], "'--prompt'"),
        (["generate", "somewhere", "--prompt", "hi", "--temprature=1"], "'--temperature'"),
        (["evaluate", "somewhere", "--task", "mmlu"], "'--tasks'"),
        (
            ["estimate", "--gpus", "8", "--preset", "tiny-hybrid", "--dollar-per-gpu-hour", "2"],
            "'--dollars-per-gpu-hour'",
        ),
    ],
)
def test_a_mistyped_flag_of_a_command_that_takes_megatrons_too_is_told(words, meant, capsys):
    assert cli.main(words) == 2
    assert capsys.readouterr().err.startswith("error: unknown flag\n  got:   --")
    assert cli.main(words) == 2
    assert f"did you mean {meant}?" in capsys.readouterr().err


def test_megatrons_flags_are_not_taken_for_mistyped_ones(capsys):
    assert cli.main(["evaluate", "somewhere", "--seed", "1"]) == 2
    assert capsys.readouterr().err.startswith("error: nothing to measure"), "--seed is not a mistyped --speed"


def test_a_mistyped_flag_of_the_others_is_told(capsys):
    with pytest.raises(SystemExit):
        cli.main(["presets", "--jsn"])
    assert "did you mean --json?" in capsys.readouterr().err
