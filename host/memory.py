"""Memory for a gradient: when blocks are recomputed, and how much memory the host is asked to keep free."""
from __future__ import annotations

import logging
import math
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import Module, ModuleList

log = logging.getLogger("learn_to_steer")
ROOM = {False: 6, True: 2}
"""Memory of a gradient evaluation, as a multiple of what the host reserves for one pass. Key: `recompute`."""
COPIES_TO_KEEP = 256 * 2**20
"""Bytes of weight copies. Up to this size, keeping them until backward is cheaper than recomputing blocks."""


@dataclass
class MemoryPlan:
    """Whether a steered MODEL recomputes its blocks. Decided while the host loads the model for a sampler run.

    asked: the user's save_memory.
    copies: bytes of weight copies that the host makes for each use and that backward would keep; the maximum over all runs.
        The maximum is kept so that a model that did not fit is not tried again: each try moves gigabytes.
    """

    asked: bool
    copies: int = 0

    @property
    def recompute(self) -> bool:
        return self.asked or self.copies > COPIES_TO_KEEP

    @property
    def notes(self) -> tuple[str, ...]:
        if self.asked or not self.recompute:
            return ()
        return (f"save_memory switched itself on: ComfyUI casts or moves {self.copies / 2**30:.1f} GB of this model's weights "
                "for each use (fp8 or quantised weights, another compute precision, or a model larger than the GPU's free "
                "memory), and a gradient would keep all these copies",)

    def prepare_sampling(self, executor, model, noise_shape, conds, *rest, **options):
        """A WrappersMP.PREPARE_SAMPLING wrapper: makes the host keep memory for a gradient free beside the model.

        Weights that do not fit beside the gradient of a whole pass may fit beside the gradient of one block. If the first try
        offloads weights, the host is asked again with the smaller amount.
        """
        def prepare(recompute: bool):
            rows = noise_shape[0] * ROOM[recompute]
            if recompute:
                block = largest_block_of_copies(model.model)
                rows += math.ceil(block / max(1.0, model.model.memory_required([1, *noise_shape[1:]])))
            return executor(model, [rows, *noise_shape[1:]], conds, *rest, **options)

        self.copies = max(self.copies, copies_for_each_use(model.model))
        announced = self.recompute
        prepared = prepare(announced)
        self.copies = max(self.copies, copies_for_each_use(model.model))
        if self.recompute and not announced:
            prepared = prepare(True)
        for note in self.notes:
            log.info(note)
        return prepared


def copies_for_each_use(base_model: Module, part: Module | None = None) -> int:
    """Bytes of the weights in `part` (default: the whole network) that the host casts, moves or patches for each use.

    Autograd saves the operands of a multiplication, so without recomputation all these copies live until backward.
    """
    dtype = base_model.manual_cast_dtype or base_model.get_dtype()
    device = torch.device(base_model.device or "cpu")
    return sum(module.weight.numel() * dtype.itemsize for module in (part or base_model.diffusion_model).modules()
               if _copied_for_each_use(module, dtype, device))


def largest_block_of_copies(base_model: Module) -> int:
    """Largest `copies_for_each_use` of any block, in bytes: the copies that recomputation holds at once."""
    lists = (module for module in base_model.diffusion_model.modules() if isinstance(module, ModuleList))
    return max((copies_for_each_use(base_model, block) for blocks in lists for block in blocks), default=0)


def _copied_for_each_use(module: Module, dtype: torch.dtype, device: torch.device) -> bool:
    weight = getattr(module, "weight", None)
    if not isinstance(weight, Tensor) or not hasattr(module, "comfy_cast_weights"):
        return False
    if module.weight_function or getattr(module, "layout_type", None) is not None:  # patched at use; quantised
        return True
    return module.comfy_cast_weights and (weight.dtype != dtype or weight.device.type != device.type)
