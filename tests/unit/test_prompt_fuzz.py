"""Prompts made by a grammar: the relations that went in come out, nothing raises, and nothing takes long.

The ordinary suite reads a few hundred of them; `python dev.py test -m fuzz` reads thousands.
"""
from __future__ import annotations

import random
import time
from dataclasses import dataclass, field

import pytest
from learn_to_steer.prompts.graph import understand
from learn_to_steer.prompts.relations import RelationError, split_occurrence
from learn_to_steer.prompts.text import occurrences, plain_text

THINGS = ("teddy bear", "giraffe", "airplane", "red umbrella", "fire hydrant", "orange", "tv", "parking meter", "old lamp",
          "dog", "cat", "bicycle", "swimming pool", "black and white cow", "dining table", "t-rex", "cup of tea", "vase",
          "embedding:thing-1", "wine glass", "sandwich", "green apple", "potted plant", "toaster")
WORDS = {"above": ("above", "on top of", "over", "atop", "right above", "high above", "directly above"),
         "below": ("below", "under", "beneath", "underneath", "on the bottom of", "directly below"),
         "to the left of": ("to the left of", "left of", "on the left side of", "on the left of", "to the far left of"),
         "to the right of": ("to the right of", "right of", "on the right side of", "at the right of"),
         "above and to the left of": ("above and to the left of", "to the upper left of", "top left of"),
         "below and to the right of": ("below and to the right of", "to the lower right of", "at the bottom right of")}
CARDINAL = tuple(WORDS)[:4]
DISTANCES = ("two meters", "10 cm", "a bit", "slightly", "a few steps", "half a meter", "1.5 m", "a little", "about three feet")
FILLERS = ("masterpiece, best quality", "soft light", "seen from above", "house under construction", "8k", "oil painting",
           "highly detailed", "looking at viewer", "view from below", "man over 60", "(bokeh:1.2)", "cinematic")
POSTURES = ("sitting", "standing", "placed", "lying", "floating")
INSERTS = (", with a red collar,", ", which is blue,", ", wearing a hat,", " that is shiny", " \\(style\\)", ", not a robot,",
           " rather than a robot", " instead of a robot")


@dataclass
class Made:
    """A prompt, the relations that it says, and how many of its clauses say nothing that can be steered."""

    text: str = ""
    relations: set[tuple[str, str, str]] = field(default_factory=set)
    unclear: int = 0
    sides: bool = False


class Grammar:
    def __init__(self, seed: int):
        self.random = random.Random(seed)
        self.things = self.random.sample(THINGS, len(THINGS))

    def thing(self) -> str:
        return self.things.pop()

    def phrase(self, thing: str) -> str:
        """With an article, and sometimes with a weight."""
        if self.random.random() < 0.15:
            thing = f"({thing}:{self.random.choice(('1.2', '.9', '1e0', ' 1.1 '))})"
        if thing.startswith("embedding"):
            return thing
        return self.random.choice(("a" if thing.lstrip("(")[0] not in "aeiou" else "an", "the")) + f" {thing}"

    def clause(self) -> Made:
        return self.random.choice((self.plain, self.chain, self.inserted, self.measured, self.posture, self.inverted,
                                   self.pronoun, self.sides, self.shared, self.both, self.unclear))()

    def plain(self) -> Made:
        one, other, name = self.thing(), self.thing(), self.random.choice(tuple(WORDS))
        verb = self.random.choice(("", " is", " sits", " that's", " which is", " located"))
        return Made(f"{self.phrase(one)}{verb} {self.random.choice(WORDS[name])} {self.phrase(other)}", {(one, name, other)})

    def chain(self) -> Made:
        things = [self.thing() for _ in range(self.random.randint(3, 4))]
        made = Made(self.phrase(things[0]))
        for one, other in zip(things, things[1:], strict=False):
            name = self.random.choice(tuple(WORDS))
            made.text += f" {self.random.choice(WORDS[name])} {self.phrase(other)}"
            made.relations.add((one, name, other))
        return made

    def inserted(self) -> Made:
        one, other, name = self.thing(), self.thing(), self.random.choice(CARDINAL)
        text = f"{self.phrase(one)}{self.random.choice(INSERTS)} {self.random.choice(WORDS[name])} {self.phrase(other)}"
        return Made(text, {(one, name, other)})

    def measured(self) -> Made:
        one, other, name = self.thing(), self.thing(), self.random.choice(tuple(WORDS))
        words = WORDS[name][0]
        return Made(f"{self.phrase(one)} {self.random.choice(DISTANCES)} {words} {self.phrase(other)}", {(one, name, other)})

    def posture(self) -> Made:
        one, other, name = self.thing(), self.thing(), self.random.choice(CARDINAL)
        words = f"{self.random.choice(POSTURES)} {self.random.choice(WORDS[name])}"
        return Made(f"{self.phrase(one)}, {words} {self.phrase(other)}", {(one, name, other)})

    def inverted(self) -> Made:
        one, other, name = self.thing(), self.thing(), self.random.choice(CARDINAL)
        return Made(f"{name} {self.phrase(other)} {self.random.choice(('is', 'sits', 'hangs'))} {self.phrase(one)}",
                    {(one, name, other)})

    def pronoun(self) -> Made:
        one, other, name = self.thing(), self.thing(), self.random.choice(CARDINAL)
        joint = self.random.choice((" with ", ", ", ". There is "))
        return Made(f"{self.phrase(other)}{joint}{self.phrase(one)} {self.random.choice(WORDS[name])} it",
                    {(one, name, other)})

    def sides(self) -> Made:
        one, other = self.thing(), self.thing()
        first, second, name = self.random.choice((("on the left", "on the right", "to the left of"),
                                                  ("at the top", "at the bottom", "above"),
                                                  ("to the right", "to the left", "to the right of")))
        joint = self.random.choice((", ", " and ", " while "))
        return Made(f"{self.phrase(one)} {first}{joint}{self.phrase(other)} {second}",
                    {(one, name, other) if first != "to the right" else (other, "to the left of", one)}, sides=True)

    def shared(self) -> Made:
        one, two, other, name = self.thing(), self.thing(), self.thing(), self.random.choice(CARDINAL)
        words = self.random.choice(WORDS[name])
        return Made(f"{self.phrase(one)} and {self.phrase(two)} are {words} {self.phrase(other)}",
                    {(one, name, other), (two, name, other)})

    def both(self) -> Made:
        one, other, third = self.thing(), self.thing(), self.thing()
        name, second = self.random.choice(CARDINAL), self.random.choice(CARDINAL)
        return Made(f"{self.phrase(one)} {name} {self.phrase(other)}, {self.phrase(third)} {second} both",
                    {(one, name, other), (third, second, one), (third, second, other)})

    def unclear(self) -> Made:
        one, other, name = self.phrase(self.thing()), self.phrase(self.thing()), self.random.choice(CARDINAL)
        words = self.random.choice(WORDS[name])
        third = self.phrase(self.thing())
        return Made(self.random.choice((f"{one} isn't {words} {other}", f"neither {one} nor {third} {words} {other}",
                                        f"{one} or {third} {words} {other}", f"{one}, {third}, standing {words} {other}",
                                        f"{one} is not {words} {other}", f"{words} {other}",
                                        f"{one} next to {other}")), unclear=1)

    def prompt(self) -> Made:
        """One to three clauses, each a sentence of its own, sometimes with words that say nothing of places."""
        made, sides = Made(), 0
        pieces: list[str] = []
        for _ in range(self.random.randint(1, 3)):
            clause = self.clause()
            sides += clause.sides
            if clause.sides and sides > 1:  # places of two sentences are related to each other
                continue
            pieces.append(clause.text[0].upper() + clause.text[1:] if self.random.random() < 0.5
                          and not clause.text.startswith("embedding") else clause.text)
            made.relations |= clause.relations
            made.unclear += clause.unclear
            if self.random.random() < 0.4:
                pieces[-1] += f", {self.random.choice(FILLERS)}"
        made.text = self.random.choice((". ", ".\n", "; ", ".  ")).join(pieces)
        if self.random.random() < 0.3 and not made.text.lower().startswith(tuple(WORDS)):
            made.text = f"{self.random.choice(('a photo of', 'an oil painting of', 'There is'))} {made.text}"
        return made


