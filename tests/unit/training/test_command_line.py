"""A wrong command line ends at once, with one readable error, and nothing is written. Right ones are dry runs here."""

import os
import subprocess
import sys
from pathlib import Path

import fork_server
import pytest

SCRIPT = Path(__file__).parents[3] / "pretrain_hybrid.py"
ENVIRONMENT = {key: value for key, value in os.environ.items() if key not in ("RANK", "WORLD_SIZE")} | {
    "MEGATRON_EXT_DEVICE": "cpu",
    "OMP_NUM_THREADS": "1",
}
OK = ["--preset", "tiny-hybrid", "--micro-batch-size", "1", "--seq-length", "64", "--train-iters", "2", "--lr", "1e-3"]
MOCK = ["--mock-data", "--tokenizer-type", "NullTokenizer", "--vocab-size", "4096"]


@pytest.fixture
def run(tmp_path):
    """Run pretrain_hybrid.py in the empty directory tmp_path/work: status, standard output, standard error."""
    work = tmp_path / "work"
    work.mkdir()

    def start(*flags: str, **environment: str) -> tuple[int, str, str]:
        done = fork_server.run([SCRIPT, *flags], cwd=work, environment=environment)
        return done.returncode, done.stdout, done.stderr

    return start


def contents(directory: Path) -> dict[str, str]:
    return {str(p.relative_to(directory)): p.read_text() for p in sorted(directory.rglob("*")) if p.is_file()}


def check_refusal(status: int, err: str, *messages: str) -> None:
    assert status == 2, err
    assert "Traceback" not in err
    assert err.count("error: ") == 1, err
    assert len(err[err.index("error: ") :].splitlines()) < 12
    for message in messages:
        assert message in err


@pytest.mark.parametrize(
    ("flags", "messages"),
    [
        (["--preset", "tiny-hibrid"], ["unknown preset 'tiny-hibrid'", "did you mean 'tiny-hybrid'?", "mamba2-8b"]),
        (["--hybrid-layer-pattern", "MXM"], ["unknown letter 'X' at position 1", "got:   MXM", "'M' Mamba-2"]),
        (["--hybrid-layer-pattern", "-m"], ["unknown letter 'm'", "did you mean 'M'?"]),
        (["--micro-batch-size", "1"], ["no model given", "--preset NAME"]),
        (["--preset", "runs/nowhere"], ["the checkpoint directory does not exist", "got:   runs/nowhere"]),
        (
            [*OK, *MOCK, "--tensor-model-parallel-size", "3"],
            ["num_query_groups=2 does not divide by tensor parallel size=3", "legal: tensor parallel 1, 2;"],
        ),
        ([*OK, *MOCK, "--pipeline-model-parallel-size", "13"], ["12 sub-layers cannot be split", "1 to 12"]),
        ([*OK, *MOCK, "--micro-batch-size", "2", "--global-batch-size", "3"], ["Megatron refuses", "3", "2"]),
        (
            [*OK, *MOCK, "--ckpt-format", "torch"],
            ["read by no command", "got:   --ckpt-format torch", "legal: torch_dist"],
        ),
        ([*OK, "--mock-data", "--tokenizer-type", "NullTokenizer"], ["knows no tokens", "legal: --vocab-size N"]),
        (
            [*OK, "--mock-data"],
            ["no tokenizer given", "legal: --tokenizer-type HuggingFaceTokenizer --tokenizer-model"],
        ),
        (
            [
                *MOCK,
                "--hybrid-layer-pattern=*-",
                "--hidden-size",
                "64",
                "--num-attention-heads",
                "4",
                "--lr",
                "1e-3",
                "--train-iters",
                "1",
                "--max-position-embeddings",
                "64",
                "--seq-length",
                "64",
            ],
            ["--position-embedding-type: learned positions are not supported", "legal: none, rope"],
        ),
        ([*OK, *MOCK, "--seq-length", "0"], ["--seq-length: no such value", "got:   0", "legal: a whole number of at"]),
        ([*OK[:-2], *MOCK], ["no learning rate given", "legal: --lr 3e-4"]),
        ([*OK, *MOCK, "--lr", "inf"], ["--lr: no such value", "got:   inf", "legal: a finite number of at least 0"]),
        ([*OK, *MOCK, "--wandb-project", "x"], ["wandb is not installed", "got:   --wandb-project x", "pip install"]),
        ([*OK, *MOCK, "--num-layers", "3"], ["--num-layers is not the pattern's", "legal: 12"]),
        (
            [*OK, *MOCK, "--cross-entropy-loss-fusion"],
            ["rounds the gradient of every logit to bfloat16", "without --bf16"],
        ),
        ([*OK, *MOCK, "--sft"], ["--sft would have no effect"]),
        ([*OK, *MOCK, "--use-mup"], ["--use-mup changes what the model computes"]),
        (
            [*OK, *MOCK, "--bf16", "--fp16"],
            ["--bf16 must not be given, where --fp16 is given", "got:   --bf16, --fp16"],
        ),
        ([*OK, *MOCK, "--qqqqqq", "1"], ["no flag is like it"]),
        ([*OK, *MOCK, "--load", "nowhere"], ["the checkpoint directory does not exist", "got:   nowhere"]),
        (
            [*OK, "--split", "90,10,0", "--data-path", "corpus/text_document"],
            ["--data-path: no such data", "corpus/text_document.idx, corpus/text_document.bin", "megatron-ext data"],
        ),
    ],
    ids=lambda value: " ".join(value)[-40:] if value and value[0].startswith("--") else "",
)
def test_a_wrong_command_line_is_refused(run, tmp_path, flags, messages):
    status, out, err = run(*flags, "--save", "run")
    check_refusal(status, err, *messages)
    assert out == ""
    assert list((tmp_path / "work").iterdir()) == [], "something was written"


