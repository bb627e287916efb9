"""The recipes in examples/: every script parses, and runs as far as a machine without GPUs and SLURM can tell."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SCRIPTS = sorted(path for path in (ROOT / "examples").rglob("*") if path.suffix in (".sh", ".sbatch"))
EXAMPLES = ROOT / "examples"
RECIPES = sorted(f"{path.parts[-3]}/{path.stem}" for path in EXAMPLES.glob("*/recipes/*.flags"))
PRETRAIN = "pretrain/mamba2-hybrid-8b"
SETTINGS = ("DATA", "DATA_PATH", "TOKENIZER", "SAVE", "SHOW", "RANK", "WORLD_SIZE", "NNODES", "CONTAINER_IMAGE")
PYTHON = """#!/usr/bin/env bash
# In python's place: notes rank, command line and parent, and saves step $STEP.
echo "rank ${RANK:-none} of ${WORLD_SIZE:-none}: $*" >> "$NOTES"
echo $PPID > "$NOTES.parent"
mkdir -p "$SAVE"
[ -z "${STEP:-}" ] || echo "$STEP" > "$SAVE/latest_checkpointed_iteration.txt"
exit "${STATUS:-0}"
"""
SRUN = """#!/usr/bin/env bash
# Two tasks on one node, after srun's own options.
echo "srun $*" >> "$NOTES"
while [ "$1" != bash ]; do shift; done
for task in 0 1; do
    SLURM_PROCID=$task SLURM_LOCALID=$task SLURM_NTASKS=2 SLURM_NNODES=1 "$@" || exit
