"""A comparison -> JUnit XML: a test case per point, skipped with its reason when it does not count, and one per gate."""

from __future__ import annotations

import re
from xml.etree import ElementTree

from tkit.report.gates import described
from tkit.report.record import FAILED, NOT_EVALUATED, PASSED, Comparison

# what XML 1.0 cannot hold, not even escaped
FORBIDDEN = re.compile("[^\t\n\r\u0020-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]")
REPLACEMENT = "\N{REPLACEMENT CHARACTER}"


def render_junit(comparison: Comparison) -> str:
    root = ElementTree.Element("testsuites", name="tkit report")
    suites = [_points(comparison)]
    if comparison.gates:
        suites.append(_gates(comparison))
    for suite in suites:
        tags = [child.tag for case in suite for child in case]
        suite.set("tests", str(len(suite)))
        for tag, attribute in (("failure", "failures"), ("error", "errors"), ("skipped", "skipped")):
            suite.set(attribute, str(tags.count(tag)))
        root.append(suite)
    for attribute in ("tests", "failures", "errors", "skipped"):
        root.set(attribute, str(sum(int(suite.get(attribute, "0")) for suite in suites)))
    ElementTree.indent(root)
    return f'<?xml version="1.0" encoding="UTF-8"?>\n{ElementTree.tostring(root, encoding="unicode")}\n'


def _points(comparison: Comparison) -> ElementTree.Element:
    suite = ElementTree.Element("testsuite", name="points", timestamp=comparison.created)
    for run in comparison.runs:
        for group in comparison.groups:
            apart = f" ({group.token_source}, {group.definitions})" if group.note else ""
            for level in group.levels:
                for cell in level.cells:
                    if cell.run != run.id:
                        continue
                    case = _case(suite, run.name, f"{group.shape} {level.load}{apart}")
                    reasons = "; ".join(cell.invalid_reasons)
                    if not cell.is_valid:
                        ElementTree.SubElement(case, "skipped", message=_xml(f"invalid: {reasons}"))
                    elif reasons:
                        ElementTree.SubElement(case, "system-out").text = _xml(f"not counted: {reasons}")
        for missing in run.missing:
            case = _case(suite, run.name, str(missing))
            reason = f"the sweep ended early: {run.ended_early}" if run.ended_early else "no readable result"
            ElementTree.SubElement(case, "skipped", message=_xml(f"missing: {reason}"))
    return suite


def _gates(comparison: Comparison) -> ElementTree.Element:
    suite = ElementTree.Element("testsuite", name="gates", timestamp=comparison.created)
    for outcome in comparison.gates:
        case = _case(suite, "gates", outcome.gate.text)
        if outcome.state != PASSED:
            tag = "failure" if outcome.state == FAILED else "error"
            lines = described(comparison, outcome, outcome.state)
            rest = described(comparison, outcome, NOT_EVALUATED) if outcome.state == FAILED else []
            found = ElementTree.SubElement(case, tag, message=_xml(lines[0]), type=outcome.state)
            found.text = _xml("\n".join(lines + rest))
        else:
            lines = described(comparison, outcome, PASSED)
            ElementTree.SubElement(case, "system-out").text = _xml("\n".join(lines))
    return suite


def _case(suite: ElementTree.Element, classname: str, name: str) -> ElementTree.Element:
    return ElementTree.SubElement(suite, "testcase", classname=_xml(classname), name=_xml(name))


def _xml(value: str) -> str:
    return FORBIDDEN.sub(REPLACEMENT, value)
