"""The steering settings as node inputs, shared by the steering nodes."""
from __future__ import annotations

from comfy import supported_models
from comfy_api.latest import io

from ..steering.settings import PAPER_STEP_SIZE, RELATIONS_PER_UPDATE, UPDATE_RULES, SteeringSettings
from .types import check_numbers

DEFAULTS = SteeringSettings()
OWN, PAPER = METHODS = ("settings of this node", "as in the paper")


def settings_inputs() -> list[io.Input]:
    return [
        io.Float.Input("start_percent", default=DEFAULTS.start, min=0.0, max=1.0, step=0.01,
                       tooltip="Where steering begins, as a fraction of the whole denoising schedule. img2img at denoise 0.6 "
                               "begins at 0.4."),
        io.Float.Input("end_percent", default=DEFAULTS.end, min=0.0, max=1.0, step=0.01,
                       tooltip="Where steering ends, as a fraction of the whole denoising schedule. Layout is decided early: the "
                               "first half is enough."),
        io.Float.Input("step_size", default=DEFAULTS.step_size, min=0.0, max=100.0, step=0.05,
                       tooltip="Length of an update: in percent of the latent's norm (normalised), or the factor on the gradient "
                               "(raw gradient). 0 switches steering off."),
        io.Int.Input("max_updates", default=DEFAULTS.max_updates, min=0, max=100,
                     tooltip="Updates per denoising step, at most. 0 switches steering off."),
        io.Float.Input("stop_probability", default=DEFAULTS.stop_probability, min=0.0, max=1.0, step=0.0001,
                       tooltip="Updates of a denoising step end once the classifier gives every relation this probability and, "
                               "unless compactness is 0, each object's attention lies in one place."),
        io.Combo.Input("update_rule", options=list(UPDATE_RULES), default=DEFAULTS.update_rule, advanced=True,
                       tooltip="normalised: every update has the same length. raw gradient: an update is step_size times the "
                               "gradient, as in the paper."),
        io.Combo.Input("relations_per_update", options=list(RELATIONS_PER_UPDATE), default=DEFAULTS.relations_per_update,
                       advanced=True,
                       tooltip="all: an update follows the weighted mean of all relations. one: the relations take turns, as in "
                               "the paper. Each denoising step then begins with the first relation and ends once the relation "
                               "whose turn it is has reached its target. Set max_updates to at least the number of relations."),
        io.Boolean.Input("save_memory", default=DEFAULTS.recompute, advanced=True,
                         tooltip="Recomputes each block for the gradient instead of keeping its activations: far less memory, "
                                 "about 1.5 times the time, the same gradient."),
        io.Float.Input("compactness", default=DEFAULTS.compactness, min=0.0, max=100.0, step=0.5, advanced=True, optional=True,
                       tooltip="Keeps each object in one place, so that steering does not draw it twice. Updates continue until "
                               "its attention is compact. 0: the classifier's loss alone, as in the paper, and fewer updates."),
        io.Combo.Input("method", options=list(METHODS), default=OWN, optional=True,
                       tooltip="as in the paper: for the classifiers published with it. The settings above then count only where "
                               "they switch steering off; save_memory always counts. The paper: raw gradient, step size 5 "
                               "(Stable Diffusion 1.x: 7.5), up to 16 updates, one relation at a time, loss targets 0.00001 "
                               "to 0.00007, no compactness, first half of the schedule (FLUX.1-schnell: first quarter)."),
    ]


def read_settings(model, start_percent: float, end_percent: float, step_size: float, max_updates: int, stop_probability: float,
                  update_rule: str, relations_per_update: str, save_memory: bool, compactness: float = DEFAULTS.compactness,
                  method: str = OWN) -> SteeringSettings:
    """The node's inputs as settings; `model` (the host's MODEL) chooses the paper's values for its family."""
    check_numbers(start_percent=start_percent, end_percent=end_percent, step_size=step_size, stop_probability=stop_probability,
                  compactness=compactness)
    own = SteeringSettings(start_percent, end_percent, step_size, max_updates, stop_probability, update_rule,
                           relations_per_update, save_memory, compactness)
    if method == OWN or own.is_off:
        return own
    family = model.model.model_config
    return SteeringSettings.as_in_the_paper(
        step_size=7.5 if isinstance(family, supported_models.SD15) else PAPER_STEP_SIZE,
        end=0.25 if isinstance(family, supported_models.FluxSchnell) else 0.5, recompute=save_memory)
