"""Forty short questions that have nothing to do with mathematics, to notice forgetting.

Each has one right answer and two wrong ones of about the same length. Nothing is generated: the
answers' likelihoods say it all. A smoke test, not a benchmark.
"""

from __future__ import annotations

from edgeft.tasks import Question

# question | right | wrong | wrong
_SET = """
What is the capital of France? | Paris | Madrid | Berlin
What is the capital of Japan? | Tokyo | Seoul | Beijing
Which planet is known as the Red Planet? | Mars | Venus | Saturn
Which ocean lies between Europe and America? | The Atlantic Ocean | The Indian Ocean | The Arctic Ocean
On which continent is Egypt? | Africa | Europe | Asia
Which language is mostly spoken in Brazil? | Portuguese | Italian | German
Who wrote the play Romeo and Juliet? | William Shakespeare | Charles Dickens | Leo Tolstoy
Who painted the Mona Lisa? | Leonardo da Vinci | Vincent van Gogh | Pablo Picasso
What do bees make? | Honey | Cheese | Bread
What do plants need to grow? | Water and light | Salt and oil | Smoke and dust
Which animal says "meow"? | A cat | A cow | A duck
What is a young dog called? | A puppy | A kitten | A calf
Which animal has a trunk? | The elephant | The lion | The horse
What is the opposite of hot? | Cold | Loud | Heavy
What is the opposite of always? | Never | Often | Maybe
What is another word for happy? | Glad | Angry | Tired
What is the past tense of "go"? | Went | Gone by | Goed
What is the plural of "child"? | Children | Childs | Childes
What colour is the sky on a clear day? | Blue | Green | Brown
What colour do you get from mixing blue and yellow? | Green | Purple | Orange
What is frozen water called? | Ice | Steam | Sand
What falls from the clouds when it rains? | Water | Leaves | Stones
Which season comes after winter? | Spring | Autumn | Summer
Which day comes after Monday? | Tuesday | Friday | Sunday
In which room do people usually cook? | The kitchen | The bedroom | The bathroom
What do you use to write on paper? | A pen | A spoon | A shoe
What do people wear on their feet? | Shoes | Gloves | Hats
What do you use to open a locked door? | A key | A fork | A pillow
Where do fish live? | In water | In trees | In caves
What do cows give us? | Milk | Wool | Eggs
Which organ pumps blood through the body? | The heart | The liver | The stomach
Which sense do we use our ears for? | Hearing | Smell | Taste
What gas do people breathe in to live? | Oxygen | Helium | Methane
Which star is closest to the Earth? | The Sun | The Moon | The Pole Star
What is a doctor's place of work called? | A hospital | A bakery | A garage
What does a baker make? | Bread | Chairs | Letters
Which vehicle flies? | An airplane | A train | A bicycle
What is the Spanish word for "house"? | Casa | Perro | Libro
What is the French word for "thank you"? | Merci | Bonjour | Maison
Complete the saying: an apple a day keeps the | doctor away | teacher out | farmer home
"""


def questions() -> list[Question]:
    """One question a choice, named ``general-<question>/<choice>``; choice 0 is the right one."""
    found = []
    for number, line in enumerate(_SET.strip().splitlines()):
        asked, *choices = (part.strip() for part in line.split("|"))
        for choice, text in enumerate(choices):
            found.append(Question(f"general-{number}/{choice}", asked, text, text))
    return found
