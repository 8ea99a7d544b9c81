"""SQL-like queries on one table of a schema, from a question in words.

The grammar, keywords in capital or small letters, names as the schema has them:

    query     := SELECT column ("," column)* FROM table
                 [WHERE condition (AND condition)*]
                 [ORDER BY name [ASC | DESC]] [LIMIT number] [";"]
    column    := name | function "(" (name | "*") ")"
    condition := name ("=" | "<" | ">") ("'" text "'" | number)
"""

import re
from dataclasses import dataclass
from random import Random

from jaxllm.training.synthetic.task import Drawn, Task, ask
from jaxllm.training.synthetic.words import CITIES, COLORS, DAYS, NAMES, SIZES

__all__ = ["Query"]

_TABLES = (
    "birds",
    "boats",
    "books",
    "cars",
    "cats",
    "clubs",
    "dogs",
    "farms",
    "films",
    "games",
    "hotels",
    "houses",
    "lakes",
    "parks",
    "plants",
    "players",
    "schools",
    "ships",
    "shops",
    "songs",
    "teams",
    "toys",
    "trains",
    "trips",
)
_TEXTS = {
    "author": NAMES,
    "city": CITIES,
    "color": COLORS,
    "day": DAYS,
    "maker": NAMES,
    "name": NAMES,
    "owner": NAMES,
    "place": CITIES,
    "size": SIZES,
    "winner": NAMES,
}
_NUMBERS = (
    "age",
    "cost",
    "height",
    "length",
    "level",
    "price",
    "score",
    "speed",
    "stars",
    "weight",
    "width",
)

_SHOW = (
    "Show the {columns} of all {table}{rows}.",
    "List the {columns} of {table}{rows}.",
    "Give me the {columns} of the {table}{rows}.",
)
_COUNT = (
    "How many {table} are there{rows}?",
    "Count the {table}{rows}.",
    "Find the number of {table}{rows}.",
)
_FUNCTIONS = {
    "MAX": ("highest", "largest"),
    "MIN": ("lowest", "smallest"),
    "AVG": ("average", "mean"),
    "SUM": ("total", "summed"),
}
_AGGREGATE = (
    "What is the {how} {column} of the {table}{rows}?",
    "Find the {how} {column} of {table}{rows}.",
)
# For each way to begin: how each comparison is said.
_CONDITIONS = {
    "with": {
        "'": ("{} {}",),
        "=": ("{} equal to {}", "{} of {}"),
        ">": ("{} above {}", "{} over {}"),
        "<": ("{} below {}", "{} under {}"),
    },
    "where": {
        "'": ("{} is {}",),
        "=": ("{} is {}", "{} equals {}"),
        ">": ("{} is more than {}", "{} is above {}"),
        "<": ("{} is less than {}", "{} is below {}"),
    },
}
_ORDERS = {
    "ASC": (", sorted by {}", ", lowest {} first", ", ordered by {}"),
    "DESC": (", highest {} first", ", sorted by {} from high to low"),
}

_NAME = r"[A-Za-z_][A-Za-z0-9_]*"
_COLUMN = re.compile(rf"({_NAME})(?:\s*\(\s*(\*|{_NAME})\s*\))?")
_CONDITION = re.compile(rf"({_NAME})\s*([=<>])\s*(?:'([^']*)'|([0-9]+))")
_QUERY = re.compile(
    r"\s*SELECT\s+(?P<columns>[^']+?)"
    rf"\s+FROM\s+(?P<table>{_NAME})"
    r"(?:\s+WHERE\s+(?P<conditions>.+?))?"
    rf"(?:\s+ORDER\s+BY\s+(?P<by>{_NAME})(?:\s+(?P<order>ASC|DESC))?)?"
    r"(?:\s+LIMIT\s+(?P<limit>[0-9]+))?"
    r"\s*;?\s*",
    re.IGNORECASE | re.DOTALL,
)


