"""Word lists of the reader: words that join phrases, words that begin one, and nouns by kind."""
from __future__ import annotations


def _set(words: str) -> frozenset[str]:
    return frozenset(words.split())


# --- words that begin a noun phrase
ORDINALS = _set("another other second third")
NUMBERS = _set("one two three four five six seven eight nine ten eleven twelve")
DETERMINERS = ORDINALS | NUMBERS | _set(
    "a an the some this these those his her its their my your our each every several many few")
POSSESSIVES = _set("his her its their")

# --- words that join phrases, by the kind of their Mark
CLAUSE_WORDS = _set("while where whereas when but then break showing shows show depicting depicts featuring features "
                    "containing contains including")
JOINTS = {word: kind for kind, words in {
    "and": _set("and plus & +"), "or": _set("or"), "with": _set("with"), "both": _set("both"), "clause": CLAUSE_WORDS,
    "relative": _set("which who whose whom"), "it": _set("it"), "he": _set("he she him"), "they": _set("they them"),
}.items() for word in words}
NEGATIONS = _set("not no cannot without neither except excluding nowhere")
NEGATING_ADVERBS = _set("hardly seldom rarely scarcely barely unlikely")  # "a rarely seen dog" has one that negates nothing else
SEVERAL_WORDS = {"rather than": "not", "instead of": "not", "as opposed to": "not", "no longer": "not",
                 "anything but": "not", "everything but": "not", "anywhere but": "not", "everywhere but": "not",
                 "by no means": "not", "no more": "not", "in no way": "not", "on no account": "not",
                 "far from": "not", "nowhere near": "not",
                 "without any": "never", "without a single": "never", "used to": "never",
                 **{f"{adverb} ever": "not" for adverb in ("hardly", "scarcely", "barely", "rarely")},
                 **{f"{verb} to": "never" for verb in ("refuse refuses refused refusing fail fails failed failing").split()},
                 "false that": "deny", "untrue that": "deny", "not true that": "deny", "not the case that": "deny",
                 "negative prompt": "deny", "as well as": "and",
                 "together with": "with", "along with": "with", "both of": "both"}
DENIALS = {  # "never" negates all of its clause, "deny" the rest of the sentence
    "lacking": "never", "lacks": "never", "avoid": "deny", "avoiding": "deny", "avoids": "deny"}
CONTRACTIONS = {"that's": "that is", "who's": "who is", "which's": "which is", "it's": "it is", "he's": "he is",
                "she's": "she is", "there's": "there is", "here's": "here is", "they're": "they are",
                "what's": "what is", "nor": "or not"}
UNCLEAR = _set("what nothing everything something someone everyone nobody all little much whatever itself himself herself "
               "themselves me us")
BESIDE = _set("next beside besides behind near nearby inside alongside close adjacent")
PREPOSITIONS = _set(
    "in on at by from for into onto to through across around along among between against toward towards out off upon "
    "within outside like about during before after since as via near above below over under beneath "
    "underneath atop front per")

# --- verbs
VERBS = {word: kind for kind, words in {
    "is": _set("is was be been being there sits stands lies hangs floats flies hovers rests sleeps lay lays sat stood hung "
               "rested floated hovered flew"),
    "are": _set("are were"),
}.items() for word in words}
OTHER_VERBS = _set(
    "has have had having can could should must will would may might do does sit lie hover stay stays remain remains "
    "appear appears seem seems say says reads looks goes holds wears watches eats runs walks jumps plays")
PARTICIPLES = _set(
    "placed located positioned situated seated seen shown stacked hung perched parked laid mounted set made "
    "surrounded covered painted drawn rendered photographed taken left right dressed hidden buried suspended crouched "
    "curled tucked titled called named labeled labelled captioned filled decorated topped loaded lined")
PREDICATIVE = _set("asleep awake alone barefoot visible")  # adjectives that follow their noun: "a woman, alone under a tree"
PLURAL_VERBS = _set("stand fly rest float hang sit lie sleep hover look hold wear watch eat run walk jump play set")
POSITION_VERBS = _set("stand fly rest float hang sit lie sleep hover")
COMMANDS = _set("draw paint generate create make put place show imagine see render add let i we you here please")

