import json
import re
from dataclasses import asdict
from html.parser import HTMLParser
from pathlib import Path

import pytest
import torch
from random_models import random_scores

from megatron_ext import cli
from megatron_ext.errors import PlanError
from megatron_ext.models.presets import PRESETS
from megatron_ext.pruning.budget import Targets
from megatron_ext.pruning.plan_page import HEIGHT, KEPT, WIDTH, View, of_directory, page
from megatron_ext.pruning.pruned_family import Loss
from megatron_ext.pruning.select import make_plan

ARCH = PRESETS["tiny-hybrid"].architecture
INFLUENCE = torch.tensor([0.9, 0.1, 0.5, 0.1, 0.8, 0.3])
SCORES = random_scores(ARCH, **{"depth.block_influence.blocks": INFLUENCE})
SCORES.settings.update(depth_metric="block_influence", blocks=True)
PLAN = make_plan(SCORES, ARCH, Targets(num_layers=4, ffn_hidden_size=200, num_attention_heads=4, mamba_head_dim=16))
LOSSES = [Loss("original", 10, 2.0), Loss("pruned", 5, 3.0)]


class Elements(HTMLParser):
    """Every element that is opened, with what is wrong in how they are closed."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.found: list[tuple[str, dict[str, str | None]]] = []
        self.open: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.found.append((tag, dict(attrs)))
        if tag not in ("meta",):
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.found.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


def rows(text: str) -> list[str]:
    """The row of each sub-layer."""
    table = text[text.index('<table class="layers">') :]
    return re.findall(r'<tr class="(?:gone)?">.*?</tr>', table)


def test_every_sub_layer_has_a_row_that_says_what_is_kept_of_it() -> None:
    found = rows(page([View("half", PLAN, SCORES, LOSSES)]))
    assert len(found) == len(ARCH.pattern)
    for i, (kind, row) in enumerate(zip(ARCH.pattern, found, strict=True)):
        assert ('class="gone"' in row) == (i not in PLAN.units)
        if i not in PLAN.units:
            assert "dropped</td>" in row
        elif kind == "-":
            assert f"neurons 200 of {ARCH.ffn_hidden_size}" in row
        elif kind == "*":
            assert f"query heads 4 of {ARCH.num_attention_heads}" in row
        else:
            assert f"head channels 16 of {ARCH.mamba_head_dim}" in row


def test_blocks_scores_stand_beside_each_of_their_sub_layers() -> None:
    shown = [re.search(r"</td><td class=n>([\d.]*)</td>", row) for row in rows(page([View("", PLAN, SCORES)]))]
    blocks = [INFLUENCE[number] for number, block in enumerate(ARCH.layers.blocks) for _ in block]
    assert [float(each[1]) for each in shown if each] == [pytest.approx(float(value), rel=1e-3) for value in blocks]


def test_a_strip_is_as_blue_as_what_is_kept() -> None:
    """Its area above the axis is the score: of 4 positions with equal scores, 3 are kept."""
    scores = random_scores(ARCH)
    scores.values["hidden"] = torch.ones(ARCH.hidden_size)
    plan = make_plan(scores, ARCH, Targets(hidden_size=ARCH.hidden_size * 3 // 4))
    text = page([View("", plan, scores)])
    strip = text[text.index("The residual stream") : text.index("<h2>Sub-layers")]
    drawn = re.findall(r'width="([\d.]+)" height="([\d.]+)" fill="(#\w+)"', strip)
    area = {color: 0.0 for *_, color in drawn}
    for width, height, color in drawn:
        area[color] += float(width) * float(height)
    assert sum(area.values()) == pytest.approx(WIDTH * HEIGHT, rel=0.01)
    assert area[KEPT] == pytest.approx(0.75 * WIDTH * HEIGHT, rel=0.01)


@pytest.mark.parametrize("scores", [SCORES, None])
def test_it_is_one_file_of_sound_html(scores) -> None:
    text = page([View("a <b> & c", PLAN, scores, LOSSES), View("other", PLAN)])
    elements = Elements(text)
    assert elements.open == []
    assert not [tag for tag, _ in elements.found if tag in ("script", "link", "img", "iframe", "b>")]
    assert not any(value and "http" in value for _, attrs in elements.found for value in attrs.values())
    assert sum(tag == "section" for tag, _ in elements.found) == 2
    assert "a &lt;b&gt; &amp; c" in text


def test_the_report_command_puts_plans_side_by_side(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name in ("wide", "deep"):
        (tmp_path / name).mkdir()
        PLAN.save(tmp_path / name / "plan.json")
    (tmp_path / "deep" / "losses.json").write_text(json.dumps([asdict(loss) for loss in LOSSES]))
    runs = [str(tmp_path / name) for name in ("wide", "deep")]
    assert cli.main(["report", *runs, "--out", str(tmp_path / "both.html")]) == 0
    text = (tmp_path / "both.html").read_text()
    assert text.count("<h1>") == 2
    assert text.count("3.0000") == 1
    assert cli.main(["report", runs[0]]) == 0
    assert (tmp_path / "wide" / "report.html").is_file()
    assert cli.main(["report", *runs]) == 2
    assert "legal: --out FILE.html" in capsys.readouterr().err
    assert cli.main(["report", *runs, str(tmp_path), "--out", "x.html"]) == 2
    assert "directories of pruning jobs" in capsys.readouterr().err


def test_damaged_losses_are_told(tmp_path: Path) -> None:
    PLAN.save(tmp_path / "plan.json")
    (tmp_path / "losses.json").write_text('[{"name": "original"}]')
    with pytest.raises(PlanError, match="losses of a pruning job"):
        of_directory(tmp_path)
