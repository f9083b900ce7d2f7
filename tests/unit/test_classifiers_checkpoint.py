"""Classifier files: the published format, our format, conversion, and faults of files."""
from __future__ import annotations

import argparse
import json
import os
import pathlib
import pickle
import subprocess
import sys
import zipfile
from collections import OrderedDict

import numpy
import published_files
import pytest
import torch
from learn_to_steer.classifiers.base import ClassifierError, MapLayout, check_layout
from learn_to_steer.classifiers.checkpoint import load_classifier, save_classifier
from learn_to_steer.classifiers.convert import main as convert
from learn_to_steer.classifiers.geometric import GeometricClassifier, GeometricSettings
from learn_to_steer.classifiers.learned import LearnedClassifier
from learn_to_steer.classifiers.network import RelationNetwork, paper_config
from learn_to_steer.classifiers.pickled import read_checkpoint
from learn_to_steer.classifiers.published import LICENCE
from learn_to_steer.classifiers.steps import StepMapping
from safetensors import safe_open
from safetensors.torch import load_file, save_file

ROOT = pathlib.Path(__file__).resolve().parents[2]
RELATIONS = ("above", "below", "to the left of", "to the right of", "is")
CHANNELS = 40


def published(backbone="unet", channels=CHANNELS, **entries):
    """A checkpoint as written by the paper's training script, including numpy scalars."""
    shape = published_files.SHAPES[backbone]
    return {
        **published_files.checkpoint(shape, channels),
        "rel_name_to_idx": {name: numpy.int64(index) for index, name in enumerate(RELATIONS)},
        "config": {**published_files.config(shape), "num_timesteps": numpy.int64(50)},
        "training_config": {"timesteps": [5, 10, 15, 20, 25, 49], "num_timesteps": 50, "orig_map_size": 32,
                            "lr": numpy.float64(1e-4), "weights": numpy.array([0.5, 2.0], dtype=numpy.float32),
                            "amp": numpy.bool_(True), "out": pathlib.Path("runs/1"),
                            "arguments": argparse.Namespace(seed=1)},
        "val_acc": numpy.float32(0.9), **entries,
    }


def write(folder, content, name="sd2.pth"):
    torch.save(content, folder / name)
    return folder / name


def stacks():
    return torch.rand(2, 4, CHANNELS - 3, 16, 16, generator=torch.Generator().manual_seed(3)).unbind()


def logits(classifier):
    return classifier.network(*stacks(), torch.tensor([5, 10, 25, 49]))


# --- what must load ----------------------------------------------------------------------------------------------


