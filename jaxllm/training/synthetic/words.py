"""The words that tasks are made of.

Few of each, so that a small model meets every one often. Common nouns and adjectives
begin with a consonant: "a" is always right, also after a word was replaced.
"""

__all__ = [
    "ANIMALS",
    "CITIES",
    "COLORS",
    "DAYS",
    "JOBS",
    "LIST_WORDS",
    "NAMES",
    "PLACES",
    "PRONOUNS",
    "SIZES",
    "THINGS",
]

PRONOUNS = {
    "Anna": "She",
    "Ben": "He",
    "Carl": "He",
    "Ella": "She",
    "Emma": "She",
    "Finn": "He",
    "Hugo": "He",
    "Ivy": "She",
    "Jack": "He",
    "Kate": "She",
    "Lena": "She",
    "Leo": "He",
    "Lily": "She",
    "Lucy": "She",
    "Max": "He",
    "Maya": "She",
    "Mia": "She",
    "Noah": "He",
    "Nora": "She",
    "Omar": "He",
    "Paul": "He",
    "Rosa": "She",
    "Ruby": "She",
    "Sam": "He",
    "Sue": "She",
    "Tim": "He",
    "Tom": "He",
    "Zoe": "She",
}
"""Names, and the pronoun that stands for each."""

NAMES = tuple(PRONOUNS)

CITIES = (
    "Athens",
    "Berlin",
    "Boston",
    "Cairo",
    "Delhi",
    "Dublin",
    "Geneva",
    "Havana",
    "Kyoto",
    "Lima",
    "Lisbon",
    "London",
    "Madrid",
    "Milan",
    "Naples",
    "Oslo",
    "Paris",
    "Prague",
    "Rome",
    "Sydney",
    "Tokyo",
    "Vienna",
    "Warsaw",
    "Zurich",
)

DAYS = (
    "Monday",
    "Tuesday",
    "Wednesday",
    "Thursday",
    "Friday",
    "Saturday",
    "Sunday",
)

COLORS = (
    "black",
    "blue",
    "brown",
    "gray",
    "green",
    "pink",
    "purple",
    "red",
    "white",
    "yellow",
)

SIZES = ("big", "long", "new", "round", "short", "small", "strong", "tiny")

ANIMALS = (
    "bear",
    "bird",
    "cat",
    "cow",
    "dog",
    "duck",
    "fox",
    "frog",
    "goat",
    "hen",
    "horse",
    "lion",
    "mouse",
    "pig",
    "rabbit",
    "sheep",
    "turtle",
    "wolf",
)

THINGS = (
    "ball",
    "bell",
    "book",
    "button",
    "card",
    "coin",
    "cup",
    "hat",
    "key",
    "kite",
    "lamp",
    "marble",
    "pencil",
    "ribbon",
    "rope",
    "shell",
    "stamp",
    "sticker",
    "stone",
    "toy",
)
"""Things whose plural is the word and an "s"."""

PLACES = (
    "barn",
    "bridge",
    "fence",
    "garden",
    "gate",
    "house",
    "lake",
    "park",
    "pond",
    "river",
    "school",
    "tree",
    "wall",
    "well",
)

JOBS = (
    "baker",
    "builder",
    "cook",
    "doctor",
    "driver",
    "farmer",
    "gardener",
    "judge",
    "nurse",
    "painter",
    "pilot",
    "sailor",
    "singer",
    "teacher",
    "writer",
)

LIST_WORDS = tuple(sorted({*COLORS, *ANIMALS, *THINGS}))
"""What lists hold when they hold words."""
