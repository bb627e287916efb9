import json
from dataclasses import replace

import pytest
from random_models import random_scores

from megatron_ext.errors import PlanError
from megatron_ext.models.presets import PRESETS
from megatron_ext.pruning.budget import Targets
from megatron_ext.pruning.plan import Plan
from megatron_ext.pruning.select import make_plan

ARCH = PRESETS["tiny-hybrid"].architecture


def test_a_plan_is_saved_and_loaded_exactly(tmp_path):
    plan = make_plan(random_scores(ARCH), ARCH, Targets(params=0.5, num_layers=5))
    plan.save(tmp_path / "plan.json")
    assert Plan.load(tmp_path / "plan.json") == plan
    assert Plan.load(tmp_path / "plan.json").fingerprint == plan.fingerprint
    assert plan.provenance.model == "run"
    assert plan.fingerprint == replace(plan, provenance=replace(plan.provenance, seed=9)).fingerprint
    assert plan.fingerprint != Plan.keep_everything(ARCH).fingerprint


def test_what_is_not_a_plan_is_refused(tmp_path):
    path = tmp_path / "plan.json"
    with pytest.raises(PlanError, match="cannot be read"):
        Plan.load(path)
    for text, message in (("{", "not JSON"), ("[]", "not a plan"), ('{"format": "megatron_ext.plan/1"}', "damaged")):
        path.write_text(text)
        with pytest.raises(PlanError, match=message):
            Plan.load(path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"hidden": [3, 1]}, "ascending"), ({"hidden": [1, 1]}, "ascending"), ({"hidden": [0, 256]}, "out of range"),
        ({"hidden": []}, "nothing is kept"), ({"hidden": [0, 1]}, "does not make the target"),
        ({"query_heads": {"4": [0, 1], "10": [0, 1]}}, "groups keep different numbers"),
        ({"head_channels": {"0": [0, 1]}}, "layers keep different numbers"),
        ({"ffn": {"1": [0, 1]}}, "does not make the target"),
        ({"states": {"0": [0, 1]}}, "equal numbers in the groups"),
        ({"merged_heads": {"4": [[0, 1]]}}, "a query head that stays"), ({"ffn": {"0": [0, 1]}}, "no such axis"),
        ({"units": [0, 1]}, "does not make the target"), ({"hidden": [0, 1.5]}, "hidden: an index is not a whole"),
        ({"hidden": [False, True]}, "not a whole"), ({"ffn": {"1": [0, 512]}}, "ffn of sub-layer 1: an index is out"),
        ({"ffn": {"1": [-1, 5]}}, "out of range"), ({"ffn": {"99": [0]}}, "ffn of sub-layer 99"),
        ({"ffn": {"one": [0]}}, "ffn: a key is not the number of a sub-layer"), ({"ffn": {"01": [0]}}, "'01'"),
        ({"ffn": {"1": 5}}, "ffn of sub-layer 1: not a list"), ({"ffn": [0]}, "ffn: not indices by sub-layer"),
        ({"units": 3}, "units: not a list"), ({"fnn": {}}, "did you mean 'ffn'"),
        ({"merged_heads": {"4": [[0, 1, 2]]}}, "merged_heads of sub-layer 4: not a pair"),
        ({"merged_heads": {"4": [[0, True]]}}, "merged_heads of sub-layer 4: not a pair"),
    ],
)  # fmt: skip
def test_a_plan_edited_by_hand_is_checked(change, message):
    values = json.loads(json.dumps(Plan.keep_everything(ARCH).to_dict()))
    with pytest.raises(PlanError, match=message):
        Plan.from_dict(values | change)


def test_a_key_that_is_there_twice_is_refused(tmp_path):
    """Of which JSON would take the last without a word."""
    path = tmp_path / "plan.json"
    make_plan(random_scores(ARCH), ARCH, Targets(ffn_hidden_size=256)).save(path)
    lines = path.read_text().splitlines()
    (place,) = [i for i, line in enumerate(lines) if line.startswith('    "3": [')]
    lines.insert(place, lines[place])
    path.write_text("\n".join(lines))
    with pytest.raises(PlanError, match="the key '3' twice"):
        Plan.load(path)


def test_a_head_that_takes_in_two_others_is_refused():
    plan = make_plan(random_scores(ARCH), ARCH, Targets(num_attention_heads=6), merge_heads=True)
    layer, ((head, dropped), *rest) = next(iter(plan.merged_heads.items()))
    with pytest.raises(PlanError, match=f"query head {head} takes in two"):
        replace(plan, merged_heads={layer: ((head, dropped), (head, dropped), *rest)})


def test_a_plan_or_scores_of_another_model_are_refused():
    other = replace(ARCH, ffn_hidden_size=640)
    with pytest.raises(PlanError, match="another model") as error:
        Plan.keep_everything(ARCH).check(other)
    assert "ffn_hidden_size=640 instead of 512" in str(error.value)
    Plan.keep_everything(ARCH).check(replace(ARCH, max_position_embeddings=8192))
    with pytest.raises(PlanError, match="another model"):
        make_plan(random_scores(ARCH), other, Targets(params=0.5))
