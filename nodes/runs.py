"""How the nodes behind a sampler find the run that gave their latent."""
from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from ..host.records import Run, RunLog


def find_run(log: RunLog, samples: dict, hidden, log_input: str) -> Run:
    """The run that gave the latent, with the runs that it went on from.

    hidden: of the node that asks, with the prompt and its own id; log_input: the name of its input for `log`. Raises LookupError
    where the latent comes from elsewhere. A latent whose line leads through the patched MODEL, but that no run gave, is an
    empty run with the reason. Its effect is unknown if the MODEL has sampled before and no denoise on the line is 0.
    """
    try:
        return log.find(samples["samples"]).whole()
    except LookupError:
        prompt = {} if hidden is None else hidden.prompt or {}
        line = _line(prompt, hidden.unique_id, log_input) if prompt else set()
        if not line:
            raise
        if log.last is None or any(prompt.get(node, {}).get("inputs", {}).get("denoise") == 0 for node in line):
            return log.blank("the sampler ran no denoising step (is denoise 0?)")
        return _unknown(log.blank("a node between the sampler and this one changed the latent, or the sampler ran no denoising "
                                  "step (is denoise 0?). Connect the sampler's LATENT output directly"))


def _unknown(run: Run) -> Run:
    """An empty run of which nobody can say whether its latent was steered."""
    return run if run.report is None else Run(run.maps, replace(run.report, is_known=False))


def _line(prompt: Mapping, node: str, log_input: str) -> set[str]:
    """Ids of the nodes that lead to the node's latent; empty unless the node that its log comes from is among them."""
    links = prompt.get(node, {}).get("inputs", {})
    if not all(_is_link(links.get(name)) for name in (log_input, "samples")):
        return set()
    waiting, seen, patch = [links["samples"][0]], set(), links[log_input][0]
    while waiting:
        current = waiting.pop()
        if current not in seen:
            seen.add(current)
            inputs = prompt.get(current, {}).get("inputs", {}).values()
            waiting += [value[0] for value in inputs if _is_link(value)]
    return seen if patch in seen else set()


def _is_link(value: object) -> bool:
    """Whether an input's value is [node id, output number]; a widget may hold a list of its own."""
    return isinstance(value, list) and len(value) == 2 and isinstance(value[0], str) and isinstance(value[1], int)