# --- adjectives and other words that do not end a noun phrase
ADJECTIVES = _set(
    "big small large little tiny huge giant tall short long old young new red green blue yellow purple pink brown "
    "black white grey gray golden silver cute fluffy happy sad beautiful pretty shiny wooden plastic metal striped "
    "spotted furry soft dark bright colorful colourful round very")
LATE_ADVERBS = _set("just far high right straight also up down there here together alone close only side way well "
                    "even away almost nearly exactly partly")
LY_NOUNS = _set("butterfly family lily jelly fly belly assembly dragonfly firefly bully trolly dolly teddy")
ING_NOUNS = _set("ring king string wing building painting swing ceiling earring clothing wedding thing sibling duckling "
                 "pudding dumpling drawing sling railing icing awning spring bling herring landing evening morning "
                 "lightning offspring being stocking")
ING_ATTRIBUTES = _set("dining parking washing sewing rocking cutting baking frying shopping boxing "
                      "vending ironing")

# --- nouns by kind
PICTURES = _set(
    "photo photos photograph picture pictures image images painting drawing render rendering sketch illustration shot "
    "view close-up closeup portrait watercolor watercolour cartoon depiction scene screenshot snapshot artwork art "
    "poster collage engraving etching mosaic model")
FRAME = _set("image picture photo photograph frame canvas page shot screen")
ALWAYS_FRAME = _set("scene composition viewer camera foreground background backdrop")
AMBIENT = _set("surface sea ocean water sun moon moonlight starlight sunlight sunshine sky skies rain snow stars light lights "
               "lighting night clouds")
SCENES = AMBIENT | _set(
    "garden park room kitchen bedroom bathroom office studio street road city town village forest woods field meadow "
    "beach desert mountain mountains valley landscape cityscape seascape scenery interior lake river hill hills ground "
    "world place sunset sunrise")
BODY = _set("eye eyes ear ears nose mouth lips cheek face head hair neck shoulder shoulders chest breast breasts arm arms "
            "hand hands finger fingers back waist hip hips leg legs knee knees foot feet body forehead chin")
ATTRIBUTES = BODY | _set(
    "hat cap beard moustache mustache glasses sunglasses scarf crown helmet fur tail horns wings collar tie bow ribbon "
    "shirt dress jacket coat shoes boots backpack smile stripes spots skirt pants jeans shorts hoodie sweater uniform "
    "kimono armor armour cape cloak gloves socks thighhighs stockings ponytail twintails braid bangs earrings necklace "
    "tattoo scar freckles makeup expression clothes outfit")
"""Clothes, accessories and body parts: they describe the noun that has them."""
QUALITY = _set(
    "masterpiece quality detailed detail details realistic photorealistic hyperrealistic resolution res hd uhd 4k 8k hdr "
    "solo focus bokeh style artstation cinematic lighting sharp nsfw sfw highres absurdres monochrome sketch render "
    "octane unreal engine artist trending background outdoors indoors")
"""Last words of tags that name no object in the picture."""
PEOPLE = _set("girl girls boy boys woman women man men person people child children kid kids lady guy baby toddler knight "
              "wizard witch king queen prince princess astronaut soldier drummer guitarist dancer teacher nurse doctor "
              "farmer chef clown pirate samurai ninja boyfriend girlfriend couple monk warrior elf girlie policeman")
ANIMALS = _set("dog dogs cat cats bird birds horse horses cow cows sheep goat pig lion tiger bear bears elephant giraffe "
               "zebra monkey rabbit bunny fox wolf deer mouse rat squirrel duck goose swan owl eagle parrot penguin fish "
               "shark whale dolphin frog turtle snake lizard dragon dinosaur unicorn butterfly bee bees spider crab "
               "octopus puppy kitten chicken rooster hen panda koala kangaroo camel donkey")
