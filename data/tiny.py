"""A tiny closed English world: one corpus and five tasks about it, made from a seed.

    python -m data.tiny --out DIR --seed 0

Everything here is SYNTHETIC. The files have the published formats of SST-2, MNLI, QQP, QNLI (GLUE) and SQuAD v1.1, so
the same readers serve them and the real data, but a score on them says nothing about English. They exist so that the
whole method runs in minutes, without a network, and so that its story can be seen: pre-training carries knowledge.

How: every list of concepts is cut in two. Concepts at even positions are `shown`: the tasks' training sets use only
these. Those at odd positions are `held`: the corpus speaks of them as often as of the others, the training sets never,
the dev sets mostly. That a held adjective is praise, that two held nouns name one thing, that two held attributes are
opposites can only be known from the corpus, where every document keeps to one concept and names it in all its ways.

Labels cannot be had from the surface: both sides of a pair always differ in wording, and every word that can decide a
label occurs with every label.
"""
import argparse
import json
import os
import random
import shutil
import tempfile
from pathlib import Path

# ---------------------------------------------------------------------------------------------------------------------
# The words

PEOPLE = ("Anna Clara Diana Ella Grace Helen Iris Julia Karen Laura Maria Nora "
          "Adam Boris Carl David Erik Frank George Henry Ivan Jacob Kevin Leo").split()
PLACES = "market garden shop harbor forest hotel farm beach castle museum station hospital cottage bridge".split()
COLOURS = "red blue green yellow black white brown pink".split()
NUMBERS = "two three four five six seven eight nine".split()
WORKS = "film movie play drama novel story song show".split()


def concepts(text):
    """'sofa/couch lamp/lantern' -> [('sofa', 'couch'), ('lamp', 'lantern')]: one tuple of names per concept."""
    return [tuple(names.split("/")) for names in text.split()]


KINDS = {  # kind: things, each with two names
    "furnishing": concepts("sofa/couch rug/carpet lamp/lantern cupboard/closet"),
    "garment": concepts("coat/jacket hat/cap scarf/shawl dress/gown"),
    "vehicle": concepts("car/automobile bike/bicycle boat/ship truck/lorry"),
    "animal": concepts("dog/hound rabbit/bunny horse/pony hen/chicken"),
    "container": concepts("box/crate bag/sack cup/mug bottle/flask"),
    "tool": concepts("hammer/mallet axe/hatchet spade/shovel broom/brush"),
    "paper": concepts("letter/note map/chart photo/snapshot poster/placard"),
    "treasure": concepts("jewel/gem coin/token crown/tiara statue/sculpture"),
}
THINGS = [thing for things in KINDS.values() for thing in things]
KIND_OF = {thing: kind for kind, things in KINDS.items() for thing in things}

# Attributes: a dimension has two poles, a pole two names.
DIMENSIONS = [tuple(concepts(pair)) for pair in (
    "clean/spotless dirty/filthy", "big/large small/little", "heavy/weighty light/airy", "old/ancient new/modern",
    "hard/stiff soft/fluffy", "wet/damp dry/arid", "cheap/affordable costly/expensive", "hot/warm cold/chilly",
    "loud/noisy quiet/silent", "fast/quick slow/sluggish", "strong/sturdy weak/fragile", "round/circular square/boxy",
    "thick/chunky thin/slim", "tall/high low/short", "full/filled empty/vacant", "tight/snug loose/baggy")]

PRAISE = ("splendid wonderful brilliant superb lovely charming delightful marvelous gripping funny moving clever "
          "elegant thrilling graceful stunning touching witty dazzling terrific").split()
BLAME = ("dreadful terrible boring awful dull tedious clumsy lazy ugly stale silly bland sloppy tiresome messy hollow "
         "dreary shallow lifeless horrid").split()


def shown(items):
    """What the tasks' training sets may use: two of three."""
    return [item for number, item in enumerate(items) if number % 3]


def held(items):
    """What only the corpus and the dev sets use: every third."""
    return list(items[::3])


HELD_SHARE = 0.8                # of the dev examples are about held concepts


def sentence(text):
    return text[0].upper() + text[1:]


