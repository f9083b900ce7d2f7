"""Scenes of the small world: emoji objects on plain backgrounds, with captions whose relation word is unreliable.

Pictures are 64x64 RGB. Boxes are in pixels, x to the right and y downward, the right and lower edge excluded.
The sprites come from Noto Color Emoji (see LICENSE-sprites.txt).
"""
from __future__ import annotations

import functools
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

NOUNS = ("dog", "cat", "giraffe", "airplane", "teddy bear", "car", "apple", "umbrella", "banana", "zebra", "clock",
         "ball", "pig", "train")
EXTRA_NOUNS = ("octopus", "penguin")
"""Nouns with a sprite that no base model was trained on, for training a LoRA."""
HELD_OUT_NOUNS = ("giraffe", "apple", "clock")
"""Nouns that a classifier may be trained without, to measure how it generalises. The base models know them."""

IMAGE_SIZE = 64
MIN_GAP = 2


@dataclass(frozen=True)
class Layout:
    """The objects of a world, their positions and their sizes, in pixels.

    grid: boxes begin at its multiples. A model with patches of that size learns the shapes much faster.
    few: longest sides in scenes with one or two objects; many: with three to five objects.
    nouns: the objects.
    """

    grid: int
    few: tuple[int, ...]
    many: tuple[int, ...]
    nouns: tuple[str, ...] = NOUNS


UNET_LAYOUT = Layout(4, (20, 26, 30), (16, 20))
FLUX_LAYOUT = Layout(8, (24,), (16,), ("dog", "cat", "giraffe", "airplane", "teddy bear", "car", "apple", "clock"))
"""A simpler world, because FLUX learns about ten times more slowly than the UNet. It has eight nouns, every object begins at the
border of an image token, and there is one size for one or two objects and another for more."""
LAYOUTS = {"unet": UNET_LAYOUT, "flux": FLUX_LAYOUT}
"""By backbone."""
SIZES = tuple(range(16, 31, 2))
"""Longest sides of the objects that the detector finds."""

CARDINALS = ("to the left of", "to the right of", "above", "below")
DIAGONALS = ("above and to the left of", "above and to the right of", "below and to the left of",
             "below and to the right of")
SYNONYMS = {"to the left of": ("left of", "on the left of"), "to the right of": ("right of", "on the right of"),
            "above": ("on top of", "over"), "below": ("under", "beneath")}


@dataclass(frozen=True)
class MultiForm:
    """A template of multi-relation prompts. pairs: for each relation, indices of subject and object (0 is A)."""

    text: str
    pairs: tuple[tuple[int, int], ...]


MULTI_FORMS = {
    (3, 2): MultiForm("{A} {r1} {B} {r2} {C}", ((0, 1), (1, 2))),
    (4, 2): MultiForm("{A} {r1} {B} and {C} {r2} {D}", ((0, 1), (2, 3))),
    (4, 3): MultiForm("{A} {r1} {B} {r2} {C} {r3} {D}", ((0, 1), (1, 2), (2, 3))),
    (5, 3): MultiForm("{A} {r1} {B} {r2} {C} and {D} {r3} {E}", ((0, 1), (1, 2), (3, 4))),
}
"""The paper's multi-relation prompts, by number of objects and number of relations."""

TRUE_RELATION_SHARE = 0.15
"""Share of training captions with a true relation. The others get a relation drawn at random."""

_ATLAS = Path(__file__).parent / "sprites.png"
_ATLAS_CELL = 64


@dataclass(frozen=True)
class PlacedObject:
    """An object in a scene. box: (x0, y0, x1, y1) in pixels."""

    noun: str
    box: tuple[int, int, int, int]

    @property
    def centre(self) -> tuple[float, float]:
        x0, y0, x1, y1 = self.box
        return (x0 + x1) / 2, (y0 + y1) / 2


@dataclass(frozen=True)
class Scene:
    """A picture, uint8 [64, 64, 3], its objects, and a caption, whose relation may be wrong."""

    image: np.ndarray
    objects: tuple[PlacedObject, ...]
    caption: str


@functools.cache
def _cells() -> dict[str, Image.Image]:
    atlas = Image.open(_ATLAS).convert("RGBA")
    columns = atlas.width // _ATLAS_CELL
    cells = {}
    for index, noun in enumerate(NOUNS + EXTRA_NOUNS):
        left, top = index % columns * _ATLAS_CELL, index // columns * _ATLAS_CELL
        cell = atlas.crop((left, top, left + _ATLAS_CELL, top + _ATLAS_CELL))
        cells[noun] = cell.crop(cell.getbbox())
    return cells


@functools.cache
def sprite(noun: str, size: int) -> tuple[np.ndarray, np.ndarray]:
    """A noun's sprite with a longest side of `size` pixels: colours (float32 [h, w, 3], 0 to 255) and opacity [h, w, 1].

    Raises ValueError for an unknown noun.
    """
    cells = _cells()
    if noun not in cells:
        raise ValueError(f"the small world has no {noun!r}; it knows {', '.join(cells)}")
    cell = cells[noun]
    scale = size / max(cell.size)
    small = cell.resize((max(1, round(cell.width * scale)), max(1, round(cell.height * scale))), Image.LANCZOS)
    pixels = np.asarray(small, dtype=np.float32)
    return pixels[..., :3], pixels[..., 3:] / 255.0


