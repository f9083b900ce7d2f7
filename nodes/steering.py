"""Nodes that steer a sampler run and report on it."""
from __future__ import annotations

import comfy.sample
import comfy.samplers
import comfy.utils
import latent_preview
from comfy_api.latest import io, ui

from ..host.latents import starting_latent
from ..host.patching import apply_steering, not_steered
from ..host.steering import Steering
from ..host.stepping import Schedule
from ..pictures.overlays import probability_plot
from ..steering.report import SteeringReport, UpdateRecord
from ..steering.settings import SteeringSettings
from .runs import find_run
from .settings import read_settings, settings_inputs
from .types import CATEGORY, Report, RunLog, check_numbers, classifier_input, graph_input, maps_output, report_output


class SamplingProgress:
    """Counts updates as well as denoising steps, and shows previews."""

    def __init__(self, model, schedule: Schedule, settings: SteeringSettings):
        window = schedule.window(settings.start, settings.end)
        costs = [1 + (settings.max_updates if step in window else 0) for step in range(schedule.steps)]
        self._done_before = [sum(costs[:step]) for step in range(schedule.steps + 1)]
        self._bar = comfy.utils.ProgressBar(self._done_before[-1])
        self._previewer = latent_preview.get_previewer(model.load_device, model.model.latent_format)

    def update(self, record: UpdateRecord) -> None:
        self._bar.update_absolute(self._done_before[min(record.step, len(self._done_before) - 1)] + record.update + 1)

    def step(self, step: int, x0, x, total_steps: int) -> None:
        preview = self._previewer.decode_latent_to_preview_image("JPEG", x0) if self._previewer else None
        self._bar.update_absolute(self._done_before[min(step + 1, len(self._done_before) - 1)], preview=preview)


class SpatialSteeringKSampler(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="LearnToSteerKSampler",
            display_name="Spatial Steering KSampler",
            category=CATEGORY,
            description="KSampler that puts objects where the graph says: before each early denoising step it moves the latent "
                        "until the classifier sees the relations in the model's cross-attention.",
            search_aliases=["KSampler", "learn to steer", "spatial"],
            inputs=[
                io.Model.Input("model", tooltip="The model that denoises the latent."),
                io.Int.Input("seed", default=0, min=0, max=0xffffffffffffffff, control_after_generate=True,
                             tooltip="The random seed used for creating the noise."),
                io.Int.Input("steps", default=20, min=1, max=10000, tooltip="Number of denoising steps."),
                io.Float.Input("cfg", default=8.0, min=0.0, max=100.0, step=0.1, round=0.01,
                               tooltip="Classifier-free guidance scale. Steering itself does not use it."),
                io.Combo.Input("sampler_name", options=comfy.samplers.KSampler.SAMPLERS, default="ddim",
                               tooltip="The sampling algorithm. Samplers that choose their own noise levels, such as dpm_fast "
                                       "and dpm_adaptive, cannot be steered."),
                io.Combo.Input("scheduler", options=comfy.samplers.KSampler.SCHEDULERS, default="normal",
                               tooltip="The noise level of each step."),
                io.Conditioning.Input("positive", tooltip="The 'positive' output of \"Multi-Relation Graph\", or of "
                                      "\"Text Encode (Steerable)\". Stock conditioning nodes may stand in between."),
                io.Conditioning.Input("negative", tooltip="What the picture should not show."),
                io.Latent.Input("latent_image", tooltip="The latent to denoise."),
                io.Float.Input("denoise", default=1.0, min=0.0, max=1.0, step=0.01,
                               tooltip="How much noise is added to the latent first. Below 1 its structure is kept."),
                graph_input(),
                classifier_input(),
                *settings_inputs(),
            ],
            outputs=[
                io.Latent.Output("latent", display_name="latent", tooltip="The denoised latent."),
                maps_output(),
                report_output(),
            ],
        )

    @classmethod
    def execute(cls, model, seed: int, steps: int, cfg: float, sampler_name: str, scheduler: str, positive, negative,
                latent_image, denoise: float, graph, classifier, **settings) -> io.NodeOutput:
        check_numbers(cfg=cfg, denoise=denoise)
        settings = read_settings(model, **settings)
        sigmas = comfy.samplers.KSampler(model, steps, model.load_device, sampler_name, scheduler, denoise,
                                         model.model_options).sigmas
        progress = SamplingProgress(model, Schedule.of(model.get_model_object("model_sampling"), sigmas), settings)
        steering = Steering(graph, classifier, settings, progress.update)
        patched, runs = apply_steering(model, steering)
        start = starting_latent(patched, latent_image)
        noise = comfy.sample.prepare_noise(start, seed, latent_image.get("batch_index"))
        samples = comfy.sample.sample(
            patched, noise, steps, cfg, sampler_name, scheduler, positive, negative, start, denoise=denoise,
            noise_mask=latent_image.get("noise_mask"), callback=progress.step,
            disable_pbar=not comfy.utils.PROGRESS_BAR_ENABLED, seed=seed)
        out = {name: value for name, value in latent_image.items() if not name.startswith("downscale_ratio")}
        out["samples"] = samples
        run = runs.last or not_steered(steering, "denoise leaves no step to sample")
        return io.NodeOutput(out, run.maps, run.report)


