"""The network equals a second computation, written from docs/method.md with plain tensor operations."""
from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from learn_to_steer.classifiers.base import ClassifierError, MapLayout
from learn_to_steer.classifiers.learned import LearnedClassifier
from learn_to_steer.classifiers.network import ExtractorConfig, HeadConfig, NetworkConfig, RelationNetwork, paper_config
from learn_to_steer.classifiers.steps import StepMapping

RELATIONS = ("above", "below", "to the left of", "to the right of", "is")


# --- the second computation: only matmul, exp, sqrt and their like -----------------------------------------------


def affine(x, weights, name):
    return x @ weights[f"{name}.weight"].T + weights[f"{name}.bias"]


def standardise(x, weights, name):
    centred = x - x.sum(-1, keepdim=True) / x.shape[-1]
    variance = (centred * centred).sum(-1, keepdim=True) / x.shape[-1]
    return centred / (variance + 1e-5) ** 0.5 * weights[f"{name}.weight"] + weights[f"{name}.bias"]


def attend(queries, keys, weights, name, heads):
    """Multi-head attention of [Lq, d] over [Lk, d], one head at a time."""
    width = queries.shape[-1]
    rows, offsets = weights[f"{name}.in_proj_weight"], weights[f"{name}.in_proj_bias"]
    q = queries @ rows[:width].T + offsets[:width]
    k = keys @ rows[width:2 * width].T + offsets[width:2 * width]
    v = keys @ rows[2 * width:].T + offsets[2 * width:]
    part, results = width // heads, []
    for head in range(heads):
        cut = slice(head * part, (head + 1) * part)
        scores = q[:, cut] @ k[:, cut].T / math.sqrt(part)
        scores = (scores - scores.amax(-1, keepdim=True)).exp()
        results.append(scores / scores.sum(-1, keepdim=True) @ v[:, cut])
    return affine(torch.cat(results, -1), weights, f"{name}.out_proj")


def encoder_layer(x, weights, name, heads):
    normed = standardise(x, weights, f"{name}.norm1")
    x = x + attend(normed, normed, weights, f"{name}.self_attn", heads)
    hidden = affine(standardise(x, weights, f"{name}.norm2"), weights, f"{name}.linear1").clamp(min=0)
    return x + affine(hidden, weights, f"{name}.linear2")


def sinusoids(length, width):
    table = torch.zeros(length, width)
    for place in range(length):
        for pair in range(0, width, 2):
            angle = place / 10000 ** (pair / width)
            table[place, pair], table[place, pair + 1] = math.sin(angle), math.cos(angle)
    return table


def aggregated_map(maps, step, weights, settings, width):
    """One object's stack [C, H, W] -> [H * W]."""
    flat = maps.reshape(maps.shape[0], -1)
    if settings.use_mean:
        return flat.sum(0) / len(flat)
    name = "object_extractor"
    x = affine(flat, weights, f"{name}.input_projection") + sinusoids(len(flat), width)
    if settings.step_mode == "pre":
        x = x + weights[f"{name}.timestep_embedding.weight"][step]
    for layer in range(settings.num_layers):
        if settings.step_mode == "mid":
            x = x + weights[f"{name}.timestep_embedding.weight"][step]
        x = encoder_layer(x, weights, f"{name}.transformer.layers.{layer}", settings.nhead)
    query = weights[f"{name}.query_vector"].reshape(1, -1)
    pooled = attend(query, x, weights, f"{name}.layer_attention", settings.layer_attn_nheads)
    return affine(pooled, weights, f"{name}.output_projection")[0]


def expected_logits(subject, object, steps, weights, config):
    name, settings, rows = "relation_classifier", config.classifier, []
    for maps_s, maps_o, step in zip(subject, object, steps.tolist(), strict=True):
        both = torch.cat([aggregated_map(maps, step, weights, config.extractor, config.d_model)
                          for maps in (maps_s, maps_o)])
        x = affine(both, weights, f"{name}.projection")[None] + sinusoids(1, config.d_model)
        for layer in range(settings.num_layers):
            x = encoder_layer(x, weights, f"{name}.transformer.layers.{layer}", settings.nhead)
        x = x[0]
        if settings.timestep_embedding_dim:
            x = torch.cat([x, weights[f"{name}.timestep_embedding.weight"][step]])
        for linear, norm in ((0, 1), (4, 5)):
            x = standardise(affine(x, weights, f"{name}.fc.{linear}"), weights, f"{name}.fc.{norm}")
            x = torch.where(x > 0, x, 0.1 * x)
        rows.append(affine(x, weights, f"{name}.fc.8"))
    return torch.stack(rows)


# --- the tests ---------------------------------------------------------------------------------------------------


