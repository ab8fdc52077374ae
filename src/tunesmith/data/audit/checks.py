"""Every check of the audit, by name, and the run over all of them.

In: a subject. Out: findings, heaviest first, facts, and what passed. Must not know: files, how findings are shown.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

from tunesmith.data.audit import contents, languages, leakage, lengths, pairs, repeats
from tunesmith.data.audit.findings import NUM_SHOWN, SEVERITIES, Fact, Finding, Hit, Mend, Part
from tunesmith.data.audit.subject import Subject, excerpt, share

Check = Callable[[Subject], list[Finding]]


def bad_rows(subject: Subject) -> list[Finding]:
    """Rows that cannot be read or do not fit the format. blocker: a run stops at them unless `on_bad_row: drop`."""
    unfit = subject.unfit
    if not unfit:
        return []
    paths = dict.fromkeys(row.path for row in unfit if row.path)
    return [
        Finding(
            kind="bad-rows",
            title="bad rows",
            severity="blocker",
            count=len(unfit),
            total=subject.num_rows,
            ids=tuple(row.id for row in unfit),
            text=f"{share(len(unfit), subject.num_rows)} rows cannot be read or do not fit the format.",
            mends=tuple(Mend(path, "--drop bad-rows") for path in paths),
            shown=tuple(Hit(row.id, excerpt(row.reason)) for row in unfit[:NUM_SHOWN]),
        )
    ]


# Under the kind of what they find, in the order of the report within one severity.
CHECKS: Mapping[str, Check] = {
    "bad-rows": bad_rows,
    "leakage": leakage.leakage,
    "secrets": contents.secrets,
    "personal-data": contents.personal_data,
    "truncation": lengths.truncation,
    "duplicates": repeats.duplicates,
    "near-duplicates": repeats.near_duplicates,
    "repeated-prompts": repeats.repeated_prompts,
    "contradictions": pairs.contradictions,
    "equal-pairs": pairs.equal_pairs,
    "early-divergence": pairs.early_divergence,
    "length-bias": pairs.length_bias,
    "labels": pairs.labels_and_ties,
    "empty": contents.empty_answers,
    "boilerplate": contents.boilerplate,
    "placeholders": contents.placeholders,
    "mojibake": contents.mojibake,
    "toxic": contents.toxic,
    "language-mix": languages.language_mix,
    "answer-language": languages.answer_language,
}
PASSED_WORDS: Mapping[str, str] = {
    "answer-language": "answers in another language",
    "language-mix": "minority languages",
    "duplicates": "exact duplicates",
    "mojibake": "broken characters",
    "toxic": "toxic words",
    "equal-pairs": "chosen equals rejected",
    "early-divergence": "pairs that part early",
    "labels": "labels and ties",
    "empty": "empty answers",
}


def run_checks(subject: Subject, name: str) -> Part:
    """Every check on one subject."""
    found: list[Finding] = []
    passed: list[str] = []
    for kind, check in CHECKS.items():
        if not _applies(kind, subject):
            continue
        findings = check(subject)
        found += findings
        if not findings:
            passed.append(PASSED_WORDS.get(kind, kind.replace("-", " ")))
    order = {severity: place for place, severity in enumerate(SEVERITIES)}
    found.sort(key=lambda finding: order[finding.severity])
    facts = (*_facts(subject), *lengths.length_facts(subject), *languages.language_facts(subject))
    return Part(name, subject.num_rows, facts, tuple(found), tuple(passed))


def _applies(kind: str, subject: Subject) -> bool:
    """Whether a check has anything to look at: without pairs, say, it does not count as passed."""
    if kind in ("equal-pairs", "early-divergence", "length-bias"):
        return bool(subject.lost) or any(len(example.answers) > 1 for example in subject.examples)
    if kind == "contradictions":
        return any(len(example.answers) > 1 or example.label is not None for example in subject.examples)
    if kind == "labels":
        return any(example.scores or example.label is not None for example in subject.examples)
    if kind == "leakage":
        return bool(subject.sides)
    return bool(subject.lengths) if kind == "truncation" else True


def _facts(subject: Subject) -> list[Fact]:
    parts = [f"{len(subject.examples):,} examples"]
    parts += [
        f"{len(rows):,} {word}" for rows, word in ((subject.lost, "teach nothing"), (subject.unfit, "bad")) if rows
    ]
    facts = [Fact("rows", f"{subject.num_rows:,}: {', '.join(parts)}")]
    return facts + [Fact(f"compared with {name}", f"{len(side):,} rows") for name, side in subject.sides.items()]
