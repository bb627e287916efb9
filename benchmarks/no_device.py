"""What Triton is told where there is no GPU: that it compiles for an H100 or H200."""

from triton.backends.compiler import GPUTarget

HOPPER = GPUTarget("cuda", 90, 32)


class NoDevice:
    """Triton's driver as far as a compilation asks it."""

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int | None = None) -> int:
        return 0

    def get_current_target(self) -> GPUTarget:
        return HOPPER
