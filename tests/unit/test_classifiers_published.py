"""Files with the documented names and shapes of published ones give the same logits as PyTorch's layers."""
from __future__ import annotations

import logging
from dataclasses import replace

import published_files as published
import pytest
import torch
from learn_to_steer.classifiers.base import ClassifierError, check_layout
from learn_to_steer.classifiers.checkpoint import load_classifier, save_classifier

TRAINED = (5, 10, 15, 20, 25, 49)
TABLE = "relation_classifier.positional_encoding.pe"
SHAPES = {
    "sd": (published.SD, 195), "flux": (published.FLUX, 96), "sd at full width": (published.full_width(published.SD), 195),
    "flux at full width": (published.full_width(published.FLUX), 60), "pre": (replace(published.SD, mode="pre"), 31),
    "without steps": (replace(published.FLUX, mode=None), 31),
}


def stacks(channels: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Sharp maps that sum to 1, [1, channels, 16, 16]."""
    maps = torch.rand(2, 1, channels, 16, 16, generator=torch.Generator().manual_seed(1)) ** 6
    return (maps / maps.sum((-2, -1), keepdim=True)).unbind()


def write(folder, content: dict, name: str = "sd2_test.pth"):
    torch.save(content, folder / name)
    return folder / name


@pytest.mark.parametrize("name", SHAPES)
def test_a_published_file_gives_the_documented_logits(tmp_path, name: str):
    shape, channels = SHAPES[name]
    weights = published.random_weights(shape, 1368, contrast=100)
    path = write(tmp_path, published.checkpoint(shape, weights=weights), "any.pth")
    backbone = "mmdit" if shape.extractor[0] == 4 else "unet"
    classifier = load_classifier(path, backbone=backbone)
    assert classifier.relations == published.RELATIONS
    subject, object = stacks(1368 if backbone == "mmdit" and channels > 90 else channels)
    classifier.layout = replace(classifier.layout, channels=None)  # any number, to keep the test short
    for step, index in ((0, 5), (7, 10), (24, 25), (40, 49)):
        with torch.no_grad():
            wanted = published.logits(subject[0], object[0], index, shape, weights)
            got = classifier.logits(subject, object, torch.tensor([step / 50]))[0]
        torch.testing.assert_close(got, wanted, rtol=0, atol=1e-5)
        assert wanted.std() > 0.05


def test_of_the_heads_position_table_the_first_row_alone_is_used(tmp_path):
    """Published files hold 256 rows. A file with one row, or with other rows after the first, gives the same bits."""
    weights = published.random_weights(published.SD, 1368, contrast=100)
    assert weights[TABLE].shape == (1, 256, 32)
    tables = {"rows": weights[TABLE], "row": weights[TABLE][:, :1], "flat": weights[TABLE][0],
              "other": weights[TABLE].transpose(0, 1), "noise": torch.cat([weights[TABLE][:, :1], torch.randn(1, 99, 32)], dim=1)}
    found, subject_object = {}, stacks(195)
    for name, table in tables.items():
        classifier = load_classifier(write(tmp_path, published.checkpoint(weights={**weights, TABLE: table})))
        found[name] = classifier.logits(*subject_object, torch.zeros(1))
        save_classifier(tmp_path / "own.safetensors", classifier)
        assert torch.equal(load_classifier(tmp_path / "own.safetensors").logits(*subject_object, torch.zeros(1)), found[name])
    assert all(torch.equal(logits, found["row"]) for logits in found.values())
    second = load_classifier(write(tmp_path, published.checkpoint(weights={**weights, TABLE: weights[TABLE][:, 1:]})))
    assert not torch.equal(second.logits(*subject_object, torch.zeros(1)), found["row"])


@pytest.mark.parametrize("table", [torch.zeros(1, 256, 31), torch.zeros(0), torch.zeros(()), torch.zeros(1, 0, 32)])
def test_a_table_of_another_width_is_refused(tmp_path, table: torch.Tensor):
    weights = {**published.random_weights(published.SD, 40), TABLE: table}
    with pytest.raises(ClassifierError, match=r"sd2_test\.pth: relation_classifier\.positional_encoding\.pe has shape"):
        load_classifier(write(tmp_path, published.checkpoint(channels=40, weights=weights)))


@pytest.mark.parametrize(("name", "shape", "said", "guessed"), [
    ("any.pth", published.SD, {}, True), ("any.pth", published.FLUX, {}, True), ("sd2.pth", published.SD, {}, True),
    ("flux_dev.pth", published.FLUX, {}, True), ("any.pth", published.SD, {"model_name": "stable-diffusion"}, False),
])
def test_a_wrong_guess_can_be_put_right(tmp_path, caplog, name: str, shape, said: dict, guessed: bool):
    content = published.checkpoint(shape, 40)
    content["training_config"].update(said)
    path = write(tmp_path, content, name)
    with caplog.at_level(logging.WARNING, "learn_to_steer"):
        classifier = load_classifier(path)
    assert ("does not say which model" in caplog.text) == (name == "any.pth" and guessed)
    mine, other = ("mmdit", "unet") if shape is published.FLUX else ("unet", "mmdit")
    assert classifier.layout.backbone == mine and classifier.layout.guessed == guessed
    with pytest.raises(ClassifierError) as error:
        check_layout(classifier, 40, other)
    hint = f"is a guess. If it is wrong, choose '{other}' as 'backbone' in Relation Classifier Loader"
    assert (hint in str(error.value)) == guessed
    check_layout(load_classifier(path, backbone=other), 40, other)
    with pytest.raises(ClassifierError) as error:
        check_layout(load_classifier(path, backbone=other), 40, mine)
    assert "guess" not in str(error.value)
