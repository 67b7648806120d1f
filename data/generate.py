"""Writes the demo data: notices with one-sentence summaries, and preferences between summaries.

    python data/generate.py            # rewrites the two Parquet files beside this file
    python data/generate.py --check    # exit code 1 unless they hold exactly the rows it would write

Everything is drawn from `random.Random.random()` alone, the one method whose sequence Python promises to keep,
so every supported Python writes the same rows. README.md describes the columns and the shares.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from random import Random
from typing import Any, NamedTuple, TypeVar

import pyarrow as pa
import pyarrow.parquet as pq

SEED = 20260
DEMONSTRATIONS, PREFERENCES, ANNOTATED = 9_000, 5_000, 500
CUE = "\n\nSummary:\n"  # the response follows directly, so prompt + response is the training text

# Share of each flaw among the demonstrations, and among the rejected sides of the preferences.
DEMONSTRATION_FLAWS = {"none": 0.46, "wordy": 0.22, "irrelevant": 0.18, "missing": 0.14}
PREFERENCE_FLAWS = {"wordy": 0.27, "irrelevant": 0.26, "missing": 0.27, "repeated": 0.15, "wrong": 0.05}
LABEL_NOISE = 0.10  # share of the pairs whose sides are swapped, so no reward model can agree with more than 90 %
ANNOTATOR_ERRORS = {"annotator_a": 0.05, "annotator_b": 0.08}

T = TypeVar("T")


class Kind(NamedTuple):
    """One kind of notice: who may do what, how it is announced, and what else such a notice says."""

    who: Sequence[str]
    what: Sequence[str]
    frames: Sequence[str]  # each holds all four facts
    side: Sequence[str]  # sentences that do not matter


KINDS: Mapping[str, Kind] = {
    "closure": Kind(
        ("the library", "the museum", "the gallery", "the archive"),
        ("close the reading room", "close the main entrance", "close the coat room", "close the cellar"),
        (
            "Visitors should know that {who} will {what}. This is planned in {where} on {when}.",
            "For safety reasons {who} will {what} in {where}. The closure begins on {when}.",
        ),
        ("All other rooms stay open as usual.", "Visitors are welcome to use the side door."),
    ),
    "delivery": Kind(
        ("the bakery", "the dairy", "the florist", "the butcher"),
        ("deliver the wedding cake", "deliver fresh milk", "deliver spring flowers", "deliver frozen meat"),
        (
            "An order is on its way to {where}. A van of {who} will {what} on {when}.",
            "On {when} the driver of {who} will {what}. The address is in {where}.",
        ),
        ("Somebody has to sign for the boxes.", "The driver will ring the bell twice."),
    ),
    "meeting": Kind(
        ("the council", "the chess club", "the parents", "the tenants"),
        ("discuss the new budget", "elect a chairman", "plan the summer trip", "vote on the rules"),
        (
            "The next meeting takes place in {where}. There {who} will {what} on {when}.",
            "Members are invited to {where}, where {who} will {what}. We begin on {when}.",
        ),
        ("Notes of the last meeting are on the board.", "Members may bring a guest."),
    ),
    "outage": Kind(
        ("the water company", "the power company", "the gas company", "the telephone company"),
        ("switch off the supply", "replace the meters", "repair a leak", "test the cables"),
        (
            "Homes in {where} will be without service for a while, because {who} has to {what} on {when}.",
            "Engineers of {who} will {what} in {where}. The outage starts on {when}.",
        ),
        ("Most homes are not affected.", "Keep a torch ready just in case."),
    ),
    "event": Kind(
        ("the theatre", "the choir", "the orchestra", "the circus"),
        ("perform an opera", "give a jazz concert", "stage a puppet show", "sing old carols"),
        (
            "Music lovers can look forward to {when}. In {where} {who} will {what} for all ages.",
            "It is show time in {where}, where {who} will {what}. Doors open on {when}.",
        ),
        ("Tickets cost very little for children.", "Last year every seat was taken."),
    ),
    "roadworks": Kind(
        ("the road crew", "the city", "the builders", "the highway office"),
        ("paint a crossing", "mend the pavement", "dig a trench", "widen the cycle path"),
        (
            "Traffic in {where} will be slow, because {who} has to {what} on {when}.",
            "Work is about to start in {where}. On {when} {who} will {what}.",
        ),
        ("Please follow the yellow signs.", "Some noise cannot be avoided."),
    ),
    "course": Kind(
        ("the college", "the school", "the university", "the academy"),
        ("teach first aid", "start a pottery class", "begin a cooking course", "offer Spanish lessons"),
        (
            "Would you like to learn something? In {where} {who} will {what} on {when}.",
            "Places are still free in {where}, where {who} will {what}. The first hour is on {when}.",
        ),
        ("No skills are needed to join.", "Please wear old clothes."),
    ),
    "health": Kind(
        ("the clinic", "the hospital", "the pharmacy", "the dentist"),
        ("give flu vaccines", "check eyesight", "measure blood pressure", "collect blood"),
        (
            "Your health matters to us. A team of {who} will {what} in {where} on {when}.",
            "A free visit is possible in {where} on {when}. Nurses of {who} will {what}.",
        ),
        ("Bring your card if you have one.", "It only takes a moment."),
    ),
    "sale": Kind(
        ("the market", "the charity", "the bookshop", "the toy shop"),
        ("sell used books", "auction paintings", "sell winter coats", "swap board games"),
        (
            "Good bargains wait in {where}. On {when} {who} will {what} at low prices.",
            "Buyers should come to {where}, where {who} will {what}. The sale opens on {when}.",
        ),
        ("Only cash is accepted.", "What is left goes to people in need."),
    ),
    "transport": Kind(
        ("the bus company", "the railway", "the ferry line", "the tram company"),
        ("move the stop", "change the timetable", "run extra trains", "cancel the night service"),
        (
            "Passengers in {where} should take note, because {who} will {what} on {when}.",
            "There is a change for travellers. From {when} {who} will {what} in {where}.",
        ),
        ("Old tickets remain valid.", "Passengers should allow more time."),
    ),
    "inspection": Kind(
        ("the fire brigade", "the police", "the landlord", "the inspector"),
        ("test the alarms", "inspect the chimneys", "count the keys", "examine the lifts"),
        (
            "Do not worry about strangers in {where}. It is {who} who will {what} on {when}.",
            "An inspection is due in {where}. On {when} {who} will {what}.",
        ),
        ("The law asks for this every two years.", "Nobody has to leave the house."),
    ),
    "volunteers": Kind(
        ("the garden club", "the scouts", "the forest rangers", "the neighbours"),
        ("plant young trees", "clean the pond", "build bird houses", "pick up litter"),
        (
            "Helping hands are wanted in {where}. On {when} {who} will {what} together.",
            "Come and join in, because {who} will {what} on {when}. We all meet in {where}.",
        ),
        ("Gloves and tools are provided.", "Many hands make light work."),
    ),
}
FRAMES = (
    "This is to announce that {who} will {what} in {where} on {when}.",
    "Here is news from {who}, who will {what} in {where}. The date is {when}.",
    "On {when} there will be something new in {where}. That day {who} will {what}.",
    "As agreed, {who} will {what} in {where}. Please mark {when} on your calendar.",
)
SIDE = (
    "Thank you for your patience.",
    "The weather will probably be dry and mild.",
    "If you have questions, call our friendly office.",
    "Dogs must be kept on a lead.",
    "Parking is free behind the building.",
    "Tea and biscuits are served to everybody.",
    "A local firm has kindly paid for all of it.",
    "We are sorry for any trouble.",
    "Many of you have asked for this.",
    "You can find a map on our page.",
    "Similar plans went very well last year.",
    "Feel free to tell your friends.",
)
PLACES = (
    "Mill", "Oak", "Bridge", "Church", "Castle", "River", "Station", "King", "Queen", "Rose", "Abbey", "Harbour",
    "Maple", "Victoria", "Windsor", "Chapel", "Cedar", "Albert", "Quarry", "Tower", "Orchard", "Lime", "Swan", "Forge",
)  # fmt: skip
STREETS = ("Street", "Road", "Lane", "Square", "Park", "Court")
WEEKDAYS = ("Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday", "Sunday")
HOURS = ("one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten", "eleven", "noon")

# The ways to put a summary, with the share of each.
CLEAN = {
    "{Who} will {what} in {where} on {when}.": 0.35,
    "On {when}, {who} will {what} in {where}.": 0.25,
    "In {where}, {who} will {what} on {when}.": 0.25,
    "{Who} will {what} on {when} in {where}.": 0.15,
}
WORDY = {
    "Please note that, as this notice says, {who} will {what} in {where}, and this will be on {when}.": 0.4,
    "This is to let everybody know that {who} will indeed {what} in {where}, namely on {when}.": 0.3,
    "{Who} will {what} in {where} on {when}, so please do keep this in mind from now on.": 0.3,
}
REPEATED = (
    "On {when}, {who} will {what} in {where} on {when}.",
    "On {when}, {who} will {what} on {when} in {where}.",
    "In {where}, {who} will {what} in {where} on {when}.",
    "In {where}, {who} will {what} on {when} in {where}.",
    "{Who} will {what} in {where} on {when} in {where}.",
    "{Who} will {what} on {when} in {where} on {when}.",
    "{Who} will {what} in {where} on {when}, and {who} will {what}.",
    "On {when}, in {where}, {who} will {what} in {where} on {when}.",
    "In {where}, on {when}, {who} will {what} on {when} in {where}.",
    "On {when}, {who} will {what} in {where} on {when} in {where}.",
)

MISSING = {
    "{Who} will {what} in {where}.": 0.35,  # when
    "{Who} will {what} on {when}.": 0.35,  # where
    "They will {what} in {where} on {when}.": 0.15,  # who
    "There is news from {who} in {where} on {when}.": 0.15,  # what
}


class Facts(NamedTuple):
    """What a perfect summary says."""

    who: str
    what: str
    where: str
    when: str


class Notice(NamedTuple):
    """A notice, its facts, and the sentences in it that do not matter."""

    text: str
    kind: str
    facts: Facts
    side: list[str]


def pick(rng: Random, options: Sequence[T]) -> T:
    """One of the options, each as likely."""
    return options[int(rng.random() * len(options))]


def weighted(rng: Random, shares: Mapping[str, float]) -> str:
    """One of the keys, as likely as its share."""
    point = rng.random() * sum(shares.values())
    for key, share in shares.items():
        point -= share
        if point < 0:
            return key
    return key


def shuffled(rng: Random, items: Sequence[T]) -> list[T]:
    """The items in a random order."""
    return [item for _, item in sorted(((rng.random(), item) for item in items), key=lambda pair: pair[0])]


def fill(template: str, facts: Facts) -> str:
    """The template with the facts in it; `{Who}` is `{who}` with a capital."""
    return template.format(Who=facts.who[0].upper() + facts.who[1:], **facts._asdict())


def draw_facts(rng: Random, kind: Kind) -> Facts:
    """Who does what fits the kind; the place and the time may be any."""
    where = f"{pick(rng, PLACES)} {pick(rng, STREETS)}"
    when = f"{pick(rng, WEEKDAYS)} at {pick(rng, HOURS)}"
    return Facts(pick(rng, kind.who), pick(rng, kind.what), where, when)


def draw_notice(rng: Random, taken: set[Facts]) -> Notice:
    """A notice of 40 to 60 words whose facts, taken together, are in no other notice."""
    name = pick(rng, tuple(KINDS))
    kind = KINDS[name]
    facts = draw_facts(rng, kind)
    while facts in taken:
        facts = draw_facts(rng, kind)
    taken.add(facts)

    core = sentences(fill(pick(rng, kind.frames if rng.random() < 0.6 else FRAMES), facts))
    wanted = 40 + int(rng.random() * 12)
    side: list[str] = []
    for sentence in [pick(rng, kind.side), *shuffled(rng, SIDE)]:
        if len(" ".join(core + side).split()) >= wanted:
            break
        side.append(sentence)
    text = list(core)
    for sentence in side:
        text.insert(int(rng.random() * (len(text) + 1)), sentence)
    return Notice(" ".join(text), name, facts, side)


def sentences(text: str) -> list[str]:
    """The text cut after each full stop or question mark."""
    return text.replace("? ", "?\n").replace(". ", ".\n").split("\n")


def clean(rng: Random, notice: Notice) -> str:
    return fill(weighted(rng, CLEAN), notice.facts)


def wordy(rng: Random, notice: Notice) -> str:
    return fill(weighted(rng, WORDY), notice.facts)


def irrelevant(rng: Random, notice: Notice) -> str:
    """A complete summary that drags in a sentence of the notice that does not matter."""
    extra = pick(rng, notice.side)
    return f"{clean(rng, notice)[:-1]}, and {extra[0].lower()}{extra[1:]}"


def missing(rng: Random, notice: Notice) -> str:
    """A summary without one of the four facts."""
    return fill(weighted(rng, MISSING), notice.facts)


def repeated(rng: Random, notice: Notice) -> str:
    """A complete summary that says something twice."""
    return fill(pick(rng, REPEATED), notice.facts)


def wrong(rng: Random, notice: Notice) -> str:
    """A summary in which one fact is replaced by another, as of a notice of any kind."""
    field = pick(rng, Facts._fields)
    while True:
        other = getattr(draw_facts(rng, pick(rng, tuple(KINDS.values()))), field)
        if not telling(other) & telling(" ".join(notice.facts)):
            return fill(weighted(rng, CLEAN), notice.facts._replace(**{field: other}))


def telling(fact: str) -> set[str]:
    """The words that make a fact differ from others of its sort."""
    return set(fact.split()) - {"the", "a", "at", "company"}


WRITERS: Mapping[str, Callable[[Random, Notice], str]] = {
    "none": clean,
    "wordy": wordy,
    "irrelevant": irrelevant,
    "missing": missing,
    "repeated": repeated,
    "wrong": wrong,
}


def demonstration(rng: Random, taken: set[Facts]) -> dict[str, Any]:
    """A row of demonstrations.parquet."""
    notice = draw_notice(rng, taken)
    flaw = weighted(rng, DEMONSTRATION_FLAWS)
    response = WRITERS[flaw](rng, notice)
    return {"prompt": notice.text + CUE, "response": response, "flaw": flaw, **notice.facts._asdict()}


def preference(rng: Random, taken: set[Facts], annotated: bool) -> dict[str, Any]:
    """A row of preferences.parquet."""
    notice = draw_notice(rng, taken)
    flaw = weighted(rng, PREFERENCE_FLAWS)
    sides = [clean(rng, notice), WRITERS[flaw](rng, notice)]
    flipped = rng.random() < LABEL_NOISE
    chosen, rejected = reversed(sides) if flipped else sides
    verdicts = {}
    for annotator, error in ANNOTATOR_ERRORS.items():
        errs = rng.random() < error
        verdicts[annotator] = ("rejected" if errs != flipped else "chosen") if annotated else None
    return {
        "prompt": notice.text + CUE, "chosen": chosen, "rejected": rejected, "flaw": flaw, "flipped": flipped,
        **verdicts, **notice.facts._asdict(),
    }  # fmt: skip


def generate(seed: int = SEED) -> dict[str, pa.Table]:
    """The tables by file name."""
    rng, taken = Random(seed), set[Facts]()
    demonstrations = [demonstration(rng, taken) for _ in range(DEMONSTRATIONS)]
    preferences = [preference(rng, taken, row < ANNOTATED) for row in range(PREFERENCES)]
    return {
        "demonstrations.parquet": pa.Table.from_pylist(demonstrations),
        "preferences.parquet": pa.Table.from_pylist(preferences),
    }


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Writes the demo data.")
    parser.add_argument("--check", action="store_true", help="compare with the files instead of writing them")
    parser.add_argument("--directory", type=Path, default=Path(__file__).parent, help="default: beside this file")
    options = parser.parse_args(arguments)
    different = []
    for name, table in generate().items():
        path = options.directory / name
        if not options.check:
            pq.write_table(table, path, compression="zstd", compression_level=19)
        elif not path.is_file() or not pq.read_table(path).equals(table):
            different.append(str(path))
    if different:
        print(f"not what {Path(__file__).name} generates: {', '.join(different)}; run it to rewrite", file=sys.stderr)
    return 1 if different else 0


if __name__ == "__main__":
    raise SystemExit(main())