def background(rng: np.random.Generator) -> np.ndarray:
    """A plain light background with a tint and a slight gradient, float32 [64, 64, 3], 0 to 255."""
    base = rng.uniform(165, 225) + rng.uniform(-18, 18, size=3)
    slope = rng.uniform(-12, 12, size=2)
    axis = np.linspace(-1, 1, IMAGE_SIZE)
    ramp = slope[0] * axis[None, :, None] + slope[1] * axis[:, None, None]
    return (base + ramp).astype(np.float32)


def render(objects: tuple[PlacedObject, ...], sizes: tuple[int, ...], canvas: np.ndarray) -> np.ndarray:
    """The objects drawn on a copy of `canvas` (float [64, 64, 3]), as uint8."""
    canvas = canvas.copy()
    for item, size in zip(objects, sizes, strict=True):
        colours, opacity = sprite(item.noun, size)
        x0, y0, x1, y1 = item.box
        region = canvas[y0:y1, x0:x1]
        canvas[y0:y1, x0:x1] = region + opacity * (colours - region)
    return np.clip(np.round(canvas), 0, 255).astype(np.uint8)


def _place(rng: np.random.Generator, nouns: tuple[str, ...], sizes: tuple[int, ...],
           grid: int) -> tuple[PlacedObject, ...]:
    """Random boxes on the grid, at least MIN_GAP pixels apart along one axis. Restarts if an object does not fit."""
    while True:
        placed: list[PlacedObject] = []
        for noun, size in zip(nouns, sizes, strict=True):
            height, width = sprite(noun, size)[0].shape[:2]
            for _ in range(60):
                x0 = grid * int(rng.integers((IMAGE_SIZE - width) // grid + 1))
                y0 = grid * int(rng.integers((IMAGE_SIZE - height) // grid + 1))
                box = (x0, y0, x0 + width, y0 + height)
                if all(_apart(box, other.box) for other in placed):
                    placed.append(PlacedObject(noun, box))
                    break
            else:
                break
        if len(placed) == len(nouns):
            return tuple(placed)


def _apart(a: tuple[int, int, int, int], b: tuple[int, int, int, int]) -> bool:
    gap_x = max(a[0], b[0]) - min(a[2], b[2])
    gap_y = max(a[1], b[1]) - min(a[3], b[3])
    return max(gap_x, gap_y) >= MIN_GAP


def true_relations(subject_box: tuple[float, ...], object_box: tuple[float, ...]) -> frozenset[str]:
    """The cardinal relations that hold by GenEval's rule (docs/method.md): none, one, or two for a diagonal.

    Boxes are (x0, y0, x1, y1) in pixels, y downward.
    """
    offset = np.array([(subject_box[k] + subject_box[k + 2] - object_box[k] - object_box[k + 2]) / 2 for k in (0, 1)])
    extent = np.array([subject_box[k + 2] - subject_box[k] + object_box[k + 2] - object_box[k] for k in (0, 1)])
    length = float(np.hypot(*offset))
    if length == 0:
        return frozenset()
    dx, dy = np.sign(offset) * np.maximum(np.abs(offset) - 0.1 * extent, 0) / length
    found = []
    if abs(dx) > 0.5:
        found.append("to the right of" if dx > 0 else "to the left of")
    if abs(dy) > 0.5:
        found.append("below" if dy > 0 else "above")
    return frozenset(found)


def relation_parts(phrase: str) -> tuple[str, ...]:
    """The cardinal relations in a canonical phrase: one, or two for a diagonal. Raises ValueError for other phrases."""
    if phrase in CARDINALS:
        return (phrase,)
    if phrase in DIAGONALS:
        vertical, _, horizontal = phrase.partition(" and ")
        return vertical, horizontal
    raise ValueError(f"{phrase!r} is no relation of the small world; it knows {', '.join(CARDINALS + DIAGONALS)}")


def with_article(noun: str) -> str:
    return f"{'an' if noun[0] in 'aeiou' else 'a'} {noun}"


def _relation_word(rng: np.random.Generator, subject: PlacedObject, other: PlacedObject) -> str:
    truth = sorted(true_relations(subject.box, other.box))
    if truth and rng.random() < TRUE_RELATION_SHARE:
        diagonal = [phrase for phrase in DIAGONALS if set(relation_parts(phrase)) == set(truth)]
        phrase = diagonal[0] if diagonal and rng.random() < 0.5 else truth[rng.integers(len(truth))]
    else:
        family = DIAGONALS if rng.random() < 0.15 else CARDINALS
        phrase = family[rng.integers(4)]
    if phrase in SYNONYMS and rng.random() < 0.1:
        return SYNONYMS[phrase][rng.integers(2)]
    return phrase


def _fill(form: MultiForm, names: list[str], words: list[str], comma: bool = False) -> str:
    template = form.text.replace(" and ", ", and ") if comma else form.text
    values = {f"r{k}": word for k, word in enumerate(words, 1)}
    return template.format(**dict(zip("ABCDE", names, strict=False)), **values)


def _caption(rng: np.random.Generator, objects: tuple[PlacedObject, ...]) -> str:
    names = [with_article(item.noun) for item in objects]
    if len(objects) == 1:
        text = names[0]
    elif len(objects) == 2:
        plain = rng.random() < 0.15
        text = f"{names[0]} {'and' if plain else _relation_word(rng, *objects)} {names[1]}"
    else:
        forms = [form for (count, _), form in MULTI_FORMS.items() if count == len(objects)]
        form = forms[rng.integers(len(forms))]
        words = [_relation_word(rng, objects[a], objects[b]) for a, b in form.pairs]
        text = _fill(form, names, words, comma=rng.random() < 0.3)
    return f"a photo of {text}" if rng.random() < 0.3 else text


def random_scene(rng: np.random.Generator, count: int | None = None, layout: Layout = UNET_LAYOUT) -> Scene:
    """A random scene of `count` different objects, by default as in training (1 to 5, mostly 2).

    Raises ValueError for a count out of range.
    """
    nouns = layout.nouns
    if count is None:
        draw = rng.random()
        count = 1 if draw < 0.08 else 2 if draw < 0.88 else int(rng.integers(3, 6))
    if not 1 <= count <= min(5, len(nouns)):
        raise ValueError(f"count must be 1 to {min(5, len(nouns))}, got {count}")
    choice = layout.few if count <= 2 else layout.many
    chosen = tuple(nouns[i] for i in rng.permutation(len(nouns))[:count])
    sizes = tuple(choice[k] for k in rng.integers(len(choice), size=count))
    objects = _place(rng, chosen, sizes, layout.grid)
    return Scene(render(objects, sizes, background(rng)), objects, _caption(rng, objects))


@dataclass(frozen=True)
class Prompt:
    """A test prompt and its relations, each (subject, relation phrase, object)."""

    text: str
    relations: tuple[tuple[str, str, str], ...]

    @property
    def nouns(self) -> tuple[str, ...]:
        """Every noun of the prompt once, in order of first mention."""
        return tuple(dict.fromkeys(noun for subject, _, other in self.relations for noun in (subject, other)))


SPLIT_SEEDS = {"tune": 1_000_003, "report": 2_000_003}
"""Seeds of the splits: "tune" for choosing settings, "report" for reporting. They share no ordered pair of nouns."""
_HALVING_SEED = 3_000_003


def two_object_prompts(count: int, split: str = "report", nouns: tuple[str, ...] = NOUNS,
                       relations: tuple[str, ...] = CARDINALS, featured: tuple[str, ...] = ()) -> list[Prompt]:
    """`count` prompts in a fixed order. Each split has its own half of the ordered pairs of nouns; relations take turns.

    featured: if given, each pair contains at least one of these nouns. Raises ValueError for an unknown split.
    """
    if split not in SPLIT_SEEDS:
        raise ValueError(f"split must be one of {', '.join(SPLIT_SEEDS)}, got {split!r}")
    pairs = [(a, b) for a in nouns for b in nouns if a != b and (not featured or {a, b} & set(featured))]
    shuffled = np.random.default_rng(_HALVING_SEED).permutation(len(pairs))
    pairs = [pairs[index] for index in shuffled[list(SPLIT_SEEDS).index(split)::2]]
    rng = np.random.default_rng(SPLIT_SEEDS[split])
    prompts: list[Prompt] = []
    while len(prompts) < count:
        for index in rng.permutation(len(pairs)):
            subject, other = pairs[index]
            relation = relations[len(prompts) % len(relations)]
            text = f"a photo of {with_article(subject)} {relation} {with_article(other)}"
            prompts.append(Prompt(text, ((subject, relation, other),)))
    return prompts[:count]


def multi_relation_prompts(count: int, objects: int, relations: int, split: str = "report",
                           nouns: tuple[str, ...] = NOUNS) -> list[Prompt]:
    """`count` prompts of the paper's form with that many objects and relations, which can all hold at once.

    A chain such as "A above B below C" does not relate A to C, so it may repeat a word but never contradicts itself.
    Raises ValueError for numbers without a form.
    """
    if (objects, relations) not in MULTI_FORMS:
        raise ValueError(f"there is no form with {objects} objects and {relations} relations; "
                         f"there are {sorted(MULTI_FORMS)}")
    form = MULTI_FORMS[objects, relations]
    rng = np.random.default_rng(SPLIT_SEEDS[split] + 10 * objects + relations)
    prompts = []
    for _ in range(count):
        chosen = [nouns[k] for k in rng.permutation(len(nouns))[:objects]]
        words = [CARDINALS[k] for k in rng.integers(4, size=relations)]
        text = _fill(form, [with_article(noun) for noun in chosen], words)
        triples = tuple((chosen[a], word, chosen[b]) for (a, b), word in zip(form.pairs, words, strict=True))
        prompts.append(Prompt(f"a photo of {text}", triples))
    return prompts
