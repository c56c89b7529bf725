"""A tiny closed English world: one corpus and five tasks about it, made from a seed.

    python -m data.tiny --out DIR --seed 0

Everything here is SYNTHETIC. The files have the published formats of SST-2, MNLI, QQP, QNLI (GLUE) and SQuAD v1.1, so
the same readers serve them and the real data, but a score on them says nothing about English. They exist so that the
whole method runs in minutes, without a network, and so that its story can be seen: pre-training carries knowledge.

How: a concept (a thing, an attribute, praise, blame) has several names, and every list of names is cut in two. Half
are `shown`: the tasks' training sets use only these. The others are `held`: the corpus speaks of a concept by all its
names alike, the training sets never use the held ones, the dev sets mostly. That a held adjective is praise, that two
held nouns name one thing, that two held attributes are opposites can only be known from the corpus, where a document
keeps to one concept, names it in all its ways and says what comes of it.

Labels cannot be had from the surface: both sides of a pair always differ in wording, and every word that can decide a
label occurs with every label.
"""
import argparse
import hashlib
import json
import os
import random
import shutil
import tempfile
from pathlib import Path

# Where the bundled one is written, on first use; another version of this file writes another one.
HOME = Path(__file__).resolve().parent / "tiny" / hashlib.sha256(Path(__file__).read_bytes()).hexdigest()[:8]

# ---------------------------------------------------------------------------------------------------------------------
# The words

PEOPLE = ("Anna Clara Diana Ella Grace Helen Iris Julia Karen Laura Maria Nora "
          "Adam Boris Carl David Erik Frank George Henry Ivan Jacob Kevin Leo").split()
PLACES = "market garden shop harbor forest hotel farm beach castle museum station hospital bridge".split()
COLOURS = "red blue green yellow black white brown pink".split()
NUMBERS = "two three four five six seven eight nine".split()
WORKS = "film movie play drama novel story song show".split()

USES = {                        # what people do with a thing: the thing, by its names
    "slept on": "sofa/couch/settee/divan", "drove": "car/automobile/sedan/limousine",
    "sailed": "boat/ship/vessel/yacht", "rode": "horse/pony/mare/stallion", "wore": "coat/jacket/parka/anorak",
    "put on": "hat/cap/bonnet/beret", "fed": "dog/hound/puppy/terrier", "drank from": "cup/mug/goblet/beaker",
    "packed": "bag/sack/pouch/satchel", "opened": "box/crate/chest/carton", "read": "letter/note/message/memo",
    "lived in": "house/cottage/cabin/villa",
}
THINGS = [names.split("/") for names in USES.values()]

# Attributes by their names, in front of their opposites. Both poles are spoken of by one word (`look`); each has
# sayings of its own. Without the word nothing would tell a held opposite from a stranger, without the sayings nothing
# would tell it from a synonym: the two poles keep the same company.
ATTRIBUTES = {aspect: [(names.split("/"), sayings) for names, sayings in poles.items()] for aspect, poles in {
    "look": {"clean/spotless/tidy/neat": ("it shone", "nobody had to wash it"),
             "dirty/filthy/muddy/grimy": ("it smelled", "someone had to scrub it")},
    "size": {"big/large/huge/giant": ("it filled the room", "everyone stepped aside"),
             "small/little/tiny/slight": ("it fitted in one hand", "nobody noticed it")},
    "age": {"old/ancient/aged/antique": ("grandmother knew it", "it came from the attic"),
            "new/modern/recent/fresh": ("it came last week", "the paint was bright")},
    "price": {"cheap/affordable/inexpensive/budget": ("anyone could pay for it", "money was left over"),
              "costly/expensive/pricey/dear": ("only the rich could have it", "the bank gave a loan")},
    "feel": {"wet/damp/moist/soaked": ("rain had fallen", "water dripped on the floor"),
             "dry/arid/parched/dusty": ("the sun had burned all day", "there was sand on it")},
    "make": {"strong/sturdy/solid/robust": ("it never broke", "it carried a heavy load"),
             "weak/fragile/flimsy/frail": ("it soon broke", "it was handled with care")},
}.items()}
DIMENSIONS = [[names for names, _ in poles] for poles in ATTRIBUTES.values()]

PRAISE = ("splendid wonderful brilliant superb lovely charming delightful marvelous gripping funny moving clever "
          "elegant thrilling graceful stunning touching witty dazzling terrific").split()
BLAME = ("dreadful terrible boring awful dull tedious clumsy lazy ugly stale silly bland sloppy tiresome messy hollow "
         "dreary shallow lifeless horrid").split()


def shown(names):
    """What the tasks' training sets may use."""
    return names[::2]


def held(names):
    """What only the corpus and the dev sets use."""
    return names[1::2]


HELD_SHARE = 0.8                # of the dev examples use held names


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

