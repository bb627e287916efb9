"""Tasks that are run one after the other have the metrics that the harness finds when it runs them together."""

from pathlib import Path
from typing import Any

import pytest
from lm_eval.api.instance import Instance
from lm_eval.api.model import LM
from lm_eval.evaluator import simple_evaluate
from lm_eval.tasks import TaskManager

from megatron_ext.errors import ConfigError
from megatron_ext.evaluation.tasks import Tasks

pytestmark = pytest.mark.filterwarnings("ignore")
FOLDER = Path(__file__).parents[2] / "tasks"


class Counting(LM):
    """A model that likes an answer by the letters of question and answer."""

    def begin(self, task: str) -> None:
        self.task = task

    def lengths(self) -> dict[str, int]:
        return {"requests": 0, "cut": 0}

    def loglikelihood(self, requests: list[Instance]) -> list[tuple[float, bool]]:
        return [(-float(sum(map(ord, "".join(request.args))) % 97), False) for request in requests]

    def loglikelihood_rolling(self, requests: list[Instance]) -> list[float]:
        return [-float(len(request.args[0])) for request in requests]

    def generate_until(self, requests: list[Instance]) -> list[str]:
        return [request.args[0][-9:] for request in requests]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """The tests' tasks and groups of them, one of which is in the other."""
    for file in (*FOLDER.glob("*.yaml"), *FOLDER.glob("*.py"), *FOLDER.glob("*.jsonl")):
        (tmp_path / file.name).write_text(file.read_text())
    metric = "aggregate_metric_list:\n  - {metric: acc, aggregation: mean, weight_by_size: true}\n"
    (tmp_path / "inner.yaml").write_text("group: inner\ntask: [local_choice]\n" + metric)
    (tmp_path / "outer.yaml").write_text("group: outer\ntask: [inner, local_signal]\n" + metric)
    return tmp_path


@pytest.mark.parametrize("limit", [None, 2])
def test_each_task_and_group_has_its_metrics(folder: Path, limit: int | None) -> None:
    names = ["outer", "local_until"]
    manager = TaskManager(include_path=str(folder), include_defaults=False)
    expected: Any = simple_evaluate(
        Counting(), tasks=names, task_manager=manager, num_fewshot=1, limit=limit, bootstrap_iters=1000
    )
    tasks = Tasks(names, [folder], num_fewshot=1, limit=limit)
    found = {name: metrics for name, metrics, _ in tasks.run(Counting(), tasks.load())}  # type: ignore[arg-type]
    assert set(found) == set(expected["results"]) == {"outer", "inner", "local_choice", "local_signal", "local_until"}
    for name, metrics in expected["results"].items():
        numbers = {key.split(",")[0]: value for key, value in metrics.items() if isinstance(value, float)}
        assert {key: found[name][key] for key in numbers} == pytest.approx(numbers), name
        assert found[name]["num_fewshot"] == expected["n-shot"][name]
    assert list(found)[-2:] in (["outer", "inner"], ["inner", "outer"])  # after their tasks


def test_tasks_that_run_what_a_model_wrote_are_refused(folder: Path) -> None:
    (folder / "unsafe.yaml").write_text((folder / "choice.yaml").read_text().replace("choice\n", "unsafe\n", 1))
    with (folder / "unsafe.yaml").open("a") as file:
        file.write("unsafe_code: true\n")
    with pytest.raises(ConfigError, match=r"(?s)code that the model wrote.*local_unsafe"):
        Tasks(["local_unsafe"], [folder]).load()


def test_settings_of_a_tasks_file_that_are_not_there_are_refused(folder: Path) -> None:
    text = (folder / "until.yaml").read_text().replace("do_sample: false", "do_sample: false, num_beams: 4")
    (folder / "until.yaml").write_text(text)
    with pytest.raises(ConfigError, match=r"(?s)not there.*local_until: num_beams=4"):
        Tasks(["local_until"], [folder]).load()