def shuffled(r, items):
    items = list(items)
    r.shuffle(items)
    return items


def an(word):
    """The word with its article: 'a coat', 'an axe'."""
    return f"{'an' if word[0] in 'aeiou' else 'a'} {word}"


# ---------------------------------------------------------------------------------------------------------------------
# The corpus: every document keeps to one concept, and names it in all its ways

def thing_document(r, thing):
    """Who has it, where, its colour and price, told and asked with both of its names."""
    person, place, colour, number = r.choice(PEOPLE), r.choice(PLACES), r.choice(COLOURS), r.choice(NUMBERS)
    lines = [lambda x: f"{person} bought the {x} at the {place}.",
             lambda x: f"{person} found the {x} near the {place}.",
             lambda x: f"the {x} was {colour}.", lambda x: f"the {colour} {x} was at the {place}.",
             lambda x: f"the {x} cost {number} coins.", lambda x: f"the {x} is a kind of {KIND_OF[thing]}.",
             lambda x: f"who bought the {x}? {person}.", lambda x: f"what colour was the {x}? {colour}.",
             lambda x: f"where was the {x}? at the {place}.", lambda x: f"how much was the {x}? {number} coins.",
             lambda x: f"{person} liked the {x}.", lambda x: f"this {thing[0]} is also called {an(thing[1])}."]
    return [sentence(line(r.choice(thing))) for line in r.sample(lines, r.randint(6, 8))]


def attribute_document(r, dimension, pole):
    """One pole of a dimension, said of many things; its opposite only behind a `not` or a `never`."""
    names, opposite = dimension[pole], dimension[1 - pole]

    def line():
        thing, (name, other) = r.choice(r.choice(THINGS)), shuffled(r, names)
        against = r.choice(opposite)
        return r.choice([f"the {thing} was {name}.", f"the {thing} was {name}, not {against}.",
                         f"{r.choice(PEOPLE)} has a very {name} {thing}.", f"this {thing} is {name}, so it is {other}.",
                         f"{an(name)} {thing} is never {against}.", f"how {name} the {thing} is!",
                         f"this {thing} became {name}."])
    return [sentence(line()) for _ in range(r.randint(6, 8))]


def review_document(r, words, others, praise):
    """A work with its good or bad adjectives, and what people did."""
    work = r.choice(WORKS)
    acts = (["people cheered and smiled", "i loved it", "what a success", "everyone was happy"] if praise else
            ["people yawned and frowned", "i hated it", "what a failure", "everyone was angry"])

    def line():
        (first, second), act = r.sample(words, 2), r.choice(acts)
        return r.choice([f"the {work} was {first}, so {r.choice(acts[:2])}.", f"the {work} was {first} and {second}.",
                         f"{act}: the {work} was {first}.", f"{act}, the {work} was {first} and {second}.",
                         f"the {work} was {first}: {act}.",
                         f"the {work} was not {r.choice(others)}, so {r.choice(acts[:2])}."])
    return [sentence(line()) for _ in range(6)]


def corpus(r, rounds):
    """`rounds` times one document per thing and per pole, and a few reviews of each kind, in random order."""
    documents = []
    for _ in range(rounds):
        documents += [thing_document(r, thing) for thing in THINGS + r.sample(THINGS, 16)]
        documents += [attribute_document(r, dimension, pole) for dimension in DIMENSIONS for pole in (0, 1)]
        for _ in range(12):
            documents += [review_document(r, PRAISE, BLAME, True), review_document(r, BLAME, PRAISE, False)]
    return shuffled(r, documents)


# ---------------------------------------------------------------------------------------------------------------------
# The tasks. `half` is `shown` for the training sets; dev sets mostly take `held`.

def sentiment(r, half, label):
    """SST-2: one adjective decides, and a `not` turns it round."""
    praise, blame, work = half(PRAISE), half(BLAME), r.choice(WORKS)
    negated = r.random() < 0.3
    good = (label == 1) != negated
    words = r.sample(praise if good else blame, 2)
    if negated:
        return sentence(r.choice([f"the {work} was not {words[0]}.", f"this {work} is not {words[0]}.",
                                  f"i think the {work} was not {words[0]}."]))
    return sentence(r.choice([f"the {work} was {words[0]} and {words[1]}.", f"a {words[0]} {work}.",
                              f"i think the {work} was {words[0]}.", f"what a {words[0]}, {words[1]} {work}!"]))