class ApplySpatialSteering(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="LearnToSteerApply",
            display_name="Apply Spatial Steering",
            category=CATEGORY,
            description="The same steering as a patch on MODEL, in front of any sampler: KSampler, SamplerCustom, FLUX's "
                        "guider and sampler nodes. \"Steering Result\" gives the report.",
            inputs=[io.Model.Input("model", tooltip="The model to steer."), graph_input(), classifier_input(),
                    *settings_inputs()],
            outputs=[
                io.Model.Output("model", display_name="model", tooltip="The steered model, for any sampler."),
                RunLog.Output("steering", display_name="steering", tooltip="For \"Steering Result\", behind the sampler."),
            ],
        )

    @classmethod
    def execute(cls, model, graph, classifier, **settings) -> io.NodeOutput:
        return io.NodeOutput(*apply_steering(model, Steering(graph, classifier, read_settings(model, **settings))))


class SteeringResult(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="LearnToSteerResult",
            display_name="Steering Result",
            category=CATEGORY,
            description="Gives report and maps of the steered run that made this latent, and of the runs that it continued.",
            inputs=[
                RunLog.Input("steering", tooltip="From \"Apply Spatial Steering\"."),
                io.Latent.Input("samples", tooltip="The LATENT output of the sampler that used the steered model. It "
                                "identifies the run."),
            ],
            outputs=[maps_output(), report_output(),
                     io.Latent.Output("latent", display_name="samples", tooltip="The same latent, for the VAE.")],
            hidden=[io.Hidden.prompt, io.Hidden.unique_id],
        )

    @classmethod
    def execute(cls, steering, samples) -> io.NodeOutput:
        run = find_run(steering, samples, cls.hidden, "steering")
        return io.NodeOutput(run.maps, run.report, samples)


class SteeringReportNode(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="LearnToSteerReport",
            display_name="Steering Report",
            category=CATEGORY,
            description="Shows a steered run: whether the latent was moved and why not, a plot of the relations' probabilities "
                        "over the updates, and every update as text.",
            inputs=[Report.Input("report", tooltip="From a steering sampler or \"Steering Result\".")],
            outputs=[
                io.Image.Output("plot", display_name="plot", tooltip="Probability of each relation over the updates."),
                io.String.Output("text", display_name="text", tooltip="The run in words and numbers."),
            ],
            is_output_node=True,
        )

    @classmethod
    def execute(cls, report: SteeringReport) -> io.NodeOutput:
        plot, text = probability_plot(report)[None], report.to_text()
        shown = {**ui.PreviewImage(plot, cls=cls).as_dict(), **ui.PreviewText(text).as_dict()}
        return io.NodeOutput(plot, text, ui=shown)


NODES = [SpatialSteeringKSampler, ApplySpatialSteering, SteeringResult, SteeringReportNode]
