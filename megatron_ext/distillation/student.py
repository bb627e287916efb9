"""What every distillation wraps: a student that is trained and saved as if it stood alone."""

from typing import Any

from megatron.core.models.hybrid.hybrid_model import HybridModel
from megatron.core.transformer.module import MegatronModule


class StudentWrapper(MegatronModule):
    """One chunk of a student with whatever it learns from beside it.

    To Megatron it is another of its wrappers: the student is `module`, and whatever is asked of the state is answered
    by the student without a prefix, so that its checkpoint is a `HybridModel`'s.

    Args:
        student: A chunk of the student.
    """

    module: HybridModel

    def __init__(self, student: HybridModel) -> None:
        super().__init__(student.config)
        self.module = student
        self.vp_stage, self.pg_collection = student.vp_stage, student.pg_collection

    def set_input_tensor(self, input_tensor: Any) -> None:
        """Take what the previous stage hands on; None on the first."""
        self.module.set_input_tensor(input_tensor)

    def state_dict(self, *args: Any, **kwargs: Any) -> Any:
        """The student's."""
        return self.module.state_dict(*args, **kwargs)

    def state_dict_for_save_checkpoint(self, *args: Any, **kwargs: Any) -> Any:
        """The student's."""
        return self.module.state_dict_for_save_checkpoint(*args, **kwargs)

    def sharded_state_dict(self, *args: Any, **kwargs: Any) -> Any:
        """The student's."""
        return self.module.sharded_state_dict(*args, **kwargs)

    def load_state_dict(self, *args: Any, **kwargs: Any) -> Any:
        """Into the student."""
        return self.module.load_state_dict(*args, **kwargs)
