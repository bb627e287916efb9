"""`megatron-ext evaluate`: what transformers would measure, on every layout."""

import json
import math
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from hf_models import make
from workspace import ROOT, Workspace

from megatron_ext.checkpoint.huggingface.convert import to_megatron
from megatron_ext.inference.tokenizer import tokenizer_of

pytestmark = pytest.mark.filterwarnings("ignore")
COMMAND = str(Path(sys.executable).parent / "megatron-ext")
LAYOUTS = {
    "alone": (1, []),
    "tp2": (2, ["--tensor-model-parallel-size", "2", "--sequence-parallel"]),
    "pp2": (2, ["--pipeline-model-parallel-size", "2"]),
    "dp2": (2, []),
}
TEXT = Path(json.__file__).read_text()[:3000]
WINDOW, STRIDE = 48, 20
LONGEST = 8192  # tokens that the model says it can read


@pytest.fixture(scope="module")
def model(workspace: Workspace) -> str:
    """A hybrid with the corpus's tokenizer, as a checkpoint; its original is in `model-hf`."""
    original = workspace.path / "model-hf"
    make("nemotron-h", original, vocab_size=512, max_position_embeddings=LONGEST)
    for file in (workspace.path / "data" / "tokenizer").iterdir():
        shutil.copyfile(file, original / file.name)
    to_megatron(original, workspace.path / "model", vocab_multiple=96)
    (workspace.path / "text.txt").write_text(TEXT)
    (workspace.path / "other.jsonl").write_text(json.dumps({"text": "def f(x):\n    return x\n"}) + "\n")
    return "model"


