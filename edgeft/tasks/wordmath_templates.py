"""The stories that ``wordmath`` is made from: data, no logic.

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
        story: the question.
        steps: the worked solution, without the final ``#### answer``.
        a, b, c: lowest and highest value of each number; None where the story has no such number.
    """

    story: str
    steps: str
    a: tuple[int, int]
    b: tuple[int, int]
    c: tuple[int, int] | None = None


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
        (6, 79),
        (4, 49),
    ),
    Template(
        "There are {a} {animal} and {b} dogs on a farm. How many animals are there in all?",
        "In all: [a + b].",
        (6, 89),
        (4, 59),
    ),
    Template(
        "{name} read {a} pages on {day} and {b} pages the day after. How many pages did {he} read?",
        "In all: [a + b].",
        (11, 79),
        (11, 79),
    ),
    Template(
        "{name} had {a} {thing} and gave {b} of them to {other}. How many {thing} are left?",
        "Left: [a - b].",
        (15, 99),
        (4, 69),
    ),
    Template(
        "{name} has {a} {thing} and {other} has {b}. How many more {thing} does {name} have?",
        "More: [a - b].",
        (21, 99),
        (5, 79),
    ),
    Template(
        "A rope is {a} meters long. {name} cuts off {b} meters. How many meters are left?",
        "Left: [a - b].",
        (15, 99),
        (4, 79),
    ),
    Template(
        "There are {a} {box} with {b} {thing} in each. How many {thing} are there?",
        "In all: [a * b].",
        (3, 12),
        (3, 12),
    ),
    Template(
        "One {gift} costs ${a}. How many dollars do {b} of them cost?",
        "Cost: [a * b].",
        (4, 24),
        (3, 8),
    ),
    Template(
        "A car drives {a} miles every hour. How many miles does it drive in {b} hours?",
        "In all: [a * b].",
        (11, 49),
        (2, 5),
    ),
    Template(
        "{name} shares {a} {thing} equally among {b} friends. How many does each friend get?",
        "Each: [a / b].",
        (12, 120),
        (3, 12),
    ),
    Template(
        "{name} puts {a} {thing} into {box}, {b} in each. How many {box} does {he} need?",
        "Needed: [a / b].",
        (12, 120),
        (3, 12),
    ),
    # Two steps.
    Template(
        "{name} has {a} {thing}. {He} gets {b} from {other} and then loses {c}. "
        "How many {thing} does {name} have now?",
        "First: [a + b]. Then: [x - c].",
        (8, 59),
        (5, 39),
        (3, 29),
    ),
    Template(
        "{name} had {a} {thing}. {He} gave {b} to {other} and {c} to a neighbor. "
        "How many {thing} are left?",
        "First: [a - b]. Then: [x - c].",
        (30, 99),
        (5, 29),
        (4, 29),
    ),
    Template(
        "{name} picked {a} {thing}, {other} picked {b} and a friend picked {c}. "
        "How many {thing} did they pick together?",
        "First: [a + b]. Then: [x + c].",
        (6, 49),
        (6, 49),
        (4, 39),
    ),
    Template(
        "A {ride} has {a} passengers. At a stop {b} get off and {c} get on. "
        "How many passengers are there now?",
        "First: [a - b]. Then: [x + c].",
        (20, 79),
        (4, 39),
        (4, 39),
    ),
    Template(
        "{name} buys {a} {ware} for ${b} each and pays with ${c}. How many dollars does {he} get back?",
        "Cost: [a * b]. Change: [c - x].",
        (2, 9),
        (2, 9),
        (20, 99),
    ),
    Template(
        "{name} has ${a}. {He} spends ${b} on a {gift} and ${c} on lunch. "
        "How many dollars are left?",
        "First: [a - b]. Then: [x - c].",
        (30, 99),
        (5, 39),
        (4, 19),
    ),
    Template(
        "There are {a} {box} with {b} {thing} each and {c} more {thing} on the table. "
        "How many {thing} are there?",
        "First: [a * b]. Then: [x + c].",
        (3, 10),
        (3, 10),
        (3, 39),
    ),
    Template(
        "{name} has {a} {box} with {b} {thing} each. {He} gives away {c} {thing}. "
        "How many {thing} are left?",
        "First: [a * b]. Then: [x - c].",
        (3, 10),
        (3, 10),
        (3, 39),
    ),
    Template(
        "{name} has {a} {thing} and {other} has {b}. They share them equally among {c} children. "
        "How many does each child get?",
        "First: [a + b]. Each: [x / c].",
        (7, 59),
        (5, 49),
        (2, 9),
    ),
    Template(
        "{name} had {a} {thing}. {He} lost {b} and put the rest into {c} equal piles. "
        "How many {thing} are in each pile?",
        "First: [a - b]. Each: [x / c].",
        (20, 89),
        (3, 19),
        (2, 9),
    ),
    Template(
        "A {gift} costs ${a} and a coat costs ${b}. {name} has ${c}. "
        "How many dollars are left after {he} buys both?",
        "Cost: [a + b]. Left: [c - x].",
        (5, 39),
        (11, 49),
        (40, 120),
    ),
    Template(
        "{name} earns ${a} an hour and works {b} hours. Then {he} spends ${c}. "
        "How many dollars are left?",
        "First: [a * b]. Left: [x - c].",
        (6, 15),
        (3, 9),
        (5, 49),
    ),
    Template(
        "{name} saves ${a} a week for {b} weeks and gets ${c} as a present. "
        "How many dollars does {he} have?",
        "First: [a * b]. Then: [x + c].",
        (4, 15),
        (3, 9),
        (5, 49),
    ),
    Template(
        "In a {place} there are {a} {plant}. Workers plant {b} more, but {c} die. "
        "How many {plant} are there now?",
        "First: [a + b]. Then: [x - c].",
        (20, 79),
        (6, 49),
        (3, 19),
    ),
    Template(
        "The {team} scored {a} points in game one, {b} in game two and {c} in game three. "
        "How many points did it score in all?",
        "First: [a + b]. Then: [x + c].",
        (11, 49),
        (11, 49),
        (11, 49),
    ),
    Template(
        "A book has {a} pages. {name} reads {b} pages a day for {c} days. "
        "How many pages are left to read?",
        "First: [b * c]. Left: [a - x].",
        (60, 150),
        (5, 15),
        (3, 8),
    ),
    Template(
        "A class of {a} girls and {b} boys is put into groups of {c}. How many groups are there?",
        "First: [a + b]. Groups: [x / c].",
        (8, 40),
        (8, 40),
        (2, 8),
    ),
    Template(
        "{name} has {a} {thing}. {other} has {b} more than {name}. "
        "How many {thing} do they have together?",
        "First: [a + b]. Together: [a + x].",
        (5, 49),
        (3, 39),
    ),
    Template(
        "{name} has {a} {thing}. {other} has {b} fewer than {name}. "
        "How many {thing} do they have together?",
        "First: [a - b]. Together: [a + x].",
        (20, 69),
        (3, 39),
    ),
    Template(
        "{name} has {a} {thing}. {other} has {b} times as many. "
        "How many {thing} do they have together?",
        "First: [a * b]. Together: [a + x].",
        (4, 19),
        (2, 6),
    ),
    Template(
        "{name} bakes {a} trays of {b} buns and packs them into {c} equal bags. "
        "How many buns are in each bag?",
        "First: [a * b]. Each: [x / c].",
        (2, 9),
        (4, 12),
        (2, 9),
    ),
    Template(
        "A hall has {a} rows of {b} seats. {c} seats are taken. How many seats are free?",
        "First: [a * b]. Free: [x - c].",
        (4, 12),
        (5, 12),
        (6, 59),
    ),
    Template(
        "{name} walks {a} minutes to the {place} and {b} minutes back, {c} times a week. "
        "How many minutes is that a week?",
        "First: [a + b]. In all: [x * c].",
        (4, 19),
        (4, 19),
        (2, 5),
    ),
)

