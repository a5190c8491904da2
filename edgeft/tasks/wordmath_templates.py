"""The stories that ``wordmath`` is made from: data, no logic.

Numbers are small because small models are weak: SmolLM2-135M-Instruct, untuned, gets a quarter of
the one-step questions right and hardly any with two steps.

In a story ``{a}``, ``{b}`` and ``{c}`` are numbers, the other braces are words from ``WORDS`` or a
person. In a solution ``[a + b]`` becomes ``12 + 7 = 19``; the first result is then called ``x``,
the second ``y``, and the last one is the answer.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Template:
    """One story.

    Attributes:
        story: the question, without the instruction.
        steps: the worked solution, without the final ``#### answer``.
        spans: lowest and highest value of a, b and, where the story has it, c.
    """

    story: str
    steps: str
    spans: tuple[tuple[int, int], ...]


# The base model is told the form too, so the benefit is not the form alone. It stands in front of
# every question, in the prefix that prompts share and that runtimes compute once.
INSTRUCTION = 'Solve the problem. Write the answer as a number after "####".'

PEOPLE: tuple[tuple[str, str], ...] = (
    *((name, "she") for name in ("Anna", "Maria", "Lucy", "Emma", "Nina", "Sara", "Kate", "Rosa")),
    *((name, "she") for name in ("Lily", "Julia", "Amy", "Zoe", "Mia", "Ruth", "Ella", "Grace")),
    *((name, "he") for name in ("Tom", "Ben", "Carlos", "David", "Omar", "Peter", "Sam", "Leo")),
    *((name, "he") for name in ("Jack", "Max", "Ivan", "Paul", "Adam", "Mark", "Noah", "Hugo")),
)

WORDS: dict[str, tuple[str, ...]] = {
    "thing": (
        *("apples", "marbles", "stickers", "coins", "pencils", "cards", "shells", "books"),
        *("cookies", "buttons", "oranges", "stones", "beads", "balloons", "stamps", "candies"),
    ),
    "box": ("boxes", "bags", "baskets", "jars", "bowls"),
    "plant": ("trees", "roses", "tulips", "bushes", "flowers"),
    "place": ("park", "garden", "school", "farm", "village"),
    "animal": ("ducks", "sheep", "goats", "cows", "birds", "rabbits", "horses"),
    "ride": ("bus", "train", "boat", "tram"),
    "gift": ("toy", "book", "hat", "ball", "lamp", "game"),
    "ware": ("pens", "cups", "plates", "towels", "brushes", "candles"),
    "day": ("Monday", "Tuesday", "Wednesday", "Thursday"),
    "team": ("red team", "blue team", "green team", "school team"),
}

TRAIN: tuple[Template, ...] = (
    # One step.
    Template(
        "{name} has {a} {thing}. {He} finds {b} more. How many {thing} does {name} have now?",
        "Now: [a + b].",
        ((3, 20), (2, 9)),
    ),
    Template(
        "There are {a} {animal} and {b} dogs on a farm. How many animals are there in all?",
        "In all: [a + b].",
        ((3, 20), (2, 9)),
    ),
    Template(
        "{name} read {a} pages on {day} and {b} pages the day after. "
        "How many pages did {he} read in all?",
        "In all: [a + b].",
        ((3, 20), (2, 9)),
    ),
    Template(
        "A {gift} costs ${a} and a cap costs ${b}. How many dollars do they cost together?",
        "In all: [a + b].",
        ((3, 20), (2, 9)),
    ),
    Template(
        "{name} puts {a} red and {b} blue {thing} in a box. How many {thing} are in the box?",
        "In all: [a + b].",
        ((3, 20), (2, 9)),
    ),
    Template(
        "{name} had {a} {thing} and gave {b} of them to {other}. How many {thing} are left?",
        "Left: [a - b].",
        ((5, 20), (2, 12)),
    ),
    Template(
        "{name} has {a} {thing} and {other} has {b}. How many more {thing} does {name} have?",
        "More: [a - b].",
        ((5, 20), (2, 12)),
    ),
    Template(
        "A rope is {a} meters long. {name} cuts off {b} meters. How many meters are left?",
        "Left: [a - b].",
        ((5, 20), (2, 12)),
    ),
    Template(
        "{name} has ${a} and spends ${b} on a {gift}. How many dollars does {he} have left?",
        "Left: [a - b].",
        ((5, 20), (2, 12)),
    ),
    Template(
        "There are {a} people on a {ride}. {b} of them get off. How many people are still on it?",
        "Left: [a - b].",
        ((5, 20), (2, 12)),
    ),
    Template(
        "There are {a} {box} with {b} {thing} in each. How many {thing} are there?",
        "In all: [a * b].",
        ((2, 9), (2, 9)),
    ),
    Template(
        "One {gift} costs ${a}. How many dollars do {b} of them cost?",
        "In all: [a * b].",
        ((2, 9), (2, 9)),
    ),
    Template(
        "{name} runs {a} miles every day. How many miles does {he} run in {b} days?",
        "In all: [a * b].",
        ((2, 9), (2, 9)),
    ),
    Template(
        "{name} plants {a} rows of {plant} with {b} in each row. How many {plant} are there?",
        "In all: [a * b].",
        ((2, 9), (2, 9)),
    ),
    Template(
        "{name} shares {a} {thing} equally among {b} friends. How many does each friend get?",
        "Each: [a / b].",
        ((4, 48), (2, 8)),
    ),
    Template(
        "{name} puts {a} {thing} into {box}, {b} in each. How many {box} does {he} need?",
        "Needed: [a / b].",
        ((4, 48), (2, 8)),
    ),
    Template(
        "{name} splits a class of {a} children into teams of {b}. How many teams are there?",
        "Needed: [a / b].",
        ((4, 48), (2, 8)),
    ),
    Template(
        "{name} buys {b} {ware} for ${a} each. How many dollars does {he} pay?",
        "In all: [a * b].",
        ((2, 9), (2, 9)),
    ),
    Template(
        "{name} reads {a} pages a day. How many pages does {he} read in {b} days?",
        "In all: [a * b].",
        ((2, 9), (2, 9)),
    ),
    Template(
        "{name} earns ${a} an hour. How many dollars does {he} earn in {b} hours?",
        "In all: [a * b].",
        ((2, 9), (2, 9)),
    ),
    Template(
        "A {ride} has {a} rows of {b} seats. How many seats does it have?",
        "In all: [a * b].",
        ((2, 9), (2, 9)),
    ),
    Template(
        "{name} has {a} {thing} and {other} has {b}. How many {thing} do they have together?",
        "In all: [a + b].",
        ((3, 20), (2, 9)),
    ),
    Template(
        "{name} drank {a} cups of tea on {day} and {b} cups the day after. "
        "How many cups is that in all?",
        "In all: [a + b].",
        ((3, 20), (2, 9)),
    ),
    Template(
        "{name} picked {a} {thing} and lost {b} of them. How many {thing} are left?",
        "Left: [a - b].",
        ((5, 20), (2, 12)),
    ),
    # Two steps.
    Template(
        "{name} has {a} {thing}. {He} gets {b} from {other} and then loses {c}. "
        "How many {thing} does {name} have now?",
        "First: [a + b]. Then: [x - c].",
        ((5, 25), (2, 15), (2, 12)),
    ),
    Template(
        "{name} had {a} {thing}. {He} gave {b} to {other} and {c} to a neighbor. "
        "How many {thing} are left?",
        "First: [a - b]. Then: [x - c].",
        ((12, 40), (2, 12), (2, 9)),
    ),
    Template(
        "{name} picked {a} {thing}, {other} picked {b} and a friend picked {c}. "
        "How many {thing} did they pick together?",
        "First: [a + b]. Then: [x + c].",
        ((3, 25), (3, 15), (2, 12)),
    ),
    Template(
        "A {ride} has {a} passengers. At a stop {b} get off and {c} get on. "
        "How many passengers are there now?",
        "First: [a - b]. Then: [x + c].",
        ((10, 40), (2, 15), (2, 12)),
    ),
    Template(
        "{name} buys {a} {ware} for ${b} each and pays with ${c}. "
        "How many dollars does {he} get back?",
        "First: [a * b]. Left: [c - x].",
        ((2, 6), (2, 9), (10, 50)),
    ),
    Template(
        "A {gift} costs ${a} and a coat costs ${b}. {name} has ${c}. "
        "How many dollars are left after {he} buys both?",
        "First: [a + b]. Left: [c - x].",
        ((3, 15), (5, 25), (15, 60)),
    ),
    Template(
        "There are {a} {box} with {b} {thing} each and {c} more {thing} on the table. "
        "How many {thing} are there?",
        "First: [a * b]. Then: [x + c].",
        ((2, 6), (2, 9), (2, 15)),
    ),
    Template(
        "{name} has {a} {box} with {b} {thing} each. {He} gives away {c} {thing}. "
        "How many {thing} are left?",
        "First: [a * b]. Then: [x - c].",
        ((2, 6), (3, 9), (2, 15)),
    ),
    Template(
        "{name} has {a} {thing} and {other} has {b}. "
        "They share them equally among {c} children. How many does each child get?",
        "First: [a + b]. Each: [x / c].",
        ((4, 30), (3, 20), (2, 6)),
    ),
    Template(
        "{name} had {a} {thing}. {He} lost {b} and put the rest into {c} equal piles. "
        "How many {thing} are in each pile?",
        "First: [a - b]. Each: [x / c].",
        ((10, 40), (2, 12), (2, 6)),
    ),
    Template(
        "{name} earns ${a} an hour and works {b} hours. Then {he} spends ${c}. "
        "How many dollars are left?",
        "First: [a * b]. Left: [x - c].",
        ((4, 12), (2, 6), (2, 15)),
    ),
    Template(
        "{name} saves ${a} a week for {b} weeks and gets ${c} as a present. "
        "How many dollars does {he} have?",
        "First: [a * b]. Then: [x + c].",
        ((3, 12), (2, 6), (2, 15)),
    ),
    Template(
        "In a {place} there are {a} {plant}. Workers plant {b} more, but {c} die. "
        "How many {plant} are there now?",
        "First: [a + b]. Then: [x - c].",
        ((8, 30), (3, 15), (2, 9)),
    ),
    Template(
        "The {team} scored {a} points in game one, {b} in game two and {c} in game three. "
        "How many points did it score in all?",
        "First: [a + b]. Then: [x + c].",
        ((5, 25), (5, 19), (3, 15)),
    ),
    Template(
        "A book has {a} pages. {name} reads {b} pages a day for {c} days. "
        "How many pages are left to read?",
        "First: [b * c]. Left: [a - x].",
        ((25, 80), (3, 10), (2, 6)),
    ),
    Template(
        "{name} has {a} {thing}. {other} has {b} more than {name}. "
        "How many {thing} do they have together?",
        "First: [a + b]. In all: [a + x].",
        ((3, 20), (2, 12)),
    ),
    Template(
        "{name} bakes {a} trays of {b} buns and packs them into {c} equal bags. "
        "How many buns are in each bag?",
        "First: [a * b]. Each: [x / c].",
        ((2, 6), (4, 12), (2, 6)),
    ),
    Template(
        "A hall has {a} rows of {b} seats. {c} seats are taken. How many seats are free?",
        "First: [a * b]. Left: [x - c].",
        ((2, 9), (4, 10), (3, 20)),
    ),
)

UNSEEN: tuple[Template, ...] = (
    Template(
        "{name} is {a} years old. {His} aunt is {b} years older. How old is the aunt?",
        "Now: [a + b].",
        ((3, 20), (2, 9)),
    ),
    Template(
        "This week {a} letters came by post, last week only {b}. "
        "How many letters came in those two weeks?",
        "In all: [a + b].",
        ((3, 20), (2, 9)),
    ),
    Template(
        "A tank holds {a} liters of water and {b} liters leak out. How many liters remain?",
        "Left: [a - b].",
        ((5, 20), (2, 12)),
    ),
    Template(
        "Each spider has {a} spots. How many spots do {b} such spiders have?",
        "In all: [a * b].",
        ((2, 9), (2, 9)),
    ),
    Template(
        "A printer prints {a} sheets in {b} minutes. How many sheets does it print per minute?",
        "Each: [a / b].",
        ((4, 48), (2, 8)),
    ),
    Template(
        "This morning a baker made {a} loaves. By noon {b} were sold, so the baker made {c} "
        "more. How many loaves are on the shelf?",
        "First: [a - b]. Then: [x + c].",
        ((10, 40), (2, 15), (2, 15)),
    ),
    Template(
        "A family of {a} goes to the zoo. A ticket is ${b} and parking is ${c}. "
        "How many dollars do they pay in total?",
        "First: [a * b]. Then: [x + c].",
        ((3, 6), (3, 12), (2, 12)),
    ),
    Template(
        "A kitchen uses {b} eggs every morning. It starts with {a} eggs. "
        "How many eggs remain after {c} mornings?",
        "First: [b * c]. Left: [a - x].",
        ((25, 80), (3, 10), (2, 6)),
    ),
    Template(
        "From {a} meters of cloth a tailor throws away {b} meters. "
        "Each shirt takes {c} meters. How many shirts can the tailor make?",
        "First: [a - b]. Each: [x / c].",
        ((10, 40), (2, 12), (2, 5)),
    ),
    Template(
        "The battery of a phone shows {a} percent. "
        "Calls take {b} percent and music takes {c} percent. What does it show now?",
        "First: [a - b]. Then: [x - c].",
        ((15, 50), (2, 12), (2, 9)),
    ),
)
