"""What stands for dropped sub-layers, fitted by Megatron's model, against regressions on what plain formulas see."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from random_models import random_weights
from run_ranks import run_ranks
from torch import Tensor

from megatron_ext.checkpoint.reader import CheckpointReader
from megatron_ext.checkpoint.writer import writing
from megatron_ext.errors import PlanError
from megatron_ext.models.architecture import Architecture
from megatron_ext.models.axes import KeptIndices
from megatron_ext.models.reference import forward
from megatron_ext.pruning.apply import apply
from megatron_ext.pruning.emulation import Emulator
from megatron_ext.pruning.fitting import EmulatedUpdates, Fitting, fit_all, spans
from megatron_ext.pruning.plan import Plan
from megatron_ext.pruning.recovery import Recovery

ARCH = Architecture(
    pattern="*-M*-*-", hidden_size=16, padded_vocab_size=64, max_position_embeddings=32, ffn_hidden_size=24,
    num_attention_heads=4, num_query_groups=2, kv_channels=4, mamba_num_heads=4, mamba_head_dim=4, mamba_state_dim=4,
    mamba_num_groups=2,
)  # fmt: skip
SEQUENCE, SAMPLES, SKIP, RANK = 24, 8, 3, 4
DROPPED = (3, 4, 6)
KEPT = tuple(i for i in range(len(ARCH.pattern)) if i not in DROPPED)
FITTINGS = {
    "clean": (Fitting(RANK, 0.01, "clean"), False),
    "clean, two at a time": (Fitting(RANK, 0.01, "clean", memory=2 * 8 * 2 * 16**2), False),
    "pruned": (Fitting(RANK, 0.01, "pruned", SKIP), False),
    "joint": (Fitting(RANK, 0.01, "pruned"), True),
    "bias": (Fitting(0, 0.0, "clean", SKIP), False),
}


def tokens() -> Tensor:
    return torch.randint(ARCH.padded_vocab_size, (SAMPLES, SEQUENCE), generator=torch.Generator().manual_seed(8))


def loaded(checkpoint: str, save: str, *flags: str) -> Any:
    """A checkpoint's model in this process."""
    from megatron_ext.pruning.job import JOB
    from megatron_ext.training.command_line import parse_command_line

    own = ["--load", checkpoint, "--save", save, "--mock-data", "--tokenizer-type", "NullTokenizer", *flags]
    own += ["--vocab-size", "63", "--seq-length", str(SEQUENCE), "--global-batch-size", "2"]
    run = parse_command_line(JOB, [*own, "--micro-batch-size", "2"])
    from megatron.core.utils import unwrap_model

    from megatron_ext.training.forward import load_model

    (model,) = unwrap_model(load_model(run))
    return model


@torch.no_grad()
def logits(model: Any) -> Tensor:
    positions = torch.arange(SEQUENCE)[None]
    return torch.cat([model(micro, positions, None) for micro in tokens().split(2)])


def fitted(checkpoint: str, save: str) -> dict[str, dict[int, Emulator]]:
    model, found = loaded(checkpoint, save), {}
    for name, (fitting, joint) in FITTINGS.items():
        emulated = spans(DROPPED, joint)
        watched = EmulatedUpdates([model], ARCH, emulated, fitting.skip)
        found[name] = fit_all(watched, emulated, fitting, lambda: logits(model))
        watched.remove()
    return found


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("recovery") / "model"
    with writing(path, ARCH) as writer:
        for key, tensor in random_weights(ARCH).items():
            writer.write(key, tensor.float())
    return path


@pytest.fixture(scope="module")
def found(source: Path) -> dict[str, dict[int, Emulator]]:
    return run_ranks(fitted, 1, str(source), str(source.parent / "unused"))[0]


def recovered(emulators: dict[int, Emulator], name: str, into: Any = "units") -> Plan:
    fitting, joint = FITTINGS[name]
    plan = Plan(source=ARCH, target=replace(ARCH, pattern="".join(ARCH.pattern[i] for i in KEPT)), units=KEPT)
    how = Recovery("low-rank" if fitting.rank else "bias", into, fitting.rank, fitting.ridge, fitting.stream)
    return plan.recovered(spans(DROPPED, joint), how, emulators)


