"""What a case is given: the card, sizes, and what part 1 found wrong."""

from dataclasses import dataclass

import torch

from gpu_parts.device import Device
from gpu_parts.plan import Options


@dataclass(frozen=True)
class Context:
    """The card and the options of the run."""

    device: Device
    options: Options

    @classmethod
    def start(cls, options: Options) -> "Context":
        """Begin to work on the card, in full float32."""
        torch.manual_seed(0)
        torch.set_num_threads(1)
        torch.backends.cuda.matmul.allow_tf32 = False
        torch.backends.cudnn.allow_tf32 = False
        torch.set_grad_enabled(False)
        return cls(Device(options.dry), options)

    @property
    def dry(self) -> bool:
        """Whether this is a dry run."""
        return self.options.dry

    def lengths(self) -> dict[str, int]:
        """The lengths that are timed, by the name that a report knows them by."""
        if self.dry:
            return {"8k": 48, "128k": 80}
        return {"8k": 8192, "32k": 32768, "128k": 131072}
