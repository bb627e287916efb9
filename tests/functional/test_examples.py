"""The recipes in examples/: every script parses, and runs as far as a machine without GPUs and SLURM can tell."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SCRIPTS = sorted(path for path in (ROOT / "examples").rglob("*") if path.suffix in (".sh", ".sbatch"))
RECIPE = ROOT / "examples" / "pretrain_hybrid_8b"
SETTINGS = ("DATA", "DATA_PATH", "TOKENIZER", "SAVE", "DRY_RUN", "RANK", "WORLD_SIZE", "NNODES", "CONTAINER_IMAGE")
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

    def run(script: str, *arguments: str, **settings: str) -> tuple[subprocess.CompletedProcess[str], list[str]]:
        environment = {key: value for key, value in os.environ.items() if key not in SETTINGS} | {
            "PATH": f"{tmp_path / 'bin'}:{os.environ['PATH']}",
            "PYTHON": str(tmp_path / "bin" / "python"),
            "NOTES": str(notes),
            "SAVE": str(tmp_path / "run"),
            "SLURM_SUBMIT_DIR": str(ROOT),
            "SLURM_JOB_ID": "41",
            "SLURM_JOB_NODELIST": "node[1-2]",
        }
        command = ["bash", str(RECIPE / script), *arguments]
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


def test_there_are_scripts_and_each_recipe_explains_itself():
    assert len(SCRIPTS) >= 3
    for script in SCRIPTS:
        assert (script.parent / "README.md").is_file()


def test_the_dry_run_builds_the_published_model_on_any_machine(start, tmp_path):
    done, _ = start("run.sh", DRY_RUN="1", PYTHON=sys.executable, NNODES="8", MEGATRON_EXT_DEVICE="cpu")
    assert done.returncode == 0, done.stderr
    text = " ".join(done.stdout.split())
    assert "8,654,517,248 (8.65B)" in text
    assert "64 ranks = tensor 4 x pipeline 1 x context 1 x data 16" in text
    assert "1024 x 4096 = 4,194,304 tokens a step" in text
    assert not (tmp_path / "run").exists()


def test_without_data_it_says_what_is_missing(start):
    done, notes = start("run.sh")
    assert done.returncode == 2
    assert "error: DATA is not set" in done.stderr
    assert notes == []


def test_one_node_is_a_torchrun_of_the_same_flags(start, tmp_path):
    done, (note,) = start("run.sh", DATA="/data", NNODES="2", NODE_RANK="1", MASTER_ADDR="node1", GPUS_PER_NODE="4")
    assert done.returncode == 0, done.stderr
    assert note.startswith(
        "rank none of none: -m megatron_ext torchrun --nproc-per-node 4 --nnodes 2 --node-rank 1 --master-addr node1 "
        "--master-port 29500 pretrain_hybrid.py --preset mamba2-hybrid-8b --data-path /data/text_document "
    )
    assert f"--save {tmp_path / 'run'} --load {tmp_path / 'run'} " in note
    assert "--tokenizer-model /data/tokenizer" in note
    assert "--sequence-parallel" in note
    assert "--dry-run" not in note


STARTING = [path for path in SCRIPTS if "PYTHON" in path.read_text()]


@pytest.mark.parametrize("script", STARTING, ids=lambda path: path.parent.name)
def test_kernels_compile_in_the_environment_of_an_example(script, tmp_path):
    python = tmp_path / "python"
    python.write_text(f"#!/usr/bin/env bash\nexec {sys.executable} {ROOT}/tests/support/triton_compile_one.py\n")
    python.chmod(0o755)
    named = dict.fromkeys(("DATA", "SAVE", "LOAD", "MODEL", "TEACHER", "STUDENT"), str(tmp_path / "some"))
    environment = {key: value for key, value in os.environ.items() if not key.startswith("TRITON_")}
    environment |= named | {"PYTHON": str(python), "TMPDIR": str(tmp_path), "HOME": str(tmp_path / "home")}
    recipe = [path.stem for path in sorted(script.parent.glob("recipes/*.flags"))][:1]
    for _ in range(2):  # the second time from the cache
        done = subprocess.run(["bash", str(script), *recipe], env=environment, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr[-2000:]
        assert int(done.stdout) > 0
    assert list(tmp_path.glob("triton-cache-*/*/*.ptx")), "on the node, not in a home that all nodes share"
    assert not (tmp_path / "home").exists()


def test_every_example_that_starts_processes_is_among_them():
    """None of the above can pass by finding no script."""
    assert {path.parent.name for path in STARTING} == {
        "distill", "long_context", "pretrain_hybrid_8b", "prune",
    }  # fmt: skip


def test_a_blend_and_more_flags_are_passed_on(start):
    command = {"DATA_PATH": "0.7 /a/text_document 0.3 /b/text_document", "TOKENIZER": "/t", "TENSOR_PARALLEL": "1"}
    done, (note,) = start("run.sh", **command)
    assert done.returncode == 0, done.stderr
    assert "--data-path 0.7 /a/text_document 0.3 /b/text_document --split" in note
    assert "--tokenizer-model /t " in note
    assert "--sequence-parallel" not in note


@pytest.mark.parametrize(("step", "again"), [("7", True), ("", True), ("10", False)])
def test_a_job_goes_back_into_the_queue_until_its_last_step_is_saved(start, step, again):
    done, notes = start("job.sbatch", DATA="/data", TRAIN_ITERS="10", STEP=step)
    assert done.returncode == 0, done.stderr
    ranks = [note for note in notes if note.startswith("rank")]
    assert [note.split(":")[0] for note in ranks] == ["rank 0 of 2", "rank 1 of 2"]
    assert all(note.split(": ")[1].startswith("pretrain_hybrid.py --preset mamba2-hybrid-8b ") for note in ranks)
    assert all("--train-iters 10 " in note for note in ranks)
    assert ("scontrol requeue 41" in notes) == again


def test_a_job_that_is_told_to_stop_before_its_first_step_goes_back_too(start):
    done, notes = start("job.sbatch", DATA="/data", TRAIN_ITERS="10", STATUS="143")
    assert done.returncode == 0, done.stderr
    assert "scontrol requeue 41" in notes


def test_a_job_that_fails_ends(start):
    done, notes = start("job.sbatch", DATA="/data", STATUS="2")
    assert done.returncode == 2
    assert not any("requeue" in note for note in notes)


def test_a_job_can_run_in_a_container(start, tmp_path):
    done, notes = start("job.sbatch", DATA="/data", TRAIN_ITERS="1", STEP="1", CONTAINER_IMAGE="registry#image")
    assert done.returncode == 0, done.stderr
    save = tmp_path / "run"
    mounts = f"/data:/data,{save}:{save},{ROOT}:{ROOT}"
    assert f"--container-image registry#image --container-workdir {ROOT} --container-mounts {mounts} bash" in notes[0]


@pytest.mark.parametrize(("example", "recipe"), [("distill", "mn-minitron-8b"), ("prune", "minitron-8b")])
def test_the_batch_step_becomes_a_launcher_that_lets_ranks_save(start, tmp_path, example, recipe):
    """SLURM signals the batch step (`B:`), so nothing may stand between it and our torchrun, which waits for ranks."""
    script = ROOT / "examples" / example / "job.sbatch"
    settings = dict.fromkeys(("DATA", "TEACHER", "STUDENT", "LOAD"), "/some")
    done, (note,) = start(str(script), recipe, **settings)
    assert done.returncode == 0, done.stderr
    assert note.startswith("rank none of none: -m megatron_ext torchrun --standalone --nproc-per-node 8 ")
    assert int((tmp_path / "notes.parent").read_text()) == os.getpid()  # each shell has become the next one
    assert example == "prune" or "#SBATCH --signal=B:TERM@" in script.read_text()


@pytest.mark.parametrize("missing", ["DATA", "SAVE"])
def test_a_job_names_the_setting_it_lacks(start, missing):
    done, notes = start("job.sbatch", **({"DATA": "/data"} | {missing: ""}))
    assert done.returncode != 0
    assert f"{missing}: " in done.stderr
    assert notes == []