def thing_document(r, use, names):
    """Who has it, what for, where, its colour and price, told and asked with all of its names."""
    person, place, colour, number = r.choice(PEOPLE), r.choice(PLACES), r.choice(COLOURS), r.choice(NUMBERS)
    lines = [lambda x, y: f"{person} bought the {x} at the {place}.",
             lambda x, y: f"{person} found the {x}, {an(y)}, near the {place}.",
             lambda x, y: f"the {x} was {colour}, so the {y} is {colour}.",
             lambda x, y: f"the {colour} {x} was at the {place}.",
             lambda x, y: f"the {x} cost {number} coins.",
             lambda x, y: f"who bought the {x}? {person} bought the {y}.",
             lambda x, y: f"what colour was the {x}? the {y} was {colour}.",
             lambda x, y: f"where was the {x}? the {y} was at the {place}.",
             lambda x, y: f"how much was the {x}? the {y} cost {number} coins.",
             lambda x, y: f"{person} {use} the {x}.",
             lambda x, y: f"this {x} is also called {an(y)}.",
             lambda x, y: f"every {x} is {an(y)}."]

    def told(line):
        return sentence(line(*r.sample(names, 2)))
    return [told(line) for line in r.sample(lines, r.randint(4, 5))]


def attribute_document(r, aspect, pole):
    """One pole of an aspect, by all its names, with what people say then; its opposite only rarely, behind a `not`. Said
    of many things: if it were one, that alone would tell which sentences go together, and nobody would learn to compare
    two attributes."""
    (names, sayings), (opposites, _) = ATTRIBUTES[aspect][pole], ATTRIBUTES[aspect][1 - pole]
    things = r.choice([THINGS, [r.choice(THINGS)]])

    def line():
        x, (name, other), said = r.choice(r.choice(things)), r.sample(names, 2), r.choice(sayings)
        return r.choice([f"the {x} was {name}.", f"{r.choice(PEOPLE)} has a very {name} {x}.",
                         f"this {x} is {name}, so it is {other}.", f"how {name} the {x} is!",
                         f"this {x} became {name}.", f"the {name} {x} was very {other}.",
                         f"{an(name)} {x} is {an(other)} one.", f"the {x} was {name}, so {said}.",
                         f"{said}: the {x} was {name}.", f"the {aspect} of the {x} was {name}.",
                         f"what about its {aspect}? the {x} is {name}.",
                         f"the {x} was {name}, not {r.choice(opposites)}."])
    return [sentence(line()) for _ in range(r.randint(4, 5))]


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
    return [sentence(line()) for _ in range(5)]


def corpus(r, rounds):
    """`rounds` times a few documents per thing, per attribute and per kind of review, in random order."""
    documents = []
    for _ in range(rounds):
        documents += [thing_document(r, use, names) for use, names in list(zip(USES, THINGS)) * 4]
        documents += [attribute_document(r, aspect, pole) for aspect in list(ATTRIBUTES) * 4 for pole in (0, 1)]
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
    first, other = r.sample(DIMENSIONS, 2)
    pole, person, place = r.randint(0, 1), r.choice(PEOPLE), r.choice(PLACES)
    name, synonym = r.sample(half(first[pole]), 2)
    second = {"entailment": synonym, "contradiction": r.choice(half(first[1 - pole])),
              "neutral": r.choice(half(other[r.randint(0, 1)]))}[label]
    thing = r.choice(half(r.choice(THINGS)))
    premise = (r.choice([f"{person} has a very {name} {thing}.", f"how {name} the {thing} is!"]) if mismatched else
               r.choice([f"the {thing} was {name}.", f"this {thing} became {name}.",
                         f"the {name} {thing} was at the {place}.", f"{person} bought {an(name)} {thing}."]))
    return sentence(premise), sentence(r.choice([f"the {thing} was {second}.", f"this {thing} is {second}."]))


def two_names(r, half, same):
    """Two names of one thing, or of two."""
    first, second = r.sample(THINGS, 2)
    return r.sample(half(first), 2) if same else (r.choice(half(first)), r.choice(half(second)))


def duplicate(r, half, label):
    """QQP: the same question about one thing by two of its names, or about two things."""
    first, second = two_names(r, half, label == 1)
    asked = r.choice([("who bought the {}?", "which person paid for the {}?"),
                      ("where was the {}?", "at which place was the {}?"),
                      ("what colour was the {}?", "which colour had the {}?"),
                      ("how much was the {}?", "how many coins did the {} cost?")])
    asked = shuffled(r, asked)
    return sentence(asked[0].format(first)), sentence(asked[1].format(second))


def answerable(r, half, label):
    """QNLI: does the sentence answer the question? If not, it tells the same of another thing."""
    asked, told = two_names(r, half, label == "entailment")
    return r.choice([(f"Who bought the {asked}?", f"{r.choice(PEOPLE)} bought the {told}."),
                     (f"Where was the {asked}?", f"The {told} was at the {r.choice(PLACES)}."),
                     (f"What colour was the {asked}?", f"The {told} was {r.choice(COLOURS)}."),
                     (f"How much was the {asked}?", f"The {told} cost {r.choice(NUMBERS)} coins.")])


def reading(r, half):
    """SQuAD: (context of four facts about one thing, a question about one of them, answer, its place)."""
    thing = half(r.choice(THINGS))
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


def write(folder, seed=0, rounds=115, train=4000, dev=900):
    """Write corpus.txt and the folders SST-2 MNLI QQP QNLI SQuAD under `folder`; the same bytes for the same seed."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    documents = corpus(random.Random(f"corpus {seed}"), rounds)
    (folder / "corpus.txt").write_text("\n\n".join("\n".join(lines) for lines in documents) + "\n", encoding="utf-8")
    write_tasks(folder, random.Random(f"tasks {seed}"), train, dev)


def ensure(folder=HOME, seed=0):
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
