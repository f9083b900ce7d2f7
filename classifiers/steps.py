"""Maps the progress of a run, with any scheduler and number of steps, to a step index that the classifier was trained at."""
from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .base import ClassifierError

# Trained step indices by length of the schedule (docs/method.md, "The classifier").
PAPER_TIMESTEPS = {50: (5, 10, 15, 20, 25, 49), 4: (1, 3)}
# Progress is float32 (step / steps): 0.1 * 50 must count as 5, not as slightly more.
_ROUNDING = 1e-3


class StepMapping:
    """Maps progress to the smallest trained step index at or after it, or to the last one.

    timesteps: trained step indices of a schedule of `num_timesteps` steps. With the paper's indices and 50 steps, steps 0 to 5
        map to 5, steps 6 to 10 to 10, and so on.
    Raises ClassifierError where an index lies outside of the schedule.
    """

    def __init__(self, timesteps: Sequence[int], num_timesteps: int) -> None:
        self.timesteps = tuple(sorted({int(step) for step in timesteps}))
        self.num_timesteps = int(num_timesteps)
        if not self.timesteps or self.timesteps[0] < 0 or self.timesteps[-1] >= self.num_timesteps:
            raise ClassifierError(f"Classifier steps: the trained step indices {str(list(timesteps))[:100]} do not lie within a "
                                  f"schedule of {num_timesteps} steps (0 to {self.num_timesteps - 1}). The "
                                  "classifier's training settings are damaged; get or train the file again.")

    def index(self, progress: Tensor) -> Tensor:
        """progress [B] in [0, 1) -> trained step indices [B], int64, on the same device."""
        trained = torch.tensor(self.timesteps, device=progress.device)
        wanted = progress.float() * self.num_timesteps - _ROUNDING  # Apple's GPUs have no float64
        position = torch.searchsorted(trained.float(), wanted.contiguous())
        return trained[position.clamp(max=len(self.timesteps) - 1)]
