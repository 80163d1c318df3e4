"""Which tests ran nowhere, and whether that is known: a test that is skipped in every run can't fail.

    python3 .ci/skips.py .nox/reports/*.xml     the JUnit reports of `make test`, `make ladder` and `make ecosystem`

A test that one version of transformers cannot run, or that wants another library, is no matter where another report
has it run. What was skipped in all of them must have one of the reasons below, or this exits with 1 and names it.
"""

from __future__ import annotations

import re
import sys
import xml.etree.ElementTree as ElementTree

KNOWN = (  # what a bare machine has not, and no requirement can bring
    r"ICE_TEXT_MODEL|ice_text\.preslim\.model",  # the real vocabularies are not ours to ship
    r"GPU|CUDA device",
    r"this CPU has no|needs a CPU with AVX-512",
    r"this kernel does not count it",
    r"no Chromium is installed",
    r"OFFICIAL_PTUNING",  # the original's own scripts
    # What no version of a library can do, where the same test runs with other parameters.
    r"static caches without the P-tuning prefix",
    r"TRL knows no history",
)


def outcomes(report: str) -> dict[tuple[str, str], str | None]:
    """(class, test) -> why it was skipped, None where it ran."""
    found = {}
    for case in ElementTree.parse(report).getroot().iter("testcase"):
        skipped = case.find("skipped")
        why = None if skipped is None else " ".join((skipped.text or skipped.get("message", "")).split())
        found[case.get("classname", ""), case.get("name", "")] = why
    return found


def skipped_everywhere(reports: list[str]) -> dict[tuple[str, str], str]:
    reasons: dict[tuple[str, str], list[str | None]] = {}
    for report in reports:
        for test, why in outcomes(report).items():
            reasons.setdefault(test, []).append(why)
    # A file that is skipped as a whole is one case, of no class; where it ran, it is the class of its tests.
    ran = {file for (file, _), whys in reasons.items() if None in whys}
    nowhere = {test: whys for test, whys in reasons.items() if None not in whys}
    return {test: " | ".join(sorted(set(whys))) for test, whys in nowhere.items() if test[0] or test[1] not in ran}


def main(reports: list[str]) -> int:
    if not reports:
        sys.exit("which reports? .nox/reports/*.xml")
    skipped = skipped_everywhere(reports)
    unknown = {test: why for test, why in skipped.items() if not any(re.search(known, why) for known in KNOWN)}
    for (file, test), why in sorted(unknown.items()):
        print(f"ran nowhere: {file} {test}: {why}")
    print(
        f"{len(skipped)} tests ran in none of {len(reports)} reports, {len(unknown)} of them for a reason unknown here"
    )
    return int(bool(unknown))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
