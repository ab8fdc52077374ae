"""What can be wrong with pairs, ranked answers and labels.

In: a subject. Out: findings. Must not know: files, how findings are shown.
"""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import replace
from itertools import pairwise

import numpy as np

from tunesmith.data.audit.findings import Finding, Severity
from tunesmith.data.audit.subject import Subject, by_share, share
from tunesmith.data.audit.texts import answer_text, answers_text, prompt_text, text_key
from tunesmith.data.formats.transcripts import JOINED
from tunesmith.data.types import Example

Z = 1.959963984540054  # quantile 0.975 of the normal distribution
MIN_PAIRS = 20  # fewer say nothing about a tendency
BIASED = 0.6
"""Share of pairs from which length alone is a strong hint at the chosen answer."""


def preferences(example: Example) -> list[tuple[int, int]]:
    """(better, worse) answers of an example: the pair, or neighbours in the order of scores; ties say nothing."""
    if len(example.answers) < 2:
        return []
    if not example.scores:
        return [(0, place) for place in range(1, len(example.answers))]
    order = sorted(range(len(example.scores)), key=lambda place: -example.scores[place])
    return [(one, two) for one, two in pairwise(order) if example.scores[one] > example.scores[two]]


def contradictory(subject: Subject) -> dict[int, int]:
    """Places of rows that contradict others, and how many answers their cycle holds.

    For each prompt the answers are nodes and every preference an edge; an edge inside a strongly connected component
    lies on a cycle. Among labels: the same prompt and answer called good and bad.
    """
    edges: dict[str, list[tuple[int, str, str]]] = defaultdict(list)
    labels: dict[tuple[str, str], list[tuple[int, bool]]] = defaultdict(list)
    for place, (example, key) in enumerate(zip(subject.examples, subject.prompt_keys, strict=True)):
        keys = [text_key(answer_text(answer)) for answer in example.answers]
        edges[key] += [(place, keys[one], keys[two]) for one, two in preferences(example) if keys[one] != keys[two]]
        if example.label is not None:
            labels[key, keys[0]].append((place, example.label))
    found: dict[int, int] = {}
    for group in edges.values():
        if len(group) < 2:
            continue
        component = components([(one, two) for _, one, two in group])
        sizes = Counter(component.values())
        for place, one, two in group:
            if component[one] == component[two]:
                found[place] = sizes[component[one]]
    for rows in labels.values():
        if len({label for _, label in rows}) > 1:
            found |= {place: 2 for place, _ in rows}
    return found


def components(edges: Sequence[tuple[str, str]]) -> dict[str, int]:
    """The strongly connected component of each node (Kosaraju's two passes), without recursion."""
    forward: dict[str, list[str]] = defaultdict(list)
    backward: dict[str, list[str]] = defaultdict(list)
    for one, two in edges:
        forward[one].append(two)
        backward[two].append(one)
    nodes = dict.fromkeys(node for edge in edges for node in edge)
    finished: list[str] = []
    seen: set[str] = set()
    for start in nodes:
        _walk(start, forward, seen, finished)
    result: dict[str, int] = {}
    seen = set()
    for number, start in enumerate(reversed(finished)):
        reached: list[str] = []
        _walk(start, backward, seen, reached)
        result |= dict.fromkeys(reached, number)
    return result


def _walk(start: str, after: Mapping[str, list[str]], seen: set[str], finished: list[str]) -> None:
    """Appends every node that is newly reached from `start`, each behind those that it leads to."""
    stack = [(start, False)]
    while stack:
        node, done = stack.pop()
        if done:
            finished.append(node)
        elif node not in seen:
            seen.add(node)
            stack.append((node, True))
            stack += [(following, False) for following in after.get(node, ())]


def contradictions(subject: Subject) -> list[Finding]:
    """One prompt for which A is preferred to B and B to A, directly or around a cycle of any length.

    warning: the gradients cancel; blocker from a twentieth of the rows on.
    """
    found = contradictory(subject)
    if not found:
        return []
    total, longest = len(subject.examples), max(found.values())
    cycles = f" (cycles of up to {longest} answers)" if longest > 2 else ""
    text = f"{share(len(found), total)} rows prefer an answer that another row with the same prompt rejects{cycles}."
    notes = {place: prompt_text(subject.examples[place]) for place in found}
    severity = by_share(len(found), total, warning=0.0, blocker=0.05)
    return [subject.finding("contradictions", "contradictory preferences", severity, sorted(found), text, notes=notes)]


def is_equal_pair(example: Example) -> bool:
    """Whether every answer says the same, white space at the ends and case aside."""
    return len(example.answers) > 1 and len({text_key(answer_text(answer)) for answer in example.answers}) == 1


def equal_pairs(subject: Subject) -> list[Finding]:
    """chosen == rejected, also among the rows that the format dropped for it.

    warning: nothing can be learnt from them; blocker from a tenth of the rows on.
    """
    lost = [row for row in subject.lost if is_equal_reason(row.reason)]
    places = [place for place, example in enumerate(subject.examples) if is_equal_pair(example)]
    if not lost and not places:
        return []
    count = len(lost) + len(places)
    text = f"{share(count, subject.num_rows)} pairs have a chosen answer that equals the rejected one."
    severity = by_share(count, subject.num_rows, warning=0.0, blocker=0.1)
    return [subject.lost_finding("equal-pairs", "chosen equals rejected", severity, places, lost, text)]