@torch.no_grad()
def nats_by_transformers(path: Path, text: str) -> float:
    """Window by window, as transformers' own guide to perplexity does it."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model: Any = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(path)
    ids = torch.tensor([[tokenizer.eos_token_id, *tokenizer(text)["input_ids"]]])
    total, before = 0.0, 1
    for end in [*range(WINDOW + 1, ids.shape[1], STRIDE), ids.shape[1]]:
        seen = ids[:, max(0, end - WINDOW - 1) : end]
        logits = model(seen[:, :-1]).logits[0].double()
        labels = seen[0, 1:]
        new = end - before
        total -= float(logits.log_softmax(-1).gather(-1, labels[:, None])[-new:].sum())
        before = end
    return total


def test_perplexity_is_that_of_transformers_on_every_layout(workspace: Workspace, model: str) -> None:
    expected = nats_by_transformers(workspace.path / "model-hf", TEXT)
    flags = ["--text", "text.txt", "other.jsonl", "--window", str(WINDOW), "--stride", str(STRIDE)]
    results = {}
    for name, (ranks, layout) in LAYOUTS.items():
        done = workspace.run(COMMAND, "evaluate", model, *flags, *layout, "--save", f"results-{name}", ranks=ranks)
        results[name] = json.loads((workspace.path / f"results-{name}" / "results.json").read_text())
        found = results[name]["text"]
        assert found["files"]["text.txt"]["nats"] == pytest.approx(expected, rel=1e-6)
        assert found["files"]["text.txt"]["bytes"] == len(TEXT.encode())
        assert f"{found['bits_per_byte']:.4f} bits per byte" in done.stdout
    first = results["alone"]["text"]
    assert first["loss"] == pytest.approx(first["nats"] / first["tokens"])
    assert first["bits_per_byte"] == pytest.approx(first["nats"] / math.log(2) / first["bytes"])
    assert all(found["text"]["nats"] == pytest.approx(first["nats"], rel=1e-6) for found in results.values())


@torch.no_grad()
def test_bfloat16_is_close_to_float32_on_every_layout(workspace: Workspace, model: str) -> None:
    """Losses are; and each token that greedy decoding takes is, in float32 too, as probable as any but for rounding."""
    from transformers import AutoModelForCausalLM

    original: Any = AutoModelForCausalLM.from_pretrained(workspace.path / "model-hf", dtype=torch.float32).eval()
    expected = nats_by_transformers(workspace.path / "model-hf", TEXT)
    prompts = [word for prompt in ("def f(", "import", TEXT[:150], "") for word in ("--prompt", prompt)]
    made = {}
    for name in ("alone", "tp2", "pp2"):
        ranks, layout = LAYOUTS[name]
        bf16 = ["--dtype", "bfloat16", *layout]
        if ranks == 2:
            flags = ["--text", "text.txt", "--window", str(WINDOW), "--stride", str(STRIDE), "--save", f"bf16-{name}"]
            workspace.run(COMMAND, "evaluate", model, *flags, *bf16, ranks=ranks)
            found = json.loads((workspace.path / f"bf16-{name}" / "results.json").read_text())["text"]
            assert found["nats"] == pytest.approx(expected, rel=3e-3)
            assert found["settings"]["dtype"] == "bfloat16"
        flags = [*prompts, "--max-new-tokens", "8", "--output", f"bf16-{name}.jsonl"]
        workspace.run(COMMAND, "generate", model, *flags, *bf16, ranks=ranks)
        made[name] = [json.loads(line) for line in (workspace.path / f"bf16-{name}.jsonl").read_text().splitlines()]
    assert made["pp2"] == made["alone"]  # the same operations on the same numbers
    tokenizer = tokenizer_of(workspace.path / "model", None)
    for row in (row for rows in made.values() for row in rows):
        prompt = tokenizer(row["prompt"])["input_ids"] or [tokenizer.eos_token_id]
        logits = original(torch.tensor([[*prompt, *row["tokens"]]])).logits[0, len(prompt) - 1 : -1]
        taken = logits.gather(-1, torch.tensor(row["tokens"])[:, None])[:, 0]
        assert (logits.amax(-1) - taken).max() < 0.05 * logits.std(), row["prompt"]


TASKS = ["local_choice", "local_rolling", "local_until"]
TASK_FOLDER = ["--task-folder", str(ROOT / "tests" / "tasks")]
TASK_FLAGS = ["--tasks", *TASKS, *TASK_FOLDER, "--window", str(WINDOW)]
TEMPLATE = (
    "{% for m in messages %}<|endoftext|>{{ m.role }}: {{ m.content }}\n{% endfor %}"
    "{% if add_generation_prompt %}assistant: {% endif %}"
)


def by_transformers_in_the_harness(path: Path, length: int = WINDOW, **asked: Any) -> Any:
    """The same tasks with the shortest possible model on the other side of the harness's interface."""
    from lm_eval.api.model import TemplateLM
    from lm_eval.evaluator import simple_evaluate
    from lm_eval.tasks import TaskManager
    from transformers import AutoModelForCausalLM, AutoTokenizer

    class Plain(TemplateLM):
        model: Any = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()
        tokenizer: Any = AutoTokenizer.from_pretrained(path)
        eot_token_id = property(lambda self: self.tokenizer.eos_token_id)
        tokenizer_name = "plain"

        def apply_chat_template(self, chat_history: Any, add_generation_prompt: bool = True) -> str:
            return self.tokenizer.apply_chat_template(
                chat_history, chat_template=TEMPLATE, tokenize=False, add_generation_prompt=add_generation_prompt,
                continue_final_message=not add_generation_prompt,
            )  # fmt: skip

        def tok_encode(self, string: str, add_special_tokens: Any = None, **_: Any) -> list[int]:
            return self.tokenizer(string)["input_ids"]

        @torch.no_grad()
        def _loglikelihood_tokens(self, requests: Any, **_: Any) -> list[tuple[float, bool]]:
            answers = []
            for _, before, after in requests:
                ids = torch.tensor([(before + after)[-length - 1 :]])
                logits = self.model(ids[:, :-1]).logits[0, -len(after) :].double().log_softmax(-1)
                label = torch.tensor(after)
                own = logits.gather(-1, label[:, None]).sum()
                answers.append((float(own), bool((logits.argmax(-1) == label).all())))
            return answers

        def loglikelihood_rolling(self, requests: Any, disable_tqdm: bool = False) -> list[float]:
            texts = [self.tok_encode(request.args[0]) for request in requests]
            assert all(len(text) < length for text in texts)
            return [self._loglikelihood_tokens([(None, [self.eot_token_id], text)])[0][0] for text in texts]

        def generate_until(self, requests: Any, disable_tqdm: bool = False) -> list[str]:
            answers = []
            for request in requests:
                prompt, settings = request.args
                ids = torch.tensor([self.tok_encode(prompt)])[:, -(length - settings["max_gen_toks"]) :]
                made = self.model.generate(
                    ids, attention_mask=torch.ones_like(ids), do_sample=False,
                    max_new_tokens=settings["max_gen_toks"], eos_token_id=self.eot_token_id, pad_token_id=0,
                )  # fmt: skip
                text = self.tokenizer.decode(made[0, ids.shape[1] :], skip_special_tokens=True)
                for stop in settings["until"]:
                    text = text.split(stop)[0]
                answers.append(text)
            return answers

    manager = TaskManager(include_path=str(ROOT / "tests" / "tasks"), include_defaults=False)
    return simple_evaluate(Plain(), tasks=TASKS, task_manager=manager, num_fewshot=2, bootstrap_iters=1000, **asked)