def inference(r, half, label, mismatched):
    """MNLI: the same attribute by its other name, its opposite, or one of another dimension."""
    first, other = r.sample(half(DIMENSIONS), 2)
    pole = r.randint(0, 1)
    thing, person = r.choice(r.choice(THINGS)), r.choice(PEOPLE)
    name = r.choice(first[pole])
    second = {"entailment": next(word for word in first[pole] if word != name),
              "contradiction": r.choice(first[1 - pole]), "neutral": r.choice(other[r.randint(0, 1)])}[label]
    premises = [f"{person} has {an(name)} {thing}.", f"the {thing} of {person} was {name}."]
    if mismatched:
        premises = [f"how {name} the {thing} is!", f"this {thing} became {name}."]
    return sentence(r.choice(premises)), sentence(r.choice([f"the {thing} was {second}.", f"{an(second)} {thing}."]))


def other_thing(r, thing, half):
    return r.choice([other for other in half(THINGS) if other != thing])


def duplicate(r, half, label):
    """QQP: the same question about one thing by its two names, or about two things."""
    thing = r.choice(half(THINGS))
    first, second = shuffled(r, thing)
    if label == 0:
        second = r.choice(other_thing(r, thing, half))
    asked = r.choice([("who bought the {}?", "which person paid for the {}?"),
                      ("where was the {}?", "at which place was the {}?"),
                      ("what colour was the {}?", "which colour had the {}?"),
                      ("how much was the {}?", "how many coins did the {} cost?")])
    asked = shuffled(r, asked)
    return sentence(asked[0].format(first)), sentence(asked[1].format(second))


def fact(r, name, asked):
    """(sentence about `name`, [(question about `asked`, its answer in the sentence)])."""
    person, place, colour, number = r.choice(PEOPLE), r.choice(PLACES), r.choice(COLOURS), r.choice(NUMBERS)
    who, where = (f"Who bought the {asked}?", person), (f"Where was the {asked}?", place)
    hue, price = (f"What colour was the {asked}?", colour), (f"How much was the {asked}?", number)
    return r.choice([(f"{person} bought the {name} at the {place}.", [who, where]),
                     (f"The {colour} {name} was at the {place}.", [hue, where]),
                     (f"{person} bought the {colour} {name}.", [who, hue]),
                     (f"The {name} cost {number} coins.", [price]),
                     (f"The {colour} {name} cost {number} coins.", [hue, price])])


def answerable(r, half, label):
    """QNLI: does the sentence answer the question? If not, it tells the same of another thing."""
    thing = r.choice(half(THINGS))
    name, asked = shuffled(r, thing)
    if label == "not_entailment":
        name = r.choice(other_thing(r, thing, half))
    told, questions = fact(r, name, asked)
    return r.choice(questions)[0], told


def reading(r, half):
    """SQuAD: (context of four facts about one thing, a question about one of them, answer, its place)."""
    thing = r.choice(half(THINGS))
    person, place, colour, number = (r.choice(half(words)) for words in (PEOPLE, PLACES, COLOURS, NUMBERS))

    def name():
        return r.choice(thing)
    told = {person: r.choice([f"{person} bought the {name()}.", f"the {name()} was bought by {person}."]),
            place: r.choice([f"the {name()} was at the {place}.", f"at the {place} was the {name()}."]),
            colour: r.choice([f"the {name()} was {colour}.", f"{colour} was the {name()}."]),
            number: r.choice([f"the {name()} cost {number} coins.", f"{number} coins was the price of the {name()}."])}
    question, answer = r.choice([(f"who bought the {name()}?", person), (f"where was the {name()}?", place),
                                 (f"what colour was the {name()}?", colour), (f"how much was the {name()}?", number)])
    context = " ".join(sentence(told[text]) for text in shuffled(r, told))
    fact = sentence(told[answer])
    answer = answer if answer in fact else sentence(answer)
    return context, sentence(question), answer, context.index(fact) + fact.index(answer)


