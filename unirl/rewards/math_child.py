"""Judges mathematical answers in a process of its own: one JSON line in, one JSON line out. Started by `math_judge`.

Run as a script, never imported: it needs math_verify and the standard library only.
"""

import json
import logging
import os
import resource
import signal
import sys

from math_verify import parse, verify
from math_verify.parser import LatexExtractionConfig

MEMORY_LIMIT_BYTES = 4 * 2**30

# LaTeX only: the plain-expression reader would pick one number out of a sentence and goes through `eval`.
_TARGETS = [LatexExtractionConfig(boxed_match_priority=0)]


def _read(expression: str) -> list:
    return parse(f"\\boxed{{{expression}}}", extraction_config=_TARGETS, fallback_mode="no_fallback", parsing_timeout=0)


def judge(gold: list[str], answer: list[str]) -> str:
    """Whether two lists of expressions are equal part by part: a comma list keeps its order.

    Returns:
        "equal", "different", "unreadable_gold" or "unreadable_answer".
    """
    golds = [_read(part) for part in gold]
    if not all(golds):
        return "unreadable_gold"
    answers = [_read(part) for part in answer]
    if not all(answers):
        return "unreadable_answer"
    if len(golds) != len(answers):
        return "different"
    pairs = zip(golds, answers, strict=True)
    return "equal" if all(verify(*pair, timeout_seconds=None) for pair in pairs) else "different"


def main() -> None:
    """Answer requests until standard input closes."""
    logging.disable(logging.WARNING)
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY_LIMIT_BYTES, MEMORY_LIMIT_BYTES))
    # Only replies may reach the pipe, whatever a library prints.
    replies = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    # The first comparison builds the parser's tables; no item should pay for that out of its own limit.
    judge([r"\frac{(x+1)^2}{2}"], ["x^2/2+x+1/2"])
    replies.write(json.dumps("ready") + "\n")
    replies.flush()
    for line in sys.stdin:
        request = json.loads(line)
        # The parent kills a late child. This ends it when the parent is gone; no Python handler, so C code ends too.
        signal.alarm(request["alarm_s"])
        replies.write(json.dumps(judge(request["gold"], request["answer"])) + "\n")
        replies.flush()
        signal.alarm(0)


if __name__ == "__main__":
    main()