def numbers(found: Any) -> dict[str, dict[str, float]]:
    """The metrics that the harness found."""
    return {
        task: {name.split(",")[0]: value for name, value in metrics.items() if isinstance(value, float)}
        for task, metrics in found["results"].items()
    }


def test_the_harness_finds_on_every_layout_what_it_finds_in_transformers(workspace: Workspace, model: str) -> None:
    expected = numbers(by_transformers_in_the_harness(workspace.path / "model-hf"))
    assert set(expected) == set(TASKS)
    assert {"acc", "acc_stderr", "acc_norm"} <= set(expected["local_choice"])
    for name, (ranks, layout) in LAYOUTS.items():
        flags = [*TASK_FLAGS, "--num-fewshot", "2", "--save", f"tasks-{name}", *layout]
        done = workspace.run(COMMAND, "evaluate", model, *flags, ranks=ranks)
        # Some are longer than the window with their examples: that is said, and kept.
        assert done.stderr.count("local_choice: 14 of 24 requests are longer than the window of 48 tokens") == 1
        found = json.loads((workspace.path / f"tasks-{name}" / "results.json").read_text())["tasks"]
        for task, metrics in expected.items():
            assert found[task]["samples"] == 6
            assert (found[task]["num_fewshot"], found[task]["settings"]["window"]) == (2, WINDOW)
            for metric, value in metrics.items():
                assert found[task][metric] == pytest.approx(value, rel=1e-5), (task, metric)
        assert (found["local_choice"]["cut"], found["local_choice"]["requests"]) == (14, 24)