def read(made: Made) -> None:
    graph = understand(made.text)
    found = {(relation.subject.lower(), " and ".join(relation.predicates), relation.object.lower())
             for relation in graph.relations}
    assert found == made.relations, made.text
    assert len(graph.not_understood) == made.unclear, (made.text, graph.not_understood)


def read_damaged(made: Made, rng: random.Random) -> None:
    """Whatever the words, nothing raises, and what is found stands in the prompt."""
    words = made.text.split(" ")
    for _ in range(rng.randint(1, 4)):
        place = rng.randrange(len(words))
        damage = rng.choice(("drop", "double", "swap", "junk"))
        if damage == "drop" and len(words) > 1:
            del words[place]
        elif damage == "double":
            words.insert(place, words[place])
        elif damage == "swap":
            other = rng.randrange(len(words))
            words[place], words[other] = words[other], words[place]
        else:
            words.insert(place, rng.choice(("\\(", ")", "\"", "it", "both", "not", "of", "\n", ":", "the", "\0", "embedding:",
                                            "left", "above", "on the right", "'", "former", "with", ",", "1.2)", "\ue000")))
    text = " ".join(words)
    graph = understand(text)
    for relation in graph.relations:
        for phrase in (relation.subject, relation.object):
            bare, number = split_occurrence(phrase)
            assert len(occurrences(bare, plain_text(text))) >= number, (text, phrase)
    try:
        graph.check()
    except RelationError as error:
        assert "contradict" in str(error) or "itself" in str(error)


PIECES = ("a dog ", "to the left of ", "left ", "above ", "and ", "a cat, ", "on the left, ", "it ", "both ", "not ", "\"", "'",
          "\\(", "\\)", "(", ":1.2)", "with ", "two meters ", "\n", ". ", "or ", "embedding:x ", "of ", "the ", "  ", "-", "a",
          "which is ", "in the upper right corner of ", "the image ", "neither ", "rather than ", "1", "«", "“", "him ")


def read_long(rng: random.Random) -> None:
    """10,000 characters of one to four pieces, again and again, take less than a second."""
    chosen = [rng.choice(PIECES) for _ in range(rng.randint(1, 4))]
    if rng.random() < 0.3:
        chosen.append("thing{number} ")
    text = ""
    while len(text) < 10000:
        text += "".join(chosen).replace("{number}", str(len(text)))
    text = text[:10000]
    start = time.process_time()
    graph = understand(text)
    taken = time.process_time() - start
    assert taken < 1, (chosen, taken, len(graph.relations), len(graph.not_understood))


def fuzz(prompts: int, long: int, seed: int) -> None:
    relations = 0
    for number in range(prompts):
        made = Grammar(seed + number).prompt()
        read(made)
        relations += len(made.relations)
        read_damaged(made, random.Random(seed + number))
    for number in range(long):
        read_long(random.Random(seed + number))
    assert relations > prompts  # the grammar says something


def test_grammar():
    fuzz(prompts=300, long=30, seed=0)


@pytest.mark.fuzz
def test_grammar_at_length():
    fuzz(prompts=5000, long=400, seed=1000)