done
"""
SCONTROL = """#!/usr/bin/env bash
if [ "$1" = show ]; then printf 'node1\\nnode2\\n'; else echo "scontrol $*" >> "$NOTES"; fi
"""


@pytest.fixture
def start(tmp_path):
    """Run a script with stand-ins for python and SLURM; the process, and the stand-ins' notes."""
    for name, text in (("python", PYTHON), ("srun", SRUN), ("scontrol", SCONTROL)):
        path = tmp_path / "bin" / name
        path.parent.mkdir(exist_ok=True)
        path.write_text(text)
        path.chmod(0o755)
    notes = tmp_path / "notes"
    notes.touch()

    def run(script: str, *words: str, **settings: str) -> tuple[subprocess.CompletedProcess[str], list[str]]:
        environment = {key: value for key, value in os.environ.items() if key not in SETTINGS} | {
            "PATH": f"{tmp_path / 'bin'}:{os.environ['PATH']}",
            "PYTHON": str(tmp_path / "bin" / "python"),
            "NOTES": str(notes),
            "SAVE": str(tmp_path / "run"),
            "SLURM_SUBMIT_DIR": str(ROOT),
            "SLURM_JOB_ID": "41",
            "SLURM_JOB_NODELIST": "node[1-2]",
        }
        command = ["bash", str(EXAMPLES / script), *words]
        done = subprocess.run(
            command, env=environment | settings, cwd=tmp_path, capture_output=True, text=True, check=False
        )
        return done, notes.read_text().splitlines()

    return run


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_every_script_is_bash_and_may_be_run(script):
    assert script.read_text().startswith("#!/usr/bin/env bash\n")
    assert os.access(script, os.X_OK)
    done = subprocess.run(["bash", "-n", str(script)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_there_is_one_runner_and_each_folder_explains_its_recipes():
    assert [path.name for path in SCRIPTS] == ["compress.sbatch", "job.sbatch", "rank.sh", "run.sh"]
    assert {recipe.split("/")[0] for recipe in RECIPES} == {"distill", "long_context", "pretrain", "prune"}
    for recipe in RECIPES:
        folder, name = recipe.split("/")
        assert f"`{name}`" in (EXAMPLES / folder / "README.md").read_text()
    for folder in EXAMPLES.iterdir():
        assert not folder.is_dir() or f"({folder.name}/README.md)" in (EXAMPLES / "README.md").read_text()


@pytest.mark.parametrize("recipe", RECIPES)
def test_a_recipe_is_a_program_and_its_flags(start, recipe):
    """A path with a space is one word, and what is missing has a name."""
    named = {"LOAD": "/some one", "MODEL": "/some one", "TEACHER": "/some one", "STUDENT": "/s", "DATA": "/d"}
    done, notes = start("run.sh", recipe, "--lr", "1", SHOW="1", **named)
    words = done.stdout.splitlines()
    assert (ROOT / words[0]).is_file()
    assert words[-2:] == ["--lr", "1"]
    assert not any(word.startswith("/some") and word != "/some one" for word in words)
    assert notes == []
    if recipe.split("/")[0] != "pretrain":
        done, _ = start("run.sh", recipe, DATA="/d", SHOW="1")
        assert done.returncode != 0
        assert "the checkpoint" in done.stderr or "the trained checkpoint" in done.stderr


@pytest.mark.parametrize("words", [[], ["prune"], ["prune/minitron-9b"]])
def test_what_is_no_recipe_is_answered_with_those_there_are(start, words):
    done, notes = start("run.sh", *words)
    assert done.returncode == 2
    assert f"legal: {' '.join(RECIPES)}\n" in done.stderr
    assert notes == []


def test_the_dry_run_builds_the_published_model_on_any_machine(start, tmp_path):
    done, _ = start("run.sh", PRETRAIN, "--dry-run", PYTHON=sys.executable, NNODES="8", MEGATRON_EXT_DEVICE="cpu")
    assert done.returncode == 0, done.stderr
    text = " ".join(done.stdout.split())
    assert "8,654,517,248 (8.65B)" in text
    assert "64 ranks = tensor 4 x pipeline 1 x context 1 x data 16" in text
    assert "1024 x 4096 = 4,194,304 tokens a step" in text
    assert not (tmp_path / "run").exists()


def test_without_data_it_says_what_is_missing(start):
    done, notes = start("run.sh", PRETRAIN)
    assert done.returncode == 2
    assert "error: DATA is not set" in done.stderr
    assert notes == []


def test_one_node_is_a_torchrun_of_the_same_flags(start, tmp_path):
    one = {"DATA": "/data", "GPUS_PER_NODE": "4"}
    done, notes = start("run.sh", PRETRAIN, **one)
    assert done.returncode == 0, done.stderr
    program = "pretrain_hybrid.py --save"
    assert notes[0].startswith(f"rank none of none: -m megatron_ext torchrun --nproc-per-node 4 --standalone {program}")
    done, (_, note) = start("run.sh", PRETRAIN, **one, NNODES="2", NODE_RANK="1", MASTER_ADDR="node1")
    assert done.returncode == 0, done.stderr
    assert note.startswith(
        "rank none of none: -m megatron_ext torchrun --nproc-per-node 4 --nnodes 2 --node-rank 1 --master-addr node1 "
        f"--master-port 29500 {program}"
    )
    assert "--data-path /data/text_document " in note
    assert f"--save {tmp_path / 'run'} --load {tmp_path / 'run'} " in note
    assert "--tokenizer-model /data/tokenizer" in note
    assert "--sequence-parallel" in note
    assert "--dry-run" not in note


def test_kernels_compile_in_the_environment_of_an_example(tmp_path):
    python = tmp_path / "python"
    python.write_text(f"#!/usr/bin/env bash\nexec {sys.executable} {ROOT}/tests/support/triton_compile_one.py\n")
    python.chmod(0o755)
    named = dict.fromkeys(("DATA", "SAVE"), str(tmp_path / "some"))
    environment = {key: value for key, value in os.environ.items() if not key.startswith("TRITON_")}
    environment |= named | {"PYTHON": str(python), "TMPDIR": str(tmp_path), "HOME": str(tmp_path / "home")}
    command = ["bash", str(EXAMPLES / "run.sh"), PRETRAIN]
    for _ in range(2):  # the second time from the cache
        done = subprocess.run(command, env=environment, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr[-2000:]
        assert int(done.stdout) > 0
    assert list(tmp_path.glob("triton-cache-*/*/*.ptx")), "on the node, not in a home that all nodes share"
    assert not (tmp_path / "home").exists()


def test_a_blend_and_more_flags_are_passed_on(start):
    command = {"DATA_PATH": "0.7 /a/text_document 0.3 /b/text_document", "TOKENIZER": "/t", "TENSOR_PARALLEL": "1"}
    done, (note,) = start("run.sh", PRETRAIN, "--more", **command)
    assert done.returncode == 0, done.stderr
    assert "--data-path 0.7 /a/text_document 0.3 /b/text_document --split" in note
    assert "--tokenizer-model /t " in note
    assert note.endswith(" --more")
    assert "--sequence-parallel" not in note


@pytest.mark.parametrize(("step", "again"), [("7", True), ("", True), ("10", False)])
def test_a_job_goes_back_into_the_queue_until_its_last_step_is_saved(start, step, again):
    done, notes = start("job.sbatch", PRETRAIN, DATA="/data", TRAIN_ITERS="10", STEP=step)
    assert done.returncode == 0, done.stderr
    ranks = [note for note in notes if note.startswith("rank")]
    assert [note.split(":")[0] for note in ranks] == ["rank 0 of 2", "rank 1 of 2"]
    assert all(note.split(": ")[1].startswith("pretrain_hybrid.py --save ") for note in ranks)
    assert all("--train-iters 10 " in note for note in ranks)
    assert ("scontrol requeue 41" in notes) == again


def test_a_job_that_is_told_to_stop_before_its_first_step_goes_back_too(start):
    done, notes = start("job.sbatch", PRETRAIN, DATA="/data", TRAIN_ITERS="10", STATUS="143")
    assert done.returncode == 0, done.stderr
    assert "scontrol requeue 41" in notes


def test_a_job_that_fails_ends(start):
    done, notes = start("job.sbatch", PRETRAIN, DATA="/data", STATUS="2")
    assert done.returncode == 2
    assert not any("requeue" in note for note in notes)


@pytest.mark.parametrize("status", ["0", "143"])
def test_a_cut_ends_as_it_ends(start, status):
    """It has no steps to go on from."""
    done, notes = start("job.sbatch", "prune/minitron-4b", DATA="/data", LOAD="/l", STATUS=status)
    assert done.returncode == int(status)
    assert [note.split(":")[0] for note in notes if note.startswith("rank")]
    assert not any("requeue" in note for note in notes)


def test_a_job_can_run_in_a_container(start, tmp_path):
    given = {"DATA": "/data", "TRAIN_ITERS": "1", "STEP": "1", "CONTAINER_IMAGE": "registry#image"}
    done, notes = start("job.sbatch", PRETRAIN, **given)
    assert done.returncode == 0, done.stderr
    mounts = f"{ROOT}:{ROOT},{tmp_path}:{tmp_path},/data:/data"
    assert f"--container-image registry#image --container-workdir {ROOT} --container-mounts {mounts} bash" in notes[0]


@pytest.mark.parametrize("recipe", ["distill/mn-minitron-8b", "prune/minitron-8b"])
def test_the_runner_becomes_a_launcher_that_lets_ranks_save(start, tmp_path, recipe):
    """Nothing may stand between a signal and our torchrun, which waits for ranks, or under SLURM the rank itself."""
    settings = dict.fromkeys(("DATA", "TEACHER", "STUDENT", "LOAD"), "/some")
    for rank in ({}, {"RANK": "3", "WORLD_SIZE": "8"}):
        done, notes = start("run.sh", recipe, **settings, **rank)
        assert done.returncode == 0, done.stderr
        launcher = (
            "rank 3 of 8: " if rank else "rank none of none: -m megatron_ext torchrun --nproc-per-node 8 --standalone "
        )
        assert notes[-1].startswith(launcher)
        assert int((tmp_path / "notes.parent").read_text()) == os.getpid()  # each shell has become the next one
    assert "#SBATCH --signal=TERM@" in (EXAMPLES / "job.sbatch").read_text()  # to every rank, not to the batch step


@pytest.mark.parametrize(("status", "again"), [("0", False), ("2", False), ("143", True)])
def test_a_compression_that_is_told_to_stop_goes_back_into_the_queue(start, status, again):
    done, notes = start("compress.sbatch", "model", "--to", "0.5", STATUS=status, SLURM_NTASKS="16")
    assert done.returncode == (0 if again else int(status))
    assert ("scontrol requeue 41" in notes) == again
    launcher = f"--launcher srun --kill-on-bad-exit=1 {ROOT}/examples/rank.sh"
    assert notes[0] == f"rank none of none: -m megatron_ext compress model --to 0.5 --processes 16 {launcher}"


def test_a_task_of_srun_is_a_rank(start):
    task = {"SLURM_PROCID": "9", "SLURM_LOCALID": "1", "SLURM_NTASKS": "16", "SLURM_NNODES": "2"}
    done, notes = start("rank.sh", "pretrain", "--preset", "tiny-hybrid", **task)
    assert done.returncode == 0, done.stderr
    assert notes == ["rank 9 of 16: -m megatron_ext pretrain --preset tiny-hybrid"]


@pytest.mark.parametrize("missing", ["DATA", "SAVE"])
def test_a_job_names_the_setting_it_lacks(start, missing):
    done, notes = start("job.sbatch", PRETRAIN, **({"DATA": "/data"} | {missing: ""}))
    assert done.returncode != 0
    assert missing in done.stderr
    assert notes == []