def random_network(config, channels, relations=5, seed=0):
    """A network with random parameters, norms and biases included: with initial values, a swap would go unnoticed."""
    network = RelationNetwork(config, channels, relations)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in network.parameters():
            scale = 1 / math.sqrt(parameter.shape[-1]) if parameter.ndim > 1 else 0.3
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * scale)
    return network.eval()


def random_stacks(channels, batch=3, seed=1):
    generator = torch.Generator().manual_seed(seed)
    maps = torch.rand(2, batch, channels, 16, 16, generator=generator) ** 6
    return (maps / maps.sum((-1, -2), keepdim=True)).unbind()


def vary(config, **extractor):
    return replace(config, extractor=replace(config.extractor, **extractor))


SD, FLUX = paper_config("unet"), paper_config("mmdit")
VARIANTS = {
    "sd mid": SD, "sd pre": vary(SD, step_mode="pre"), "sd off": vary(SD, step_mode="off"),
    "sd mean": vary(SD, use_mean=True),
    "sd no step in head": replace(SD, classifier=replace(SD.classifier, timestep_embedding_dim=0)),
    "flux mid": FLUX, "flux pre": vary(FLUX, step_mode="pre"), "flux off": vary(FLUX, step_mode="off"),
    "flux mean": vary(FLUX, use_mean=True),
    "odd": NetworkConfig(num_timesteps=7, d_model=48, classifier=HeadConfig(2, 1, 20, 0.1, 4),
                         extractor=ExtractorConfig(3, 3, 40, 6, 0.0)),
}


@pytest.mark.parametrize("name", VARIANTS)
@pytest.mark.parametrize("channels", [20, 31])
def test_logits_equal_a_second_computation(name, channels):
    config = VARIANTS[name]
    network = random_network(config, channels=31)
    subject, object = random_stacks(channels)
    steps = torch.tensor([0, 5, config.num_timesteps - 1])
    with torch.no_grad():
        wanted = expected_logits(subject, object, steps, network.state_dict(), config)
    got = network(subject.requires_grad_(), object, steps)
    assert torch.allclose(got, wanted, atol=1e-5, rtol=0)
    assert wanted.std() > 0.05
    with torch.no_grad():
        assert torch.allclose(network(subject, object, steps), wanted, atol=1e-5, rtol=0)


def test_logits_at_flux_width_of_1368_maps():
    network = random_network(FLUX, 1368)
    subject, object = random_stacks(1368, batch=1)
    steps = torch.tensor([10])
    with torch.no_grad():
        assert torch.allclose(network(subject, object, steps),
                              expected_logits(subject, object, steps, network.state_dict(), FLUX), atol=1e-5, rtol=0)


def test_state_dict_has_the_published_names_and_shapes():
    shapes = {name: list(tensor.shape) for name, tensor in RelationNetwork(SD, 1368, 5).state_dict().items()}
    layer = ("self_attn.in_proj_weight", "self_attn.in_proj_bias", "self_attn.out_proj.weight",
             "self_attn.out_proj.bias", "linear1.weight", "linear1.bias", "linear2.weight", "linear2.bias",
             "norm1.weight", "norm1.bias", "norm2.weight", "norm2.bias")
    extractor = ["input_projection.weight", "input_projection.bias", "timestep_embedding.weight",
                 "positional_encoding.pe", "query_vector", "layer_attention.in_proj_weight",
                 "layer_attention.in_proj_bias", "layer_attention.out_proj.weight", "layer_attention.out_proj.bias",
                 "output_projection.weight", "output_projection.bias"]
    head = ["timestep_embedding.weight", "positional_encoding.pe", "projection.weight", "projection.bias",
            *(f"fc.{place}.{part}" for place in (0, 1, 4, 5, 8) for part in ("weight", "bias"))]
    for names in (extractor, head):
        names += [f"transformer.layers.{index}.{part}" for index in range(2) for part in layer]
    assert set(shapes) == {f"object_extractor.{name}" for name in extractor} | \
        {f"relation_classifier.{name}" for name in head}
    assert shapes["object_extractor.timestep_embedding.weight"] == [50, 256]
    assert shapes["object_extractor.positional_encoding.pe"] == [1, 1368, 256]
    assert shapes["relation_classifier.projection.weight"] == [256, 512]
    assert shapes["relation_classifier.timestep_embedding.weight"] == [50, 16]
    assert shapes["relation_classifier.fc.0.weight"] == [256, 272] and shapes["relation_classifier.fc.8.bias"] == [5]


@pytest.mark.parametrize("name", VARIANTS)
def test_config_survives_the_published_form(name):
    assert NetworkConfig.from_dict(VARIANTS[name].to_dict()) == VARIANTS[name]


