"""Whose weights scores and plans speak of: the positions that matter in one training step are not those of another."""

from pathlib import Path

from megatron_ext.checkpoint import layout
from megatron_ext.errors import PlanError


def check_weights(what: str, fingerprint: str, iteration: int, step: Path) -> None:
    """Refuse what was made from other weights than those of a step.

    Args:
        what: `scores` or `a plan`, for the message.
        fingerprint: Of the checkpoint it was made from (`layout.fingerprint`); empty for what was written by hand,
            which says nothing of the weights and fits any of the model.
        iteration: Its training step.
        step: The step that is to be cut.

    Raises:
        PlanError: It was made from other weights.
    """
    own = layout.fingerprint(step)
    if fingerprint not in ("", own):
        raise PlanError(
            f"{what} of other weights of this model",
            got=f"made from iteration {iteration}, fingerprint {fingerprint}; {step} has {own}",
            legal='the checkpoint it was made from; a plan with "fingerprint": "" in its provenance fits any',
        )  # fmt: skip
