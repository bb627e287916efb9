"""What a student is trained to match, and for how much each part counts."""

from dataclasses import dataclass

from megatron_ext.errors import ConfigError
from megatron_ext.lm_head import divergences


@dataclass(frozen=True)
class Objective:
    """`kd_weight * T^2 * divergence(teacher / T, student / T) + ce_weight * cross entropy with the data`.

    T^2 keeps the gradient's scale whatever T is: Hinton et al., "Distilling the Knowledge in a Neural Network" (arXiv
    1503.02531, section 2). `mse` and `cosine` compare logits and know no temperature.

    Attributes:
        divergence: One of `divergences.names()`.
        temperature: T.
        kd_weight: Weight of the divergence.
        ce_weight: Weight of the cross entropy with the next token.
        beta: Of `jsd`: 0.5 is the symmetric one, towards 0 it resembles forward KL, towards 1 reverse KL.
        k: Of `top-k` and `top-k-rest`: how many of the teacher's entries count one by one.
    """

    divergence: str = "forward-kl"
    temperature: float = 1.0
    kd_weight: float = 1.0
    ce_weight: float = 0.0
    beta: float = 0.5
    k: int = 100

    @property
    def sparse(self) -> bool:
        """Whether only the teacher's likeliest entries count."""
        return self.divergence in divergences.SPARSE

    @property
    def of_logits(self) -> bool:
        """Whether logits are compared, and no distributions."""
        return self.divergence in divergences.LOGITS

    def check(self, vocab_size: int) -> None:
        """Find what is wrong.

        Args:
            vocab_size: Entries of the tokenizer, without padding.

        Raises:
            ConfigError: A value is illegal.
        """
        if self.divergence not in divergences.names():
            raise ConfigError("unknown divergence", got=self.divergence, legal=", ".join(divergences.names()))
        if not self.temperature > 0:
            raise ConfigError("--distill-temperature must be positive", got=self.temperature)
        if self.of_logits and self.temperature != 1:
            raise ConfigError(f"{self.divergence} compares logits and knows no temperature", got=self.temperature)
        if self.divergence == "jsd" and not 0 < self.beta < 1:
            raise ConfigError("--distill-jsd-beta must lie between 0 and 1", got=self.beta)
        if self.sparse and not 1 <= self.k <= vocab_size:
            raise ConfigError("--distill-top-k must be a number of tokens", got=self.k, legal=f"1 to {vocab_size:,}")