# ---------------------------------------------------------------------------------------------------------------------
# The files

def write_table(path, header, rows):
    lines = ["\t".join(header)] + ["\t".join(str(field) for field in row) for row in rows]
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")


def examples(r, size, labels, make, dev):
    """[(label, whatever make(half, label) gives)] with every label as often, in random order."""
    def half():
        return held if dev and r.random() < HELD_SHARE else shown
    return shuffled(r, [(label, make(half(), label)) for label in labels for _ in range(size // len(labels))])


def write_tasks(folder, r, train, dev):
    """The five tasks' files under `folder`, `train` and `dev` examples each."""
    for name, size, is_dev in (("train", train, False), ("dev", dev, True)):
        rows = examples(r, size, (0, 1), lambda half, label: sentiment(r, half, label), is_dev)
        write_table(folder / "SST-2" / f"{name}.tsv", ["sentence", "label"], [(text, label) for label, text in rows])
        rows = examples(r, size, (0, 1), lambda half, label: duplicate(r, half, label), is_dev)
        write_table(folder / "QQP" / f"{name}.tsv", ["id", "qid1", "qid2", "question1", "question2", "is_duplicate"],
                    [(i, 2 * i + 1, 2 * i + 2, *pair, label) for i, (label, pair) in enumerate(rows)])
        rows = examples(r, size, ("entailment", "not_entailment"),
                        lambda half, label: answerable(r, half, label), is_dev)
        write_table(folder / "QNLI" / f"{name}.tsv", ["index", "question", "sentence", "label"],
                    [(i, *pair, label) for i, (label, pair) in enumerate(rows)])
        genres = (("dev_matched", False), ("dev_mismatched", True)) if is_dev else (("train", False),)
        for file, mismatched in genres:
            rows = examples(r, size, ("entailment", "neutral", "contradiction"),
                            lambda half, label: inference(r, half, label, mismatched), is_dev)
            write_table(folder / "MNLI" / f"{file}.tsv", ["index", "genre", "sentence1", "sentence2", "gold_label"],
                        [(i, "remarks" if mismatched else "reports", *pair, label)
                         for i, (label, pair) in enumerate(rows)])
        write_questions(folder / "SQuAD" / f"{name}-v1.1.json", r, size, is_dev)


def write_questions(path, r, size, dev):
    paragraphs = []
    for number, (_, (context, question, answer, start)) in enumerate(
            examples(r, size, ("span",), lambda half, label: reading(r, half), dev)):
        entry = {"id": f"{path.stem}-{number}", "question": question,
                 "answers": [{"text": answer, "answer_start": start}]}
        paragraphs.append({"context": context, "qas": [entry]})
    path.parent.mkdir(parents=True, exist_ok=True)
    content = {"version": "1.1", "data": [{"title": "tiny world", "paragraphs": paragraphs}]}
    path.write_text(json.dumps(content, indent=0), encoding="utf-8")


def write(folder, seed=0, rounds=80, train=3000, dev=900):
    """Write corpus.txt and the folders SST-2 MNLI QQP QNLI SQuAD under `folder`; the same bytes for the same seed."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    documents = corpus(random.Random(f"corpus {seed}"), rounds)
    (folder / "corpus.txt").write_text("\n\n".join("\n".join(lines) for lines in documents) + "\n", encoding="utf-8")
    write_tasks(folder, random.Random(f"tasks {seed}"), train, dev)


def ensure(folder, seed=0):
    """`folder`, written first if it is not there. It appears whole or not at all, also when two processes want it."""
    folder = Path(folder)
    if not folder.is_dir():
        folder.parent.mkdir(parents=True, exist_ok=True)
        temporary = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.parent))
        try:
            write(temporary, seed)
            os.chmod(temporary, 0o755)
            os.replace(temporary, folder)
        except OSError:
            if not folder.is_dir():             # not because another process was faster
                raise
        finally:
            shutil.rmtree(temporary, ignore_errors=True)
    return folder


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", required=True, help="folder to write to")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    write(arguments.out, arguments.seed)
    print(f"wrote {arguments.out}")