def weights_of(path: Path) -> dict[str, Tensor]:
    reader = CheckpointReader(path)
    return {key: reader.read(key) for key in reader.shapes}


@pytest.mark.parametrize("name", FITTINGS)
def test_they_are_regressions_on_what_the_formulas_see(
    source: Path, found: dict[str, dict[int, Emulator]], tmp_path: Path, name: str
) -> None:
    """On the pruned stream, on that of the model which what is below has been replaced in: numpy, float64."""
    fitting, joint = FITTINGS[name]
    emulated = spans(DROPPED, joint)
    assert found[name].keys() == emulated.keys()
    for first, units in emulated.items():
        arch, weights, offset = ARCH, weights_of(source), 0
        if fitting.stream == "pruned":
            below = {key: span for key, span in emulated.items() if key < first}
            gone = {unit for span in below.values() for unit in span}
            kept = tuple(i for i in range(len(ARCH.pattern)) if i not in gone)
            if below:
                target = replace(ARCH, pattern="".join(ARCH.pattern[i] for i in kept))
                how, own = Recovery("low-rank", "units", RANK), {key: found[name][key] for key in below}
                plan = Plan(source=ARCH, target=target, units=kept).recovered(below, how, own)
                apply(plan, source, tmp_path / f"below-{first}")
                arch, weights = plan.target, weights_of(tmp_path / f"below-{first}")
                offset = [unit for _, unit in plan.places].index(first) - first
        _, seen = forward(arch, weights, tokens())
        before = seen[first + offset]["input"][:, fitting.skip :].flatten(0, 1).numpy()
        after = seen[units[-1] + offset]["output"][:, fitting.skip :].flatten(0, 1).numpy()
        update, emulator = after - before, found[name][first]
        if fitting.rank == 0:
            np.testing.assert_allclose(emulator.bias, update.mean(0), rtol=1e-4, atol=1e-5)
            continue
        x, f = before - before.mean(0), update - update.mean(0)
        s = x.T @ x / len(x)
        s += fitting.ridge * np.sort(s.diagonal())[(len(s) - 1) // 2] * np.eye(len(s))  # torch's median is the lower
        values, vectors = np.linalg.eigh(s)
        inverse = vectors * values**-0.5 @ vectors.T
        u, sizes, v = np.linalg.svd(f.T @ x / len(x) @ inverse)
        best = (u[:, :RANK] * sizes[:RANK]) @ v[:RANK] @ inverse
        assert emulator.up is not None
        assert emulator.down is not None
        np.testing.assert_allclose(emulator.up @ emulator.down, best, rtol=0, atol=2e-4 * np.abs(best).max())
        left = np.square(f - x @ best.T).sum() / np.square(f).sum()
        assert float(emulator.explained[RANK]) == pytest.approx(1 - left, rel=1e-4)


def logits_of(checkpoint: str, save: str, *flags: str) -> Tensor:
    return logits(loaded(checkpoint, save, *flags)).float()


@pytest.mark.parametrize(("name", "pattern"), [("pruned", "*-MLL*L"), ("joint", "*-ML*L"), ("bias", "*-MLL*L")])
def test_what_is_applied_is_what_was_fitted(
    source: Path, found: dict[str, dict[int, Emulator]], tmp_path: Path, name: str, pattern: str
) -> None:
    """The old weights in their new places, and the maps; and Megatron's model of them is the plain formula's."""
    plan = recovered(found[name], name)
    assert plan.target.pattern == pattern
    apply(plan, source, tmp_path / "units")
    old, expected = weights_of(source), {}
    for place, first in enumerate(sorted({*KEPT, *plan.emulated})):
        names = [key for key in old if key.startswith(f"decoder.layers.{first}.") and first in KEPT]
        expected |= {key.replace(f"layers.{first}.", f"layers.{place}."): old[key] for key in names}
        if first not in KEPT:
            parts = vars(found[name][first])
            own = {part: parts[part] for part in ("bias", "down", "up") if parts[part] is not None}
            expected |= {f"decoder.layers.{place}.{part}": tensor for part, tensor in own.items()}
    new = weights_of(tmp_path / "units")
    assert {key: new[key].tolist() for key in expected} == {key: value.tolist() for key, value in expected.items()}
    (got,) = run_ranks(logits_of, 1, str(tmp_path / "units"), str(tmp_path / "unused"))
    torch.testing.assert_close(got.double(), forward(plan.target, new, tokens())[0], rtol=1e-4, atol=1e-4)


TRANSFORMER = replace(ARCH, pattern="*-*-*-")
DROPS = {"two onto one": (2, 3, 5), "onto the embedding": (0, 3)}


def random_biases(dropped: tuple[int, ...]) -> dict[int, Emulator]:
    generator = torch.Generator().manual_seed(5)
    return {unit: Emulator(torch.randn(ARCH.hidden_size, generator=generator)) for unit in dropped}


def folded(source: Path, arch: Architecture, dropped: tuple[int, ...], into: Any) -> tuple[Plan, Path]:
    kept = tuple(i for i in range(len(arch.pattern)) if i not in dropped)
    target = replace(arch, pattern="".join(arch.pattern[i] for i in kept))
    plan = Plan(source=arch, target=target, units=kept)
    plan = plan.recovered(spans(dropped, joint=False), Recovery("bias", into), random_biases(dropped))
    path = source.with_name(f"{source.name}-{into}-{dropped[0]}")
    apply(plan, source, path)
    return plan, path


@pytest.mark.parametrize("biased", [False, True], ids=["new biases", "biases that are there"])
@pytest.mark.parametrize("drop", DROPS)
def test_a_folded_bias_is_a_bias_of_its_own(tmp_path: Path, drop: str, biased: bool) -> None:
    """To rounding; also where several go into one, into the embedding, and into biases that the model has."""
    arch, dropped = replace(TRANSFORMER, add_bias_linear=biased), DROPS[drop]
    with writing(tmp_path / "model", arch) as writer:
        for key, tensor in random_weights(arch).items():
            writer.write(key, tensor.float())
    plans = [folded(tmp_path / "model", arch, dropped, into) for into in ("units", "biases")]
    assert [plan.target.pattern.count("L") for plan, _ in plans] == [len(dropped), 0]
    assert plans[1][0].target.add_bias_linear
    left, right = (run_ranks(logits_of, 1, str(path), str(tmp_path / "unused"))[0] for _, path in plans)
    torch.testing.assert_close(left, right, rtol=1e-5, atol=2e-5)
    # A type of 16 bits rounds each of them otherwise, and both nearly as much.
    (half,) = run_ranks(logits_of, 1, str(plans[0][1]), str(tmp_path / "unused"), "--bf16")
    assert float((half - left).norm() / left.norm()) < 0.03


@pytest.mark.parametrize(
    ("changes", "dropped", "reason"),
    [
        ({"pattern": "*-M*-*-"}, (3,), "2, is Mamba-2, without a bias"),
        ({"untie_embeddings_and_output_weights": False}, (0, 3), "the embedding is the output layer"),
    ],
)
def test_a_bias_without_a_place_is_refused(changes: dict[str, Any], dropped: tuple[int, ...], reason: str) -> None:
    arch = replace(TRANSFORMER, **changes)
    kept = tuple(i for i in range(len(arch.pattern)) if i not in dropped)
    plan = Plan(source=arch, target=replace(arch, pattern="".join(arch.pattern[i] for i in kept)), units=kept)
    with pytest.raises(PlanError, match=reason):
        plan.recovered(spans(dropped, joint=False), Recovery("bias", "biases"))
    assert plan.recovered(spans(dropped, joint=False), Recovery("bias", "units")).target.pattern.count("L")


def test_channels_of_the_stream_go_with_it(source: Path, found: dict[str, dict[int, Emulator]], tmp_path: Path) -> None:
    """A map whose channels are cut is the masked one."""
    plan, hidden = recovered(found["pruned"], "pruned"), tuple(range(0, 16, 2))
    plan = replace(plan, hidden=hidden, target=replace(plan.target, hidden_size=8))
    apply(plan, source, tmp_path / "narrow")
    apply(recovered(found["pruned"], "pruned"), source, tmp_path / "wide")
    got, _ = forward(plan.target, weights_of(tmp_path / "narrow"), tokens())
    wide = recovered(found["pruned"], "pruned").target
    few = dict.fromkeys(range(len(wide.pattern)), KeptIndices(hidden=hidden))
    torch.testing.assert_close(got, forward(wide, weights_of(tmp_path / "wide"), tokens(), kept=few)[0])