def test_a_conversation_is_what_the_harness_makes_of_it(workspace: Workspace, model: str) -> None:
    """With a system message, examples as turns, settings of generation and every sample, as `lm_eval` itself asks."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder = workspace.path / "chat-tokenizer"
    shutil.copytree(workspace.path / "data" / "tokenizer", folder)
    config = json.loads((folder / "tokenizer_config.json").read_text())
    (folder / "tokenizer_config.json").write_text(json.dumps({**config, "chat_template": TEMPLATE}))
    asked = {"system_instruction": "Write Python.", "gen_kwargs": {"max_gen_toks": 5}}
    for multiturn in (True, False):
        expected = by_transformers_in_the_harness(
            workspace.path / "model-hf", 512, apply_chat_template=True, fewshot_as_multiturn=multiturn, **asked
        )
        flags = ["--tasks", *TASKS, *TASK_FOLDER, "--window", "512", "--num-fewshot", "2", "--save", "chat"]
        flags += ["--chat", "--system", "Write Python.", "--gen-kwargs", "max_gen_toks=5", "--log-samples"]
        flags += ["--tokenizer", "chat-tokenizer", *([] if multiturn else ["--no-fewshot-as-multiturn"])]
        done = workspace.run(COMMAND, "evaluate", model, *flags)
        assert "warning" not in done.stderr
        results = json.loads((workspace.path / "chat" / "results.json").read_text())
        for task, metrics in numbers(expected).items():
            found = results["tasks"][task]
            assert {name: found[name] for name in metrics} == pytest.approx(metrics, rel=1e-5), task
            lines = (workspace.path / "chat" / found["samples_file"]).read_text().splitlines()
            for line, sample in zip(map(json.loads, lines), expected["samples"][task], strict=True):
                assert (line["id"], line["prompt"]) == (sample["doc_id"], sample["arguments"][0][0])
                assert line["target"] == sample["target"]
                if task == "local_until":
                    assert line["outputs"] == sample["resps"]
                assert len(line["requests"]) == len(sample["arguments"])
    assert set(results["earlier"]) == {f"tasks/{task}" for task in TASKS}  # of one turn and of several
    # One question alone, which transformers continues from the template's own tokens.
    flags = ["--chat", "--system", "Be brief.", "--prompt", "import", "--max-new-tokens", "5", "--output", "chat.jsonl"]
    workspace.run(COMMAND, "generate", model, "--tokenizer", "chat-tokenizer", *flags)
    messages = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "import"}]
    tokenizer: Any = AutoTokenizer.from_pretrained(folder)
    ids = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    original: Any = AutoModelForCausalLM.from_pretrained(workspace.path / "model-hf", dtype=torch.float32)
    new = original.generate(**ids, max_new_tokens=5, do_sample=False)[0, ids["input_ids"].shape[1] :].tolist()
    assert json.loads((workspace.path / "chat.jsonl").read_text())["tokens"] == new
    assert len(list((workspace.path / "chat" / "samples").iterdir())) == 2 * len(TASKS)


def test_what_was_measured_before_a_signal_is_kept(workspace: Workspace, model: str) -> None:
    """The second task sends the last rank a SIGTERM while its questions are made."""
    flags = ["--tasks", "local_choice", "local_signal", "local_until", *TASK_FOLDER, "--num-fewshot", "2"]
    flags += ["--text", "text.txt", "--save", "evaluation stopped"]
    for ranks in (1, 2):
        done = workspace.run(COMMAND, "evaluate", model, *flags, ranks=ranks, ok=False)
        assert done.returncode == 143
        assert "SIGTERM: not everything was measured; wrote" in done.stdout
        assert "Traceback" not in done.stderr
        found = json.loads((workspace.path / "evaluation stopped" / "results.json").read_text())
        assert {"local_choice"} <= set(found["tasks"]) <= {"local_choice", "local_signal"}
        assert found["text"]["files"]["text.txt"]["bytes"] == len(TEXT.encode())
        # No window was asked for: tasks are read at the model's own length, texts at no more than is useful.
        assert found["tasks"]["local_choice"]["settings"]["window"] == LONGEST
        assert found["text"]["size"] == 4096


def test_an_interrupted_evaluation_goes_on_where_it_stopped(workspace: Workspace, model: str) -> None:
    flags = [*TASK_FLAGS, "--save", "resumed"]
    workspace.run(COMMAND, "evaluate", model, *flags)
    folder = workspace.path / "resumed"
    answers = folder / "answers.jsonl"
    lines = answers.read_bytes().splitlines(keepends=True)
    assert len(lines) == 6 * 4 + 6 + 6
    results = json.loads((folder / "results.json").read_text())
    answers.write_bytes(b"".join(lines[:20]) + lines[20][:7])  # it was killed while it wrote
    done = workspace.run(COMMAND, "evaluate", model, *flags, "--tensor-model-parallel-size", "2", ranks=2)
    assert "20 answers were there already" in done.stdout
    assert sorted(line[:40] for line in answers.read_bytes().splitlines()) == sorted(line[:40] for line in lines)
    again = json.loads((folder / "results.json").read_text())
    for task, metrics in results["tasks"].items():
        expected = {name: value for name, value in metrics.items() if isinstance(value, float)}
        assert {name: again["tasks"][task][name] for name in expected} == pytest.approx(expected, rel=1e-5)
    # Answers of another model, or in another type, are none.
    done = workspace.run(COMMAND, "evaluate", model, *flags, "--dtype", "bfloat16", "--limit", "1")
    assert "already" not in done.stdout


def test_synthetic_suites_come_out_the_same_on_every_layout_and_are_drawn(workspace: Workspace, model: str) -> None:
    names = ["phonebook", "induction"]
    flags = ["--synthetic", *names, "--synthetic-samples", "3", "--save"]
    found = {}
    for name in ("alone", "dp2"):
        ranks, layout = LAYOUTS[name]
        done = workspace.run(
            COMMAND, "evaluate", model, *flags, f"synthetic-{name}", "--synthetic-lengths", "256", "300", *layout,
            ranks=ranks,
        )  # fmt: skip
        found[name] = json.loads((workspace.path / f"synthetic-{name}" / "results.json").read_text())["synthetic"]
        assert "accuracy" in done.stdout
    assert found["alone"] == found["dp2"]
    assert list(found["alone"]) == names
    assert {length for cells in found["alone"].values() for length in cells} == {"256", "300"}
    assert found["alone"]["induction"]["256"]["samples"] == 3
    # More lengths join those that are there.
    more = ["synthetic-alone", "--synthetic-lengths", "400"]
    workspace.run(COMMAND, "evaluate", model, *flags, *more, draws=True)
    folder = workspace.path / "synthetic-alone"
    again = json.loads((folder / "results.json").read_text())["synthetic"]
    assert list(again["phonebook"]) == ["256", "300", "400"]
    assert (folder / "synthetic.png").stat().st_size > 8000


def test_speed_is_measured_and_runs_are_compared(workspace: Workspace, model: str, teacher: str) -> None:
    flags = ["--speed", "32", "16", "--batch-size", "3"]
    workspace.run(COMMAND, "evaluate", model, *flags, "--save", "speed-alone")
    workspace.run(
        COMMAND, "evaluate", model, *flags, "--save", "speed-pp2", "--pipeline-model-parallel-size", "2", ranks=2
    )  # fmt: skip
    for name, batch, ranks in (("speed-alone", 3, 1), ("speed-pp2", 4, 2)):
        found = json.loads((workspace.path / name / "results.json").read_text())["speed"]
        assert list(found) == ["16", "32"]
        for cell in found.values():
            assert (cell["batch_size"], cell["ranks"]) == (batch, ranks)
            assert min(cell["prefill_tokens_per_second"], cell["decode_tokens_per_second"]) > 0
    done = workspace.run(COMMAND, "compare", "speed-alone", "speed-pp2", teacher, "--out", "compared", draws=True)
    assert "decode at 32, tokens/s" in done.stdout
    page = (workspace.path / "compared" / "comparison.md").read_text()
    assert "| | speed-alone | speed-pp2 | teacher |" in page
    assert "| `M-*-M` | `M-*-M` | `M-*-M-` |" in page
    assert (workspace.path / "compared" / "comparison.png").stat().st_size > 20_000


def test_results_lie_beside_the_checkpoint_and_earlier_ones_are_kept(workspace: Workspace, model: str) -> None:
    own = workspace.path / model / "results.json"
    for words in (["--window", "32"], ["--window", "16", "--dtype", "bfloat16"]):
        workspace.run(COMMAND, "evaluate", model, "--text", "other.jsonl", *words)
    found = json.loads(own.read_text())
    assert found["text"]["size"] == 16
    assert found["checkpoint"]["path"] == str(workspace.path / model)
    own.write_text(json.dumps(found | {"val_loss": 1.0, "checkpoint": found["checkpoint"] | {"fingerprint": "older"}}))
    workspace.run(COMMAND, "evaluate", model, "--text", "other.jsonl")
    assert "val_loss" not in json.loads(own.read_text())
    assert json.loads((own.parent / "results-release.json").read_text())["val_loss"] == 1.0


def test_an_earlier_step_can_be_measured(workspace: Workspace, teacher: str) -> None:
    losses = {}
    for step in ("iter_0000002", "iter_0000004"):
        flags = ["--text", "text.txt", "--window", "32", "--save", f"step-{step}"]
        workspace.run(COMMAND, "evaluate", f"{teacher}/{step}", *flags)
        found = json.loads((workspace.path / f"step-{step}" / "results.json").read_text())
        assert found["checkpoint"]["step"] == step
        losses[step] = found["text"]["loss"]
    assert losses["iter_0000004"] < losses["iter_0000002"] - 0.01


def test_tasks_that_cannot_be_loaded_are_named(workspace: Workspace, model: str) -> None:
    folder = workspace.path / "broken-tasks"
    folder.mkdir()
    (folder / "broken.yaml").write_text("task: broken\ndataset_path: nowhere/at/all\noutput_type: multiple_choice\n")
    flags = ["--tasks", "broken", "--task-folder", str(folder), "--save", "broken"]
    done = workspace.run(COMMAND, "evaluate", model, *flags, ok=False)
    assert "cannot load the tasks" in done.stderr
    assert "Traceback" not in done.stderr
    assert not (workspace.path / "broken").exists()


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ([], "nothing to measure"),
        (["--text", "nowhere.txt"], "cannot be read"),
        (["--text", "text.txt", "--window", "8", "--stride", "9"], "stride"),
        (["--text", "text.txt", "--save", "data"], "holds no results"),
        (["--text", "text.txt", "--save", "/proc/results"], "nothing can be written"),
        (["--text", "text.txt", "--window", "0"], "--window"),
        (["--text", "text.txt", "--limit", "3"], "--limit is for tasks"),
        (["--tasks", "local_choice", *TASK_FOLDER, "--limit", "0"], "--limit"),
        (["--tasks", "local_choice", *TASK_FOLDER, "--chat"], "no chat template"),
        (["--tasks", "local_choice", *TASK_FOLDER, "--system", "x"], "with --chat"),
        (["--tasks", "local_choice", *TASK_FOLDER, "--gen-kwargs", "top_p=0.9"], "none of the tasks generates"),
        (["--tasks", "local_until", *TASK_FOLDER, "--gen-kwargs", "num_beams=4"], "not there"),
        (["--text", "text.txt", "--batch-tokens", "0"], "--batch-tokens"),
        (["--tasks", "local_choice", "--task-folder", "nowhere"], "no such folder"),
        (["--synthetic", "needel"], "no such synthetic suite"),
        (["--synthetic", "phonebook", "--synthetic-lengths", "20"], "no question so short"),
        (["--text", "text.txt", "--pipeline-model-parallel-size", "2"], "world size"),
    ],
)
def test_wrong_requests_end_at_once(workspace: Workspace, model: str, flags: list[str], message: str) -> None:
    done = workspace.run(COMMAND, "evaluate", model, *flags, ok=False)
    assert message in done.stderr
    assert "Traceback" not in done.stderr