def test_published_checkpoint_loads_and_survives_conversion(tmp_path):
    source, target = write(tmp_path, published(), "my_sd.pth"), tmp_path / "mine.safetensors"
    first = load_classifier(source)
    command = ["dev.py", "run", "-m", "learn_to_steer.classifiers.convert", str(source), str(target), "--backbone", "unet"]
    run = subprocess.run([sys.executable, *command], cwd=ROOT, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr
    assert "above, below, to the left of, to the right of, is; backbone unet" in run.stdout
    second = load_classifier(target)
    assert torch.equal(logits(first), logits(second))
    assert first.relations == second.relations == RELATIONS and (first.name, second.name) == ("my_sd", "mine")
    assert first.layout == second.layout == MapLayout(16, "always", None, "unet", CHANNELS)
    assert first.steps.timesteps == second.steps.timesteps == (5, 10, 15, 20, 25, 49)
    assert first.training == second.training and second.training["lr"] == 1e-4
    assert second.training["out"] == "runs/1" and second.training["weights"] == [0.5, 2.0]
    assert second.licence == LICENCE
    subject, object = stacks()
    for row, step in enumerate((5, 10, 25, 49)):
        wanted = published_files.logits(subject[row], object[row], step, published_files.SD, published()["model_state_dict"])
        torch.testing.assert_close(logits(first)[row], wanted, rtol=0, atol=1e-5)


def test_numpy_scalars_under_their_old_names_load(tmp_path):
    """Checkpoints of numpy 1 name `numpy.core.multiarray`, those of numpy 2 `numpy._core.multiarray`.

    The host registers something else under the old name (comfy.utils); that must neither win nor get lost.
    """
    def scalar(*_args):
        return None

    torch.save(published(), tmp_path / "new.pth")
    with zipfile.ZipFile(tmp_path / "new.pth") as new, zipfile.ZipFile(tmp_path / "sd2.pth", "w") as old:
        for name in new.namelist():
            old.writestr(name, new.read(name).replace(b"cnumpy._core.multiarray\n", b"cnumpy.core.multiarray\n"))
    assert b"cnumpy.core.multiarray" in (tmp_path / "sd2.pth").read_bytes()
    with torch.serialization.safe_globals([(scalar, "numpy.core.multiarray.scalar")]):
        before = set(torch.serialization.get_safe_globals())
        assert load_classifier(tmp_path / "sd2.pth").relations == RELATIONS
        assert set(torch.serialization.get_safe_globals()) >= before


def test_tables_of_other_shape_and_wrapped_names_load(tmp_path):
    plain = load_classifier(write(tmp_path, published()))
    content = published()
    weights = content["model_state_dict"]
    weights["object_extractor.positional_encoding.pe"] = weights["object_extractor.positional_encoding.pe"][0, :, None]
    weights["object_extractor.query_vector"] = weights["object_extractor.query_vector"].flatten()
    content["model_state_dict"] = {f"module.{name}": tensor for name, tensor in weights.items()}
    assert torch.equal(logits(load_classifier(write(tmp_path, content))), logits(plain))


@pytest.mark.parametrize("change", [{"use_mean": True}, {"timestep_embedding": {"enable": False, "mode": "mid"}}])
def test_weights_that_the_config_switches_off_are_ignored(tmp_path, change):
    content = published()
    content["config"]["extractor"].update(change)
    classifier = load_classifier(write(tmp_path, content))
    save_classifier(tmp_path / "x.safetensors", classifier)
    assert not any(name.startswith("object_extractor.timestep") for name in load_file(tmp_path / "x.safetensors"))
    assert torch.equal(logits(load_classifier(tmp_path / "x.safetensors")), logits(classifier))


@pytest.mark.parametrize(("backbone", "name", "training", "expected"), [
    ("unet", "sd2.pth", {}, MapLayout(16, "always", 195, "unet", 1368)),
    ("unet", "sd14.pth", {}, MapLayout(16, "always", 128, "unet", 1368)),
    ("unet", "stable-diffusion-2-1.pth", {}, MapLayout(16, "always", 195, "unet", 1368)),
    ("unet", "any.pth", {"model_id": "CompVis/stable-diffusion-v1-4"}, MapLayout(16, "always", 128, "unet", 1368)),
    ("unet", "any.pth", {"orig_map_size": 64}, MapLayout(16, "always", None, "unet", 1368)),
    ("unet", "any.pth", {"orig_map_size": 16}, MapLayout(16, "always", None, "unet", 1368)),
    ("unet", "any.pth", {"model_name": "sd2"}, MapLayout(16, "always", 195, "unet", 1368)),
    ("mmdit", "flux_dev.pth", {"orig_map_size": 32}, MapLayout(16, "always", 1368, "mmdit", 1368)),
    ("mmdit", "flux_schnell.pth", {"orig_map_size": [16, 16], "num_timesteps": 4, "timesteps": [1, 3]},
     MapLayout(16, "never", 1368, "mmdit", 1368)),
    ("mmdit", "flux_schnell.pth", {"num_timesteps": 4}, MapLayout(16, "never", 1368, "mmdit", 1368)),
    ("mmdit", "any.pth", {}, MapLayout(16, "always", 1368, "mmdit", 1368)),
])
def test_layout_is_read_from_what_the_file_says(tmp_path, backbone, name, training, expected):
    content = published(backbone, 1368, training_config=training)
    classifier = load_classifier(write(tmp_path, content, name))
    assert classifier.layout == expected
    steps = (1, 3) if training.get("num_timesteps") == 4 else (5, 10, 15, 20, 25, 49)
    assert classifier.steps.timesteps == steps


def test_backbone_and_relations_can_be_overridden(tmp_path):
    content = published()
    del content["rel_name_to_idx"], content["idx_to_rel_name"]
    path, names = write(tmp_path, content), ("a", "b", "c", "d", "e")
    classifier = load_classifier(path, backbone="mmdit", relations=names)
    assert classifier.layout.backbone == "mmdit" and classifier.layout.channels == CHANNELS
    assert classifier.relations == names
    save_classifier(tmp_path / "x.safetensors", classifier)
    assert load_classifier(tmp_path / "x.safetensors", backbone="unet").layout.backbone == "unet"
    with pytest.raises(ClassifierError, match=f"trained on {CHANNELS} maps of a FLUX model; this model gives 195 maps"):
        check_layout(classifier, 195, "unet")


def test_own_format_keeps_everything_and_replaces_whole_files(tmp_path):
    network = RelationNetwork(paper_config("mmdit", d_model=32), CHANNELS, 4)
    layout, training = MapLayout(16, "resized", 12, "mmdit"), {"epochs": 3, "accuracy": [0.5, 0.75]}
    classifier = LearnedClassifier(network, RELATIONS[:4], layout, StepMapping((1, 3), 4), name="x", training=training,
                                   licence="CC0-1.0")
    path = tmp_path / "x.safetensors"
    path.write_bytes(b"something old")
    save_classifier(path, classifier)
    back = load_classifier(path)
    assert torch.equal(logits(back), logits(classifier))
    for field in ("name", "relations", "layout", "training", "licence"):
        assert getattr(back, field) == getattr(classifier, field)
    assert back.network.config == network.config and vars(back.steps) == vars(classifier.steps)
    assert os.listdir(tmp_path) == ["x.safetensors"]
    (tmp_path / "plain").write_bytes(b"")
    assert path.stat().st_mode == (tmp_path / "plain").stat().st_mode  # others may read it, as any new file
    first = path.read_bytes()
    save_classifier(path, back)
    assert path.read_bytes() == first


def learned(weight: float = 0.5):
    torch.manual_seed(0)
    network = RelationNetwork(paper_config("mmdit", d_model=32), CHANNELS, 4)
    with torch.no_grad():
        next(network.parameters()).view(-1)[0] = weight
    return LearnedClassifier(network, RELATIONS[:4], MapLayout(16, "resized", 12, "mmdit"), StepMapping((1, 3), 4), name="x")


@pytest.mark.parametrize("precision", [torch.float16, torch.bfloat16])
def test_a_file_in_half_precision_is_half_as_large_and_computes_in_single(tmp_path, precision):
    whole, half, again = (tmp_path / f"{name}.safetensors" for name in ("whole", "half", "again"))
    classifier = learned()
    save_classifier(whole, classifier)
    save_classifier(half, classifier, precision)
    assert {tensor.dtype for tensor in load_file(half).values()} == {precision}
    assert half.stat().st_size < 0.55 * whole.stat().st_size
    back = load_classifier(half)
    for name, tensor in back.network.state_dict().items():
        assert tensor.dtype == torch.float32
        assert torch.equal(tensor, classifier.network.state_dict()[name].to(precision).float()), name
    save_classifier(again, back, precision)
    assert again.read_bytes() == half.read_bytes()


def test_weights_beyond_half_precision_are_refused_before_anything_is_written(tmp_path):
    save_classifier(tmp_path / "whole.safetensors", learned(1e5))
    with pytest.raises(ClassifierError, match="too large for torch.float16.*single precision"):
        save_classifier(tmp_path / "half.safetensors", learned(1e5), torch.float16)
    assert os.listdir(tmp_path) == ["whole.safetensors"]


def test_convert_halves_a_file(tmp_path):
    whole, half = tmp_path / "whole.safetensors", tmp_path / "half.safetensors"
    save_classifier(whole, learned())
    assert convert([str(whole), str(half), "--half"]) == 0
    assert {tensor.dtype for tensor in load_file(half).values()} == {torch.float16}
    assert load_classifier(half).relations == RELATIONS[:4]


@pytest.mark.parametrize("name", ["sd2.pth", "x.safetensors"])
def test_gradients_pass_after_loading_under_inference_mode(tmp_path, name):
    write(tmp_path, published())
    save_classifier(tmp_path / "x.safetensors", load_classifier(tmp_path / "sd2.pth"))
    with torch.inference_mode():
        classifier = load_classifier(tmp_path / name)
    maps = torch.rand(1, 20, 16, 16, requires_grad=True)
    classifier.network(maps, torch.rand(1, 20, 16, 16), torch.tensor([5])).sum().backward()
    assert maps.grad.abs().sum() > 0


# --- what must be refused ----------------------------------------------------------------------------------------


def refused(path, words, **options):
    with pytest.raises(ClassifierError, match=words) as error:
        load_classifier(path, **options)
    assert path.name in str(error.value)


class Malicious:
    """Creates a file when unpickled by an ordinary unpickler."""

    def __init__(self, trace):
        self.trace = trace

    def __reduce__(self):
        return os.system, (f"touch {self.trace}",)


def store_zip(content, path):
    torch.save(content, path)


def store_legacy(content, path):
    torch.save(content, path, _use_new_zipfile_serialization=False)


def store_pickle(content, path):
    path.write_bytes(pickle.dumps(content))


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
@pytest.mark.parametrize("place", ["whole", "entry", "weight", "array"])
@pytest.mark.parametrize("store", [store_zip, store_legacy, store_pickle])
def test_code_in_a_pickle_is_refused_and_not_run(tmp_path, store, place):
    path, trace = tmp_path / "sd2.pth", tmp_path / "was_run"
    bad, content = Malicious(trace), published()
    if place == "entry":
        content["training_config"]["extra"] = bad
    elif place == "weight":
        content["model_state_dict"]["object_extractor.query_vector"] = bad
    elif place == "array":
        content["training_config"]["extra"] = numpy.array([bad], dtype=object)
    store(bad if place == "whole" else content, path)
    refused(path, r"holds code.*\((posix|nt)\.system\); nothing of it was run")
    assert not trace.exists()
    pickle.loads(pickle.dumps(bad))
    assert trace.exists()  # the trap itself works


class Call:
    """Calls a function of a module on the list of harmless ones, when unpickled by an ordinary unpickler."""

    def __init__(self, function, *arguments):
        self.call = function, arguments

    def __reduce__(self):
        return self.call


@pytest.mark.parametrize(("bad", "name"), [
    (lambda trace: Call(numpy.testing._private.utils.runstring, f"open({str(trace)!r}, 'w')", {}),
     "numpy.testing._private.utils.runstring"),
    (lambda trace: Call(pathlib.Path.touch, pathlib.Path(trace)), "getattr"),
    (lambda trace: torch.nn.Linear(1, 1), "torch.nn.modules.linear.Linear"),
])
def test_code_of_known_modules_is_named_too(tmp_path, bad, name):
    trace = tmp_path / "was_run"
    path = write(tmp_path, published(extra=bad(trace)))
    refused(path, f"holds code or a type.*{name}.*nothing of it was run")
    assert not trace.exists()


def test_paths_of_python_3_13_load(tmp_path):
    torch.save(published(), tmp_path / "old.pth")
    with zipfile.ZipFile(tmp_path / "old.pth") as old, zipfile.ZipFile(tmp_path / "sd2.pth", "w") as new:
        for name in old.namelist():
            new.writestr(name, old.read(name).replace(b"cpathlib\n", b"cpathlib._local\n"))
    assert b"cpathlib._local\n" in (tmp_path / "sd2.pth").read_bytes()
    assert load_classifier(tmp_path / "sd2.pth").training["out"] == "runs/1"


def test_code_under_a_safetensors_name_is_refused_and_not_run(tmp_path):
    path, trace = tmp_path / "sd2.safetensors", tmp_path / "was_run"
    path.write_bytes(pickle.dumps(Malicious(trace)))
    refused(path, "cut off or not a safetensors file")
    assert not trace.exists()


def test_allowing_harmless_types_ends_with_the_call(tmp_path):
    before = torch.serialization.get_safe_globals()
    load_classifier(write(tmp_path, published()))
    assert set(torch.serialization.get_safe_globals()) == set(before)


def test_pickles_are_read_without_torchs_and_pythons_own_readers(tmp_path, monkeypatch):
    """Old versions of PyTorch could run code despite weights_only. The pack does not depend on PyTorch's version."""
    path = write(tmp_path, published())
    for module, name in ((torch, "load"), (pickle, "load"), (pickle, "loads"), (pickle, "Unpickler")):
        monkeypatch.setattr(module, name, None)
    monkeypatch.setattr(torch, "__version__", "2.5.1+cu121")
    assert load_classifier(path).relations == RELATIONS


@pytest.mark.parametrize("store", ["zip", "legacy"])
def test_tensors_are_read_as_torch_reads_them(tmp_path, store):
    """Views, shared storages, parameters, strides and types equal those of torch.load, which is safe for our own file."""
    whole = torch.arange(60, dtype=torch.float64).view(5, 12)
    tensors = {"view": whole[1:4, 2:9:3], "turned": whole.T, "same": whole, "half": torch.randn(3, 2).half(),
               "brain": torch.randn(7).bfloat16(), "scalar": torch.tensor(2.5), "parameter": torch.nn.Parameter(torch.ones(2)),
               "none": torch.zeros(0, 3), "whole": torch.arange(4), "truth": torch.tensor([True, False])}
    path = tmp_path / "x.pth"
    torch.save({"tensors": tensors}, path, _use_new_zipfile_serialization=store == "zip")
    checkpoint, trusted = read_checkpoint(path), torch.load(path, weights_only=True)["tensors"]
    read = checkpoint.weights(checkpoint.content["tensors"])
    for name, tensor in trusted.items():
        assert read[name].dtype == tensor.dtype and torch.equal(read[name], tensor), name


def test_plain_values_are_read_as_numpy_means_them(tmp_path):
    values = {"fortran": numpy.asfortranarray(numpy.arange(6.0).reshape(2, 3)), "big": numpy.arange(3, dtype=">i4"),
              "text": numpy.str_("a word"), "byte": numpy.uint8(200), "set": {3}, "size": torch.Size([2, 3]),
              "dtype": torch.float16, "device": torch.device("cuda:0"), "diverged": float("nan"), "truth": numpy.bool_(True),
              "tensor": torch.tensor([[1, 2]]), "bytes": b"ab", "ordered": OrderedDict(a=(1, None))}
    torch.save(values, tmp_path / "x.pth")
    checkpoint = read_checkpoint(tmp_path / "x.pth")
    assert checkpoint.plain(checkpoint.content) == {
        "fortran": [[0.0, 1.0, 2.0], [3.0, 4.0, 5.0]], "big": [0, 1, 2], "text": "a word", "byte": 200, "set": [3],
        "size": [2, 3], "dtype": "torch.float16", "device": "cuda:0", "diverged": "nan", "truth": True, "tensor": [[1, 2]],
        "bytes": "b'ab'", "ordered": {"a": [1, None]}}


def test_missing_empty_and_foreign_files_are_refused(tmp_path):
    for name in ("a.pth", "a.pt", "a.safetensors"):
        refused(tmp_path / name, "There is no classifier file")
        (tmp_path / name).touch()
        refused(tmp_path / name, r"empty \(0 bytes\)")
        (tmp_path / name).write_bytes(b"<html>404: Not Found</html>" * 20)
        refused(tmp_path / name, "cut off or not a")
    (tmp_path / "a.ckpt").write_bytes(b"x")
    refused(tmp_path / "a.ckpt", r"must end in \.safetensors, \.pth, \.pt")
    (tmp_path / "folder.pth").mkdir()
    refused(tmp_path / "folder.pth", "There is no classifier file")


@pytest.mark.parametrize("part", [0.001, 0.1, 0.5, 0.9, 0.999])
@pytest.mark.parametrize("kind", ["zip", "legacy", "safetensors"])
def test_truncated_files_are_refused(tmp_path, kind, part):
    path = write(tmp_path, published())
    if kind == "legacy":
        store_legacy(published(), path)
    elif kind == "safetensors":
        save_classifier(tmp_path / "x.safetensors", load_classifier(path))
        path = tmp_path / "x.safetensors"
    whole = path.read_bytes()
    path.write_bytes(whole[:int(len(whole) * part)])
    refused(path, "cut off")


def without(group, name):
    return {key: value for key, value in group.items() if key != name}


QUERY, LAST = "object_extractor.query_vector", "relation_classifier.fc.8.bias"


@pytest.mark.parametrize(("change", "words"), [
    (lambda c: [1, 2], "not a relation classifier: a published checkpoint is a dict"),
    (lambda c: without(c, "model_state_dict"), "not a relation classifier"),
    (lambda c: c["model_state_dict"], "not a relation classifier"),
    (lambda c: without(c, "config"), "entry config is missing"),
    (lambda c: {**c, "config": without(c["config"], "d_model")}, "d_model is missing"),
    (lambda c: without(without(c, "rel_name_to_idx"), "idx_to_rel_name"), "relations are missing"),
    (lambda c: {**c, "rel_name_to_idx": {"above": 0, "below": 2}}, r"indices are \[0, 2\], not 0 to 1"),
    (lambda c: {**c, "rel_name_to_idx": {"above": "first"}}, "relations are damaged"),
    (lambda c: {**c, "rel_name_to_idx": {"above": 0, "below": 1}}, r"fc\.8\.weight has shape \[5, 128\].*\[2, 128\]"),
    (lambda c: {**c, "training_config": {"timesteps": [5, 60], "num_timesteps": 50}}, "within a schedule of 50 steps"),
    (lambda c: {**c, "training_config": {"num_timesteps": 28}}, "for a schedule of 28 steps there is no default"),
    (lambda c: {**c, "training_config": {"timesteps": "often"}}, "training_config.timesteps is damaged"),
    (lambda c: {**c, "training_config": "often"}, "training_config is a str instead of a dict"),
    (lambda c: {**c, "training_config": torch.zeros(2)}, "training_config is a Tensor instead of a dict"),
    (lambda c: {**c, "training_config": {"timesteps": [float("inf")]}}, "an entry of the file has another type"),
    (lambda c: {**c, "rel_name_to_idx": {"above": float("inf")}}, "an entry of the file has another type"),
    (lambda c: {**c, "training_config": {"timesteps": [99], "num_timesteps": 100}}, "step embeddings only for 0 to 49"),
    (lambda c: {**c, "model_state_dict": without(c["model_state_dict"], QUERY)}, f"missing: {QUERY}"),
    (lambda c: {**c, "model_state_dict": {**c["model_state_dict"], "lm_head.weight": torch.zeros(2)}},
     "unexpected: lm_head.weight"),
    (lambda c: {**c, "model_state_dict": {}}, r"missing: object_extractor\..* and \d+ more"),
    (lambda c: {**c, "model_state_dict": {**c["model_state_dict"], LAST: torch.zeros(7)}},
     r"fc\.8\.bias has shape \[7\], but by the config it must be \[5\]"),
    (lambda c: {**c, "model_state_dict": {**c["model_state_dict"], LAST: torch.zeros(5, dtype=torch.int64)}},
     "fc.8.bias is not a dense tensor of floating-point"),
    (lambda c: {**c, "model_state_dict": {**c["model_state_dict"], LAST: [0.0] * 5}}, "fc.8.bias is not a dense"),
    (lambda c: {**c, "model_state_dict": {**c["model_state_dict"], LAST: torch.full((5,), float("nan"))}},
     r"fc\.8\.bias holds values that are not finite"),
    (lambda c: {**c, "model_state_dict": {**c["model_state_dict"], LAST: torch.tensor([0, 0, 0, 0, -float("inf")])}},
     r"fc\.8\.bias holds values that are not finite"),
    (lambda c: {**c, "config": {**c["config"], "d_model": 64}}, "has shape"),
    (lambda c: {**c, "config": {**c["config"], "map_size": 60000}}, "has shape"),
    (lambda c: {**c, "config": {**c["config"], "extractor": {**c["config"]["extractor"], "timestep_embedding": {
        "enable": True, "mode": "sideways"}}}}, "timestep_embedding.mode is 'sideways'"),
])
def test_faults_of_a_published_checkpoint_are_named(tmp_path, change, words):
    refused(write(tmp_path, change(published())), words)


@pytest.mark.parametrize(("change", "words"), [
    (lambda d: None, "not a relation classifier: its metadata has no entry 'relation_classifier'"),
    (lambda d: "{", "metadata is damaged"),
    (lambda d: [], "metadata is damaged"),
    (lambda d: {**d, "format_version": 2}, "format version 2 is unknown"),
    (lambda d: without(d, "steps"), "metadata is damaged.*steps"),
    (lambda d: {**d, "config": []}, "config is a list of 0, but must be a group of entries"),
    (lambda d: {**d, "config": 5}, "metadata is damaged"),
    (lambda d: {**d, "layout": {"normalise": "maybe"}}, "normalise must be one of"),
    (lambda d: {**d, "layout": {"size": "16"}}, "metadata is damaged"),
    (lambda d: {**d, "relations": ["above"]}, r"fc\.8\.\w+ has shape \[5.*must be \[1"),
    (lambda d: {**d, "input_channels": 10 ** 30}, "input_channels is a number of more than 20 digits, but must be a whole"),
    (lambda d: {**d, "relations": []}, "and 0 relations cannot be right"),
    (lambda d: {**d, "input_channels": 9}, r"positional_encoding\.pe has shape \[1, 40, 32\]"),
])
def test_faults_of_our_own_format_are_named(tmp_path, change, words):
    path = tmp_path / "x.safetensors"
    save_classifier(path, load_classifier(write(tmp_path, published())))
    changed = change(json.loads(read_metadata(path)["relation_classifier"]))
    text = changed if isinstance(changed, str) else json.dumps(changed)
    save_file(load_file(path), path, None if changed is None else {"relation_classifier": text})
    refused(path, words)


def test_wrong_weights_in_our_own_format_are_named(tmp_path):
    path = tmp_path / "x.safetensors"
    save_classifier(path, load_classifier(write(tmp_path, published())))
    weights, metadata = load_file(path), read_metadata(path)
    save_file({**weights, LAST: torch.full((5,), float("inf"))}, path, metadata)
    refused(path, "not finite")
    save_file(without(weights, QUERY), path, metadata)
    refused(path, f"missing: {QUERY}")


def read_metadata(path):
    with safe_open(path, framework="pt") as file:
        return file.metadata()


def test_convert_does_not_ignore_what_is_fixed(tmp_path, capsys):
    file = tmp_path / "rule.safetensors"
    save_classifier(file, GeometricClassifier(channel_weights=torch.full((4,), 0.25), backbone="unet"))
    with pytest.raises(SystemExit):
        convert([str(file), str(tmp_path / "out.safetensors"), "--backbone", "mmdit"])
    assert "fixed" in capsys.readouterr().err and not (tmp_path / "out.safetensors").exists()


def test_convert_reports_faults_without_a_traceback(tmp_path, capsys):
    bad = tmp_path / "bad.pth"
    bad.write_bytes(b"nothing of use")
    for target, words in (("x.safetensors", "bad.pth: the file is cut off"), ("x.pth", "must end in .safetensors")):
        with pytest.raises(SystemExit) as ended:
            convert([str(bad), str(tmp_path / target)])
        assert ended.value.code and words in capsys.readouterr().err
    assert os.listdir(tmp_path) == ["bad.pth"]


def test_a_calibrated_rule_is_kept_in_a_file(tmp_path):
    weights = torch.tensor([0.5, 0.0, 0.5])
    rule = GeometricClassifier(GeometricSettings(margin=0.25), channel_weights=weights, name="mine", backbone="mmdit",
                               training={"pictures": 8}, licence="CC0")
    for name in ("mine", "again"):
        save_classifier(tmp_path / f"{name}.safetensors", rule)
    assert (tmp_path / "mine.safetensors").read_bytes() == (tmp_path / "again.safetensors").read_bytes()
    with torch.inference_mode():
        read = load_classifier(tmp_path / "mine.safetensors")
    assert (read.name, read.settings, read.layout, read.training, read.licence) == (
        "mine", rule.settings, rule.layout, rule.training, "CC0")
    assert read.layout.channels == 3 and read.layout.backbone == "mmdit" and not read.channel_weights.is_inference()
    maps = torch.rand(2, 3, 16, 16)
    assert torch.equal(read.logits(maps, maps.flip(2), torch.zeros(2)), rule.logits(maps, maps.flip(2), torch.zeros(2)))
    with pytest.raises(ClassifierError, match="3 maps of a FLUX model"):
        check_layout(read, 195, "unet")
    with pytest.raises(ClassifierError, match="no weights to save"):
        save_classifier(tmp_path / "plain.safetensors", GeometricClassifier())


@pytest.mark.parametrize(("change", "words"), [
    (lambda description, weights: weights.update(more=torch.ones(2)), "more"),
    (lambda description, weights: weights.clear() or weights.update(other=torch.ones(3)), "other"),
    (lambda description, weights: weights.update(channel_weights=torch.tensor([1.0, float("nan"), 1.0])), "channel weights"),
    (lambda description, weights: weights.update(channel_weights=torch.ones(2)), "says 3 channels"),
    (lambda description, weights: description["settings"].update(margins=1), "metadata is damaged"),
    (lambda description, weights: description["settings"].update(temperature=0), "temperature"),
    (lambda description, weights: description.pop("layout"), "metadata is damaged"),
])
def test_faults_of_a_calibrated_rule_are_named(tmp_path, change, words):
    path = tmp_path / "rule.safetensors"
    save_classifier(path, GeometricClassifier(channel_weights=torch.ones(3), name="rule"))
    with safe_open(path, "pt") as file:
        description = json.loads(file.metadata()["relation_classifier"])
        weights = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (no iterator)
    change(description, weights)
    save_file(weights, path, {"relation_classifier": json.dumps(description)})
    with pytest.raises(ClassifierError, match=words):
        load_classifier(path)
