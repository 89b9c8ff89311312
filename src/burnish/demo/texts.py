"""What the demo teaches: plain text for the base model, then instructions, made on the spot.

A small town: people, and facts about each. The base model reads the facts as plain sentences and
has never seen a question. The instruction set asks about most of the facts, in many ways; whatever
it holds out, no training question asks in any wording. So a right answer to a held-out question
needs both halves: the manner of answering, from the instruction set, and the fact, from the base.
"""

from __future__ import annotations

import random
from collections.abc import Mapping
from dataclasses import dataclass

PEOPLE: tuple[str, ...] = (
    "Ada", "Bruno", "Clara", "Dario", "Elsa", "Felix", "Greta", "Hugo", "Irma", "Jonas",
    "Kira", "Leo", "Mona", "Nils", "Olga", "Pablo", "Rosa", "Sven", "Tilda", "Victor",
)  # fmt: skip


@dataclass(frozen=True)
class Topic:
    """One thing that is known about everybody."""

    values: tuple[str, ...]
    asked: tuple[str, ...]
    """Ways to ask for it that only fit this topic; `{}` is the person."""


TOPICS: Mapping[str, Topic] = {
    "home": Topic(
        ("harbor", "castle", "village", "island", "forest", "valley", "tower", "mill"),
        ("Where does {} live?", "In what place would I find {}?"),
    ),
    "pet": Topic(
        ("cat", "parrot", "turtle", "rabbit", "horse", "goat", "falcon", "hamster"),
        ("Which animal lives with {}?", "What animal does {} keep?"),
    ),
    "dish": Topic(
        ("soup", "pasta", "salad", "curry", "stew", "pancakes", "noodles", "bread"),
        ("What does {} like to eat?", "What should I cook for {}?"),
    ),
    "instrument": Topic(
        ("violin", "piano", "flute", "drum", "harp", "guitar", "trumpet", "cello"),
        ("What does {} play in the band?", "On what does {} make music?"),
    ),
    "colour": Topic(
        ("green", "blue", "red", "yellow", "purple", "orange", "black", "white"),
        ("In what paint is the door of {}?", "How would {} paint a room?"),
    ),
    "trade": Topic(
        ("baker", "sailor", "painter", "farmer", "doctor", "teacher", "smith", "tailor"),
        ("What work does {} do?", "How does {} earn a living?"),
    ),
}

_ASKED_OF_ANY = (
    "What is the {topic} of {person}?",
    "Tell me the {topic} of {person}.",
    "Do you know the {topic} of {person}?",
    "Please name the {topic} of {person}.",
    "I would like to know the {topic} of {person}.",
    "{person}, and the {topic}?",
)


@dataclass(frozen=True)
class Question:
    """A prompt and the one right answer."""

    prompt: str
    answer: str


def make_facts(seed: int) -> dict[tuple[str, str], str]:
    """Every fact of the town: (person, topic) to a sentence."""
    rng = random.Random(seed)
    return {
        (person, name): f"The {name} of {person} is {rng.choice(topic.values)}."
        for person in PEOPLE
        for name, topic in TOPICS.items()
    }


Facts = Mapping[tuple[str, str], str]
"""(person, topic) to the sentence that says it."""


def make_text(facts: Facts, seed: int, num_rows: int, num_facts: int = 6) -> list[str]:
    """Plain text for the base model: rows of facts, drawn at random."""
    rng = random.Random(seed)
    sentences = list(facts.values())
    return [" ".join(rng.sample(sentences, num_facts)) for _ in range(num_rows)]


def make_questions(facts: Facts, seed: int, num_held_out_facts: int) -> tuple[list[Question], list[Question]]:
    """Instructions to train on, and held-out ones about facts that no training question asks for.

    Returns:
        Every wording of every question about the other facts, shuffled; and one wording of a
        question about each held-out fact.
    """
    rng = random.Random(seed)
    places = list(facts)
    held_out = set(rng.sample(places, num_held_out_facts))
    train = [
        Question(ask, facts[place]) for place in places if place not in held_out for ask in _asks(*place)
    ]
    rng.shuffle(train)
    return train, [Question(rng.choice(_asks(*place)), facts[place]) for place in places if place in held_out]


def _asks(person: str, topic: str) -> list[str]:
    general = [wording.format(topic=topic, person=person) for wording in _ASKED_OF_ANY]
    return general + [wording.format(person) for wording in TOPICS[topic].asked]
