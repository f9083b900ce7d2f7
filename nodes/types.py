"""The pack's own socket types, and the pieces that several nodes share."""
from __future__ import annotations

import math

from comfy_api.latest import io

CATEGORY = "Learn to Steer"

Relation = io.Custom("LTS_RELATION")
Graph = io.Custom("LTS_GRAPH")
Classifier = io.Custom("LTS_CLASSIFIER")
Maps = io.Custom("LTS_MAPS")
Report = io.Custom("LTS_REPORT")
RunLog = io.Custom("LTS_RUN_LOG")


def check_numbers(**inputs: object) -> None:
    """Raises ValueError naming the input that is NaN or infinite: JSON lets both pass, and so does the host."""
    for name, value in inputs.items():
        if isinstance(value, float) and not math.isfinite(value):
            raise ValueError(f"input '{name}': {value} is not a number that can be used. Enter another one.")


def graph_input() -> io.Input:
    return Graph.Input("graph", tooltip="The relations that the picture should show, from \"Multi-Relation Graph\".")


def classifier_input() -> io.Input:
    return Classifier.Input("classifier", tooltip="Judges the relations by the attention maps. From \"Relation "
                            "Classifier Loader\".")


def maps_output() -> io.Output:
    return Maps.Output("maps", display_name="maps", tooltip="Cross-attention maps of this run, for \"Attention Overlay\".")


def report_output() -> io.Output:
    return Report.Output("report", display_name="report", tooltip="Loss, probabilities and updates of this run, for "
                         "\"Steering Report\".")