def is_equal_reason(reason: str) -> bool:
    """Whether a format dropped a row because its answers are equal."""
    return "equal" in reason or "identical" in reason


def parts_early(example: Example) -> bool:
    """Whether the sides of a pair go on for different turns.

    Of transcripts the format joins two turns of one speaker into one, tags the row and leaves a blank line between.
    """
    if len(example.answers) < 2:
        return False
    roles = [
        role for answer in example.answers if not isinstance(answer, str) for role in (turn.role for turn in answer)
    ]
    return "user" in roles or (JOINED in example.tags and "\n\n" in answers_text(example))


def early_divergence(subject: Subject) -> list[Finding]:
    """Pairs whose conversations part before the last turn.

    note: only the assistant's turns after the parting are trained, but the sides answer different questions.
    """
    places = [place for place, example in enumerate(subject.examples) if parts_early(example)]
    pairs = sum(len(example.answers) > 1 for example in subject.examples)
    if not places:
        return []
    text = (
        f"{share(len(places), pairs)} pairs part before the last turn; after the parting only the assistant's turns "
        "are trained."
    )
    notes = {place: prompt_text(subject.examples[place]) for place in places}
    title = "pairs that part early"
    return [subject.finding("early-divergence", title, "note", places, text, notes=notes, options="", total=pairs)]


def wilson(successes: int, num: int) -> tuple[float, float]:
    """95 % interval of a share (Wilson 1927)."""
    rate = successes / num
    centre = (rate + Z * Z / (2 * num)) / (1 + Z * Z / num)
    half = Z / (1 + Z * Z / num) * math.sqrt(rate * (1 - rate) / num + Z * Z / (4 * num * num))
    return max(0.0, centre - half), min(1.0, centre + half)


def length_bias(subject: Subject) -> list[Finding]:
    """How often the better answer is the longer one, in characters; answers of equal length are left out.

    Silent while the 95 % interval holds one half; a note beyond, a warning where length alone picks the chosen answer
    in 60 % of the pairs or more (or in 40 % or less).
    """
    gaps, margins, places = _length_gaps(subject)
    num = len(gaps)
    if num < MIN_PAIRS:
        return []
    longer = sum(gap > 0 for gap in gaps)
    low, high = wilson(longer, num)
    if low <= 0.5 <= high:
        return []
    rate = longer / num
    words = (
        f"the chosen answer is the longer one in {rate:.0%} of {num:,} pairs (95 % interval {low:.0%} to {high:.0%})"
    )
    finite = len(margins) == num and float(np.std(margins)) > 0 and float(np.std(gaps)) > 0
    correlation = f"; length and score correlate at {np.corrcoef(gaps, margins)[0, 1]:.2f}" if finite else ""
    tendency = "longer" if rate > 0.5 else "shorter"
    side = [place for place, gap in zip(places, gaps, strict=True) if (gap > 0) == (rate > 0.5)]
    finding = subject.finding(
        "length-bias",
        "length bias",
        "warning" if rate >= BIASED or rate <= 1 - BIASED else "note",
        list(dict.fromkeys(side)),
        f"{words[0].upper()}{words[1:]}{correlation}; a model may learn to write {tendency} instead of better.",
        options="",
        total=num,
    )
    return [replace(finding, shown=())]  # half of all rows: none of them is an example of anything


def _length_gaps(subject: Subject) -> tuple[list[int], list[float], list[int]]:
    """Better minus worse in characters, the margins of their scores where there are any, and the rows."""
    gaps: list[int] = []
    margins: list[float] = []
    places: list[int] = []
    for place, example in enumerate(subject.examples):
        for one, two in preferences(example):
            gap = len(answer_text(example.answers[one])) - len(answer_text(example.answers[two]))
            if gap == 0:
                continue
            gaps.append(gap)
            places.append(place)
            if example.scores:
                margins.append(example.scores[one] - example.scores[two])
    return gaps, margins, places


def labels_and_ties(subject: Subject) -> list[Finding]:
    """Labels that are all alike (nothing to compare), one label far rarer, and answers with tied scores (F32).

    blocker: one class only; warning: below one in twenty, and for ties from a tenth of the rows on.
    """
    findings = []
    labels = Counter(example.label for example in subject.examples if example.label is not None)
    total = sum(labels.values())
    rarer = min(labels[True], labels[False])
    if total >= 2 and rarer < 0.05 * total:
        value = labels[True] > labels[False]
        places = [place for place, example in enumerate(subject.examples) if example.label is value]
        word = "desirable" if value else "undesirable"
        text = f"{share(total - rarer, total)} labels say {word}; feedback of one kind gives nothing to compare with."
        severity: Severity = "blocker" if not rarer else "warning"
        findings.append(subject.finding("labels", "one-sided labels", severity, places, text, options="", total=total))
    scored = [place for place, example in enumerate(subject.examples) if len(example.scores) > 1]
    ties = [place for place in scored if len(set(subject.examples[place].scores)) < len(subject.examples[place].scores)]
    if ties:
        text = f"{share(len(ties), len(scored))} rows have answers with the same score; a tie says nothing."
        severity = by_share(len(ties), len(scored), warning=0.1)
        findings.append(subject.finding("ties", "tied scores", severity, ties, text, options="", total=len(scored)))
    return findings