UNSEEN: tuple[Template, ...] = (
    Template(
        "{name} is {a} years old. {His} aunt is {b} years older. How old is the aunt?",
        "Age: [a + b].",
        (6, 49),
        (11, 39),
    ),
    Template(
        "A tank holds {a} liters of water and {b} liters leak out. How many liters remain?",
        "Left: [a - b].",
        (30, 99),
        (5, 69),
    ),
    Template(
        "Each spider has {a} spots. How many spots do {b} such spiders have?",
        "In all: [a * b].",
        (6, 24),
        (3, 8),
    ),
    Template(
        "A printer prints {a} sheets in {b} minutes. How many sheets does it print per minute?",
        "Each: [a / b].",
        (18, 120),
        (3, 12),
    ),
    Template(
        "This morning a baker made {a} loaves. By noon {b} were sold, so the baker made {c} more. "
        "How many loaves are on the shelf?",
        "First: [a - b]. Then: [x + c].",
        (25, 89),
        (6, 59),
        (5, 39),
    ),
    Template(
        "A family of {a} goes to the zoo. A ticket is ${b} and parking is ${c}. "
        "How many dollars do they pay in total?",
        "First: [a * b]. Then: [x + c].",
        (3, 8),
        (6, 15),
        (4, 19),
    ),
    Template(
        "A kitchen uses {b} eggs every morning. It starts with {a} eggs. "
        "How many eggs remain after {c} mornings?",
        "First: [b * c]. Left: [a - x].",
        (60, 150),
        (4, 12),
        (3, 9),
    ),
    Template(
        "From {a} meters of cloth a tailor throws away {b} meters. Each shirt takes {c} meters. "
        "How many shirts can the tailor make?",
        "First: [a - b]. Each: [x / c].",
        (20, 89),
        (3, 19),
        (2, 6),
    ),
    Template(
        "A phone's battery shows {a} percent. {name} uses {b} percent for calls and {c} percent for "
        "music. What does it show now?",
        "First: [a - b]. Then: [x - c].",
        (50, 99),
        (5, 29),
        (4, 19),
    ),
    Template(
        "Two ships carry {a} and {b} crates. Trucks that hold {c} crates each take all of them away. "
        "How many trucks are needed?",
        "First: [a + b]. Needed: [x / c].",
        (12, 59),
        (12, 59),
        (3, 9),
    ),
)
