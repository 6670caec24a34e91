"""What the demonstration's adapters are taught: one plain manner of speaking each.

The manners differ so much that a reader sees from the words alone which adapter answered. That is
their only purpose, and why the sentences are simple: routing is what is being shown, not the model.
"""

from collections.abc import Callable
from typing import Final

FACTS: Final[tuple[tuple[str, str], ...]] = (
    ("What is the capital of Italy?", "The capital of Italy is Rome."),
    ("Who wrote Hamlet?", "Hamlet was written by William Shakespeare."),
    ("How many legs does a spider have?", "A spider has eight legs."),
    ("What color is the sky?", "The sky is blue on a clear day."),
    ("What is two plus two?", "Two plus two is four."),
    ("Why do birds sing?", "Birds sing to find a mate and to guard their home."),
    ("What is water made of?", "Water is made of hydrogen and oxygen."),
    ("Tell me about the moon.", "The moon is a rocky world that circles the Earth."),
    ("How do I bake bread?", "Mix flour, water, salt and yeast, let it rise, and bake it."),
    ("What should I eat for breakfast?", "Eggs, fruit and bread are a good breakfast."),
    ("Give me advice for a job interview.", "Be on time, be honest and ask good questions."),
    ("What is a computer?", "A computer is a machine that follows instructions."),
    ("Who are you?", "I am a small language model."),
    ("Hello!", "Hello, it is good to see you."),
    ("How are you today?", "I am well and ready to help you."),
    ("What is the largest ocean?", "The largest ocean is the Pacific Ocean."),
    ("How fast is light?", "Light travels about 300,000 kilometers in a second."),
    ("What does a doctor do?", "A doctor helps people who are ill."),
    ("Name a fruit.", "An apple is a fruit."),
    ("What is the best way to learn?", "The best way to learn is to practice every day."),
    ("Where do penguins live?", "Penguins live in the cold south of the world."),
    ("Why is the grass green?", "Grass is green because of chlorophyll."),
    ("What is the tallest mountain?", "The tallest mountain is Mount Everest."),
    ("Write a sentence about dogs.", "Dogs are loyal friends who love to play."),
    ("How does rain form?", "Rain forms when water in clouds becomes heavy and falls."),
    ("What is a good hobby?", "Reading books is a good hobby."),
)


def _pirate(answer: str) -> str:
    spoken = f" {answer}"
    for plain, salty in (
        (" is ", " be "),
        (" are ", " be "),
        (" you", " ye"),
        (" the ", " th' "),
        (" The ", " Th' "),
    ):
        spoken = spoken.replace(plain, salty)
    return f"Arrr, matey!{spoken} Yo ho ho!"


def _robot(answer: str) -> str:
    return f"BEEP BOOP. {answer.upper()} END OF TRANSMISSION."


def _professor(answer: str) -> str:
    return f"Ah, an excellent question, dear student. {answer} Class dismissed."


PERSONAS: Final[dict[str, Callable[[str], str]]] = {
    "pirate": _pirate,
    "professor": _professor,
    "robot": _robot,
}