@pytest.mark.parametrize(("path", "value", "words"), [
    (("extractor", "timestep_embedding", "mode"), "late", "extractor.timestep_embedding.mode is 'late'.*mid, pre, off"),
    (("extractor", "nhead"), 3, "extractor.nhead is 3.*divisor of d_model 256"),
    (("extractor", "num_layers"), "many", "extractor.num_layers is 'many'.*whole number"),
    (("extractor", "num_layers"), 10 ** 9, "extractor.num_layers is 1000000000"),
    (("d_model",), 0, "d_model is 0"),
    (("map_size",), [16, 8], "map_size is a list of 2, but must be a whole number"),
    (("classifier",), 7, "classifier is 7.*group of settings"),
    (("classifier", "dropout"), float("nan"), "classifier.dropout is nan"),
    (("classifier", "nhead"), None, "classifier.nhead is missing"),
])
def test_faults_of_a_config_are_named(path, value, words):
    config = SD.to_dict()
    group = config
    for name in path[:-1]:
        group = group[name]
    if value is None:
        del group[path[-1]]
    else:
        group[path[-1]] = value
    with pytest.raises(ClassifierError, match=words):
        NetworkConfig.from_dict(config)


def learned(config=SD, places=31, relations=RELATIONS, **layout):
    return LearnedClassifier(random_network(config, places), relations, MapLayout(**layout),
                             StepMapping((5, 10, 15, 20, 25, 49), 50), name="test")


def test_learned_classifier_asks_the_network_at_the_mapped_steps():
    classifier = learned()
    subject, object = random_stacks(20)
    got = classifier.logits(subject, object, torch.tensor([0.0, 0.2, 0.9]))
    wanted = classifier.network(subject, object, torch.tensor([5, 10, 49]))
    assert torch.equal(got, wanted)
    assert torch.allclose(classifier.logits(subject, object, torch.zeros(1)),
                          classifier.network(subject, object, torch.tensor([5, 5, 5])), atol=1e-6)
    half = classifier.logits(subject.half(), object.bfloat16().half(), torch.zeros(3))
    assert half.dtype == torch.float32
    assert classifier.to("cpu") is classifier


def test_learned_classifier_is_frozen_and_leaves_its_network_alone():
    network = random_network(SD, 31).train()
    classifier = LearnedClassifier(network, RELATIONS, MapLayout(), StepMapping((5,), 50), name="test")
    assert network.training and all(parameter.requires_grad for parameter in network.parameters())
    assert not classifier.network.training
    assert not any(parameter.requires_grad for parameter in classifier.network.parameters())


def test_gradient_of_the_learned_loss_agrees_with_finite_differences():
    classifier = learned()
    classifier.network.double()
    subject, object = (maps.double() for maps in random_stacks(20, batch=1))
    direction = torch.rand(subject.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(2)) / 256

    def loss(maps):
        steps = torch.tensor([10])
        return torch.nn.functional.cross_entropy(classifier.network(maps, object, steps), torch.tensor([1]))

    gradient, = torch.autograd.grad(loss(subject.requires_grad_()), subject)
    slope = (loss(subject + 1e-4 * direction) - loss(subject - 1e-4 * direction)) / 2e-4
    assert slope.item() == pytest.approx((gradient * direction).sum().item(), rel=1e-4)


def test_gradients_pass_after_making_it_under_inference_mode():
    """The host runs nodes in inference mode; steering leaves it later."""
    with torch.inference_mode():
        classifier = learned().to("cpu")
    subject, object = random_stacks(20)
    with torch.inference_mode(False):
        classifier.logits(subject.clone().requires_grad_(), object.clone(), torch.zeros(3)).sum().backward()
    assert not any(parameter.is_inference() for parameter in classifier.network.parameters())


def test_stacks_that_do_not_fit_are_refused():
    subject, object = random_stacks(20)
    with pytest.raises(ClassifierError, match="expects stacks of 31 maps; it got 20"):
        learned(channels=31).logits(subject, object, torch.zeros(3))
    with pytest.raises(ClassifierError, match="expects stacks of up to 10 maps; it got 20"):
        learned(places=10).logits(subject, object, torch.zeros(3))


def test_parts_that_do_not_fit_each_other_are_refused():
    with pytest.raises(ClassifierError, match="5 logits need as many different relation names"):
        learned(relations=("above", "above"))
    with pytest.raises(ClassifierError, match="layout says 8 x 8 maps, the network takes 16 x 16"):
        learned(size=8)
    with pytest.raises(ClassifierError, match="layout says 40 maps, the network has positions for 31"):
        learned(channels=40)
    with pytest.raises(ClassifierError, match="step embeddings only for 0 to 6"):
        learned(VARIANTS["odd"])