def _parse(text: str) -> tuple | None:
    """Returns what a query means, as something to compare; None for no query."""
    query = _QUERY.fullmatch(text)
    if query is None:
        return None
    columns = [_COLUMN.fullmatch(c.strip()) for c in query["columns"].split(",")]
    where = query["conditions"]
    parts = [] if where is None else re.split(r"\s+AND\s+", where, flags=re.IGNORECASE)
    conditions = [_CONDITION.fullmatch(part.strip()) for part in parts]
    if not all(columns) or not all(conditions):
        return None
    chosen = [(c[1].upper(), c[2]) if c[2] else c[1] for c in columns if c]
    compared = {
        (c[1], c[2], c[3] if c[4] is None else int(c[4])) for c in conditions if c
    }
    by = query["by"] and (query["by"], (query["order"] or "ASC").upper())
    limit = query["limit"] and int(query["limit"])
    return tuple(chosen), query["table"], frozenset(compared), by, limit


def _draw_schema(random: Random) -> tuple[str, list[str], list[str], str]:
    """Returns a table, its columns of text and of numbers, and the schema's line."""
    table, other = random.sample(_TABLES, 2)
    tables = {}
    for name in (table, other)[: random.randint(1, 2)]:
        texts = random.sample(tuple(_TEXTS), random.randint(1, 3))
        numbers = random.sample(_NUMBERS, random.randint(1, 2))
        tables[name] = (
            texts,
            numbers,
            random.sample(texts + numbers, len(texts + numbers)),
        )
    shown = [
        f"{name}({', '.join(columns)})" for name, (_, _, columns) in tables.items()
    ]
    random.shuffle(shown)
    texts, numbers, _ = tables[table]
    return table, texts, numbers, "; ".join(shown)


def _draw_conditions(
    random: Random, texts: list[str], numbers: list[str], count: int
) -> tuple[str, str]:
    """Returns conditions in words and in SQL, each ready to follow what is before."""
    if count == 0:
        return "", ""
    begin = random.choice(tuple(_CONDITIONS))
    said, written = [], []
    for column in random.sample(texts + numbers, min(count, len(texts + numbers))):
        if column in texts:
            sign, value = "'", random.choice(_TEXTS[column])
            written.append(f"{column} = '{value}'")
        else:
            sign, value = random.choice("=<>"), str(random.randint(2, 60))
            written.append(f"{column} {sign} {value}")
        said.append(random.choice(_CONDITIONS[begin][sign]).format(column, value))
    return f" {begin} {' and '.join(said)}", f" WHERE {' AND '.join(written)}"


def _draw_order(random: Random, numbers: list[str]) -> tuple[str, str]:
    """Returns an order of the rows, and perhaps a limit, in words and in SQL."""
    by, direction = random.choice(numbers), random.choice(tuple(_ORDERS))
    said = random.choice(_ORDERS[direction]).format(by)
    written = f" ORDER BY {by}" + (" DESC" if direction == "DESC" else "")
    if random.random() < 0.5:
        limit = random.randint(2, 9)
        said += f", only {limit} of them"
        written += f" LIMIT {limit}"
    return said, written


@dataclass(frozen=True, kw_only=True)
class Query(Task):
    """A question about one table, to be answered with a query.

    Attributes:
      most_conditions: Most conditions of a query.
    """

    most_conditions: int = 2

    def draw(self, random: Random) -> Drawn:
        """Draws a question; its content is the query, so that no answer is learned."""
        table, texts, numbers, schema = _draw_schema(random)
        kind = random.choice(("show", "show", "count", "aggregate"))
        # There are too few counts without a condition to hold any of them back.
        count = random.randint(kind == "count", self.most_conditions)
        rows, where = _draw_conditions(random, texts, numbers, count)
        words = {"table": table}
        if kind == "count":
            template, chosen = random.choice(_COUNT), "COUNT(*)"
        elif kind == "aggregate":
            function, column = random.choice(tuple(_FUNCTIONS)), random.choice(numbers)
            template, chosen = random.choice(_AGGREGATE), f"{function}({column})"
            words |= {"how": random.choice(_FUNCTIONS[function]), "column": column}
        else:
            columns = random.sample(texts + numbers, random.randint(1, 2))
            template, chosen = random.choice(_SHOW), ", ".join(columns)
            words |= {"columns": " and ".join(columns)}
            if random.random() < 0.4:
                said, written = _draw_order(random, numbers)
                rows, where = rows + said, where + written
        query = f"SELECT {chosen} FROM {table}{where}"
        question = template.format(rows=rows, **words)
        return Drawn(query, ask(question, schema=schema), f" {query}")

    def agrees(self, wanted: str, found: str) -> bool:
        """Compares meanings: conditions stand in any order, keywords in any case."""
        return _parse(found) is not None and _parse(wanted) == _parse(found)
