"""Which variant to ship: those on the Pareto front, within noise of each other, within a limit; one recommendation.

Answers from what lies on disk. No torch, no drawing.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from pipelines.report import cells, variants
from pipelines.report.record import RunRecord

Row = dict[str, Any]


@dataclass(frozen=True)
class Limits:
    """What the user asks for; None: nothing."""

    bytes: float | None = None  # at most, of the weights on disk
    loss_below: float | None = None  # nats/token
    tokens_per_second: float | None = None  # at least

    @property
    def given(self) -> bool:
        return any(value is not None for value in vars(self).values())

    def broken_by(self, row: Row) -> list[str]:
        """In words, what a row does not keep or does not tell."""
        return [
            f"{TITLES[key]} {'not known' if row[key] is None else SHOWN[key](row[key])}"
            for key, excess in self._excess(row).items()
            if excess >= 0
        ]

    def distance(self, row: Row) -> float:
        """How far a row is from keeping them: the sum of logarithms of factors; infinite where one is unknown."""
        return sum(max(excess, 0.0) for excess in self._excess(row).values())

    def _excess(self, row: Row) -> dict[str, float]:
        """By key of a row, the logarithm of the factor by which it misses a limit; below 0 where it keeps it."""
        found = {}
        for key, limit, sign in (
            ("bytes", self.bytes, 1),
            ("loss", self.loss_below, 1),
            ("tokens_per_second", self.tokens_per_second, -1),
        ):
            if limit is None:
                continue
            value = row[key]
            found[key] = math.inf if value is None else sign * math.log(max(value, 1e-12) / limit)
            if value == limit and key != "loss":  # a loss must lie below, the others may be as they were asked for
                found[key] = -math.inf
        return found

    def in_words(self) -> str:
        words = [f"at most {cells.bytes_in_words(self.bytes)}"] if self.bytes is not None else []
        words += [f"a loss below {self.loss_below:g}"] if self.loss_below is not None else []
        words += [f"at least {_speed(self.tokens_per_second)}"] if self.tokens_per_second is not None else []
        return " and ".join(words)


def _speed(value: float) -> str:
    return f"{value:,.0f} tokens/s" if value >= 100 else f"{value:.3g} tokens/s"


TITLES = {"bytes": "size", "loss": "loss", "tokens_per_second": "speed"}
SHOWN = {"bytes": cells.bytes_in_words, "loss": "{:.4f}".format, "tokens_per_second": _speed}


@dataclass(frozen=True)
class Decision:
    """rows: those compared, each with front_size, front_speed (whether it is on the front), noise (against the one
    recommended: None where not known) and breaks (limits). recommended: an index of rows, or None. why: in words."""

    rows: list[Row]
    recommended: int | None
    why: str


def decide(rows: Sequence[Row], limits: Limits, differences: dict[str, Any] | None = None) -> Decision:
    """rows: of variants.rows, of one run or several of one teacher, which counts once; those measured on other text are
    left out, and the answer says why where they could be compared. differences: {run: "differences" of its
    results.json}."""
    omitted = _left_out(rows)
    compared = [dict(row) for row in rows if row["measured"] == variants.TEST]
    teachers = [row for row in compared if row["kind"] == "teacher"]
    compared = [row for row in compared if not any(row is other for other in teachers[1:])]
    several = len({row["run"] for row in rows}) > 1
    speed = _common_speed(compared)
    for row in compared:
        apart = several and row["kind"] != "teacher"
        row["title"] = f"{row['name']} of {row['run']}" if apart else row["name"]
        row["label"] = label(row, several=several)
        row["breaks"] = limits.broken_by(row)
    _front(compared, "bytes", lambda row: row["bytes"], "front_size")
    _front(compared, "speed", lambda row: -row["tokens_per_second"] if row["speed"] == speed else None, "front_speed")

    def beyond(one: Row, other: Row) -> bool | None:
        return variants.beyond_noise(one, other, differences or {})

    # Without a limit the teacher is what the others are held against, and would always be as good as itself.
    open_to = [row for row in compared if not row["breaks"] and (limits.given or row["kind"] != "teacher")]
    if not open_to:
        return Decision(compared, None, _nothing(compared, limits) + omitted)
    best = min(open_to, key=lambda row: row["loss"])
    near = [row for row in open_to if row is best or beyond(row, best) is False]
    chosen = min(near, key=lambda row: (_size(row), -(row["tokens_per_second"] or 0.0), row["loss"]))
    for row in compared:
        row["noise"] = None if row is chosen else beyond(row, chosen)
    index = next(number for number, row in enumerate(compared) if row is chosen)
    teacher = next((row for row in compared if row["kind"] == "teacher"), None)
    known = len(open_to) > 1 and any(beyond(row, best) is not None for row in open_to if row is not best)
    return Decision(compared, index, _words(chosen, best, near, open_to, limits, teacher, known, beyond) + omitted)


def _left_out(rows: Sequence[Row]) -> str:
    """What could be compared and is not, as sentences with the reason, once for each."""
    reasons: dict[tuple[str, str], list[str]] = {}
    several = len({row["run"] for row in rows}) > 1
    for row in rows:
        if row.get("left_out"):
            reasons.setdefault((row["run"], row["left_out"]), []).append(row["name"])
    return "".join(
        f" Not compared: {_listed(names)}{f' of {run}' if several else ''}, since {reason}."
        for (run, reason), names in reasons.items()
    )


def label(row: Row, *, several: bool) -> str:
    """What stands beside its mark in a plot. Of several runs the run stands for its student; what was only pruned is
    told by its mark and the arrow."""
    if not several or row["kind"] == "teacher":
        return str(row["name"])
    return {"student": row["run"], "pruned": ""}.get(row["kind"], f"{row['name']} of {row['run']}")


def _size(row: Row) -> float:
    return float(row["bytes"] or row["parameters"] or float("inf"))


def _common_speed(rows: Sequence[Row]) -> str | None:
    """What the speeds are of that can be compared: decoding where at least two were timed so."""
    kinds = [row["speed"] for row in rows if row["speed"]]
    for kind in (variants.DECODE, variants.FORWARD):
        if kinds.count(kind) > 1:
            return kind
    return kinds[0] if kinds else None


def _front(rows: list[Row], key: str, cost: Any, name: str) -> None:
    """row[name]: no other row has at most its cost and at most its loss, and less of one. None: its cost is unknown."""
    known = [
        (row, cost(row))
        for row in rows
        if row["loss"] is not None and row["bytes" if key == "bytes" else "tokens_per_second"] is not None
    ]
    known = [(row, value) for row, value in known if value is not None]
    for row in rows:
        row[name] = None
    for row, value in known:
        row[name] = not any(
            other <= value and rival["loss"] <= row["loss"] and (other < value or rival["loss"] < row["loss"])
            for rival, other in known
        )


def _words(
    chosen: Row, best: Row, near: list[Row], open_to: list[Row], limits: Limits, teacher: Row | None, known: bool,
    beyond: Any,
) -> str:  # fmt: skip
    of = f"of the {len(open_to)} variants that keep {limits.in_words()}" if limits.given else "of the variants"
    if limits.given and len(open_to) == 1:
        reason = f"it is the only one that keeps {limits.in_words()}"
    elif chosen is best and len(near) == 1:
        reason = f"{of} it has the lowest loss, {chosen['loss']:.4f} nats/token"
        reason += ", by more than noise" if known else "; how much of that is noise was not measured"
    elif chosen is best:
        others = _listed([row["title"] for row in near if row is not best])
        reason = (
            f"{of} it has the lowest loss, {chosen['loss']:.4f} nats/token, and no smaller one is within noise of it"
        )
        reason += f" ({others} {'is' if len(near) == 2 else 'are'} within noise, and not smaller)"
    else:
        reason = (
            f"{of} it is the smallest whose loss, {chosen['loss']:.4f} nats/token, is within noise of the lowest, "
            f"{best['loss']:.4f} of {_the(best)}"
        )
    return f"Take {_the(chosen)}: {reason}.{_against(chosen, teacher, beyond)}"


def _the(row: Row) -> str:
    """Its kind and its name, where the one does not say the other; with its run, where there are several."""
    kind, name, run = row["kind"], row["name"], row["title"].removeprefix(row["name"])
    if kind == "quantized" and name.startswith("teacher-"):
        return f"the teacher quantized to {name.removeprefix('teacher-')}{run}"
    if kind == "pruned":
        return f"the pruned model{run}"
    return f"the {row['title']}" if name.startswith(kind) else f"the {kind} {row['title']}"


def _against(chosen: Row, teacher: Row | None, beyond: Any) -> str:
    """How it stands to the teacher, as a sentence."""
    if teacher is None or chosen is teacher:
        return ""
    difference = chosen["loss"] - teacher["loss"]
    side = "above" if difference > 0 else "below"
    noise = {True: ", more than noise", False: ", which is within noise", None: ""}[beyond(chosen, teacher)]
    words = f"its loss is {abs(difference):.4f} nats/token {side} the teacher's{noise}"
    if chosen["bytes"] and teacher["bytes"]:
        words = f"it has {chosen['bytes'] / teacher['bytes']:.0%} of the teacher's bytes, and {words}"
    return f" {words[0].upper()}{words[1:]}."


def _listed(names: list[str]) -> str:
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} and {names[-1]}"


def _nothing(rows: list[Row], limits: Limits) -> str:
    if not rows:
        return "Nothing to decide on: no variant has been evaluated. Run stage=evaluate."
    if not limits.given:
        return "Nothing to decide on: only the teacher has been evaluated."
    nearest = min(rows, key=limits.distance)
    return (
        f"No variant keeps {limits.in_words()}. The nearest is {_the(nearest)}: {', '.join(nearest['breaks'])}. "
        "Ask for less, or prune to another size, distil longer or quantize."
    )


def of_run(record: RunRecord, results: dict[str, Any], limits: Limits) -> Decision:
    """The decision between the variants of one run."""
    return decide(variants.rows(record, results), limits, {record.name: variants.differences(results)})


def table(decision: Decision) -> dict[str, Any] | None:
    """The rows as the page shows them, the smallest first."""
    chosen = None if decision.recommended is None else decision.rows[decision.recommended]
    several_speeds = len({row["speed"] for row in decision.rows if row["speed"]}) > 1
    rows = []
    for row in sorted(decision.rows, key=_size):
        speed = cells.figure(row["tokens_per_second"], "{:,.0f}")
        speed["note"] = row["speed"] or "" if several_speeds else ""
        limit = "kept" if not row["breaks"] else "no: " + ", ".join(row["breaks"])
        shown = [
            cells.cell(cells.bytes_in_words(row["bytes"])),
            cells.figure(row["parameters"], "{:,.0f}"),
            cells.figure(row["loss"], interval=row["interval"]),
            cells.cell(cells.NONE if row is chosen else NOISE[row.get("noise")]),
            cells.figure(row["kl"] if row["kind"] != "teacher" else None),
            speed,
            cells.cell(_fronts(row)),
            cells.cell(limit if any(entry["breaks"] for entry in decision.rows) else cells.NONE),
        ]
        note = "recommended" if row is chosen else "" if row["kind"] == row["name"] else row["kind"]
        rows.append(cells.row(row["title"], shown, note=note, ours=row is chosen))
    head = ["size", "parameters", ("loss", "nats/token"), "to the recommended", ("KL", "to teacher")]
    speed_of = _common_speed(decision.rows)
    head += [("tokens/s", speed_of or ""), "on the front", "limits"]
    return cells.table("Variants by size, quality and speed", head, rows, "Variant")


NOISE = {True: cells.BEYOND, False: cells.WITHIN, None: cells.NONE}


def _fronts(row: Row) -> str:
    words = [word for key, word in (("front_size", "size"), ("front_speed", "speed")) if row[key]]
    return " and ".join(words) or cells.NONE


def in_results(decision: Decision) -> dict[str, Any]:
    """For results.json and decide.json."""
    keep = ("run", "name", "kind", "parameters", "bytes", "loss", "interval", "kl", "agreement", "tokens_per_second")
    keep += ("speed", "front_size", "front_speed", "noise", "breaks")
    chosen = None if decision.recommended is None else decision.rows[decision.recommended]
    return {
        "recommended": chosen and {"run": chosen["run"], "name": chosen["name"]},
        "why": decision.why,
        "variants": [{key: row.get(key) for key in keep} for row in decision.rows],
    }