def test_a_missing_tokenizer_is_not_looked_for_elsewhere(run, tmp_path):
    corpus = tmp_path / "work" / "corpus"
    corpus.mkdir()
    for ending in ("idx", "bin"):
        (corpus / f"text_document.{ending}").write_text("")
    data = ["--split", "90,10,0", "--data-path", "corpus/text_document"]
    tokenizer = ["--tokenizer-type", "HuggingFaceTokenizer", "--tokenizer-model", "corpus/tokenizer"]
    status, _, err = run(*OK, *data, *tokenizer, "--save", "run")
    check_refusal(status, err, "--tokenizer-model: no such tokenizer", "got:   corpus/tokenizer")
    assert set(contents(tmp_path / "work")) == {"corpus/text_document.idx", "corpus/text_document.bin"}


def test_the_program_itself_answers_so_without_torchrun_on_every_rank():
    """Once as a real process; another rank than the first says which one it is."""
    real = subprocess.run(
        [sys.executable, str(SCRIPT), "--preset", "tiny"], capture_output=True, text=True, timeout=60, check=False,
        env=ENVIRONMENT | {"RANK": "0", "WORLD_SIZE": "2"},
    )  # fmt: skip
    other = fork_server.run([SCRIPT, "--preset", "tiny"], environment={"RANK": "1", "WORLD_SIZE": "2"})
    assert (real.returncode, other.returncode) == (2, 2)
    assert real.stderr.startswith("error: unknown preset 'tiny'")
    assert other.stderr.startswith("error (rank 1): unknown preset 'tiny'")


@pytest.mark.parametrize(
    ("files", "flags", "messages"),
    [
        ({"config.yaml": "job: prune\n"}, [], ["holds a 'prune' job", "legal: another directory"]),
        ({"config.yaml": "job: [pre"}, [], ["config.yaml is damaged", "another directory"]),
        ({"config.yaml": "train"}, ["--load", "run"], ["config.yaml is damaged", "remove the file"]),
        ({"thesis.tex": "years of work"}, [], ["not empty and no run of ours", "legal: a new directory"]),
        (
            {"config.yaml": "job: pretrain\n", "latest_checkpointed_iteration.txt": "4"},
            [],
            ["holds a run with checkpoints", "--load run to continue it"],
        ),
        (
            {"config.yaml": "job: pretrain\n", "latest_checkpointed_iteration.txt": "4"},
            ["--load", "run"],
            ["no complete checkpoint", "has no steps"],
        ),
    ],
    ids=["another job", "no YAML", "no settings", "foreign files", "a run with checkpoints", "a run without a step"],
)
def test_a_directory_in_use_is_left_alone(run, tmp_path, files, flags, messages):
    directory = tmp_path / "work" / "run"
    directory.mkdir()
    for name, text in files.items():
        (directory / name).write_text(text)
    status, _, err = run(*OK, *MOCK, "--save", "run", *flags)
    check_refusal(status, err, *messages)
    assert contents(tmp_path / "work") == {f"run/{name}": text for name, text in files.items()}


def test_a_dry_run_prints_model_parameters_memory_and_layout(run, tmp_path):
    status, out, err = run(
        *OK, *MOCK, "--dry-run", "--save", "run", "--tensor-model-parallel-size", "2", "--global-batch-size", "8",
        "--pipeline-model-parallel-size", "2", WORLD_SIZE="16",
    )  # fmt: skip
    assert status == 0, err
    text = " ".join(out.split())
    assert "tiny-hybrid " in text
    assert "M-M-*-|M-M-*-" in text
    assert "hidden 256, FFN 512, vocabulary 4,096, 8 heads in 2 groups" in text
    assert "(0.01B)" in text
    assert "16 ranks = tensor 2 x pipeline 2 x context 1 x data 4" in text
    assert "8 x 64 = 512 tokens a step, micro-batch 1, 2 steps, 1,024 tokens" in text
    assert "GiB: weights" in text
    assert list((tmp_path / "work").iterdir()) == []
    status, out, err = run(*OK, *MOCK, "--dry-run", "--global-batch-size", "2", WORLD_SIZE="2", RANK="1")
    assert status == 0, err
    assert out == "", "the first rank has said it"


def test_an_explicit_flag_wins_over_the_preset(run):
    status, out, err = run(*OK, *MOCK, "--dry-run", "--hidden-size", "128", "--ffn-hidden-size=96")
    assert status == 0, err
    assert "hidden 128, FFN 96" in out


@pytest.mark.parametrize("tp", ["1", "2"])
def test_the_model_does_not_depend_on_the_layout(run, tp):
    """Megatron pads the vocabulary to a multiple of divisor x TP: 300 is 384 at any TP here."""
    flags = ["--mock-data", "--tokenizer-type", "NullTokenizer", "--vocab-size", "300"]
    status, out, err = run(*OK, *flags, "--dry-run", "--tensor-model-parallel-size", tp)
    assert status == 0, err
    assert "vocabulary 384" in out


def test_state_space_backend(run) -> None:
    """Chosen by a flag, said once; what cannot run here is refused with what would."""
    assert "state-space kernels: naive" in run(*OK, *MOCK, "--dry-run", "--ext-ssm-backend", "naive")[2]
    refused = {
        "trition": "did you mean 'triton'",
        "mamba_ssm": "mamba_ssm not installed, causal_conv1d not installed",
        "triton": "need a CUDA device",
    }
    for name, said in refused.items():
        status, _, error = run(*OK, *MOCK, "--dry-run", f"--ext-ssm-backend={name}", TRITON_INTERPRET="0")
        assert (status, said in error) == (2, True), error
