"""Asks a killable child process whether two mathematical answers are equal.

sympy can hang or eat all memory on what a policy writes, and neither threads nor signals end that safely.
"""

import contextlib
import json
import math
import os
import selectors
import subprocess
import sys
import time
import weakref
from pathlib import Path
from typing import Any, Literal, get_args

Verdict = Literal["equal", "different", "unreadable_gold", "unreadable_answer"]

START_TIMEOUT_S = 120.0
_CHILD = Path(__file__).with_name("math_child.py")


class CouldNotJudgeError(RuntimeError):
    """One item found no verdict; the message says why. The next item is served by a new child."""


class MathJudge:
    """A child process that judges, started when first needed and replaced after it was killed."""

    def __init__(self, *, timeout_s: float) -> None:
        """State the limit; nothing starts yet.

        Args:
            timeout_s: longest time for one item, start of the child not included.
        """
        self._timeout_s = timeout_s
        self._child: subprocess.Popen[bytes] | None = None

    @property
    def pid(self) -> int | None:
        """Process id of the child; None while there is none."""
        return self._child.pid if self._child else None

    def judge(self, gold: list[str], answer: list[str]) -> Verdict:
        """Whether two lists of LaTeX expressions agree, part by part and in order.

        Raises:
            CouldNotJudgeError: the child was too slow, died or failed on this item.
        """
        try:
            child = self._child or self._start()
            self._child = child
            request = {"gold": gold, "answer": answer, "alarm_s": math.ceil(self._timeout_s) + 5}
            reply = _ask(child, (json.dumps(request) + "\n").encode(), self._timeout_s)
        except BaseException as error:
            # Also when interrupted: a reply that comes too late must never be read as the answer to the next item.
            self.close()
            if isinstance(error, (BrokenPipeError, EOFError, TimeoutError)):
                raise CouldNotJudgeError(
                    f"math: expected a verdict within {self._timeout_s:g} s on gold {','.join(gold)!r} and answer "
                    f"{','.join(answer)[:200]!r}; got {error or type(error).__name__}; the child process was replaced, "
                    "raise math_timeout_s if such answers are legitimate"
                ) from error
            raise
        assert reply in get_args(Verdict), f"the child replied {reply!r}"
        return reply

    def close(self) -> None:
        """Kill the child; the next item starts another."""
        if self._child is not None:
            _kill(self._child)
            self._child = None

    def _start(self) -> subprocess.Popen[bytes]:
        # -P: this folder must not shadow top-level modules. Its own session: Ctrl-C in the terminal is for the run.
        command = [sys.executable, "-P", str(_CHILD)]
        child = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, start_new_session=True)
        weakref.finalize(self, _kill, child)
        try:
            _ask(child, b"", START_TIMEOUT_S)
        except (EOFError, TimeoutError) as error:
            _kill(child)
            raise RuntimeError(
                f"math: expected the child process {_CHILD.name} to start within {START_TIMEOUT_S:g} s; got {error}, "
                "its own message is on standard error; check that math_verify imports"
            ) from error
        return child


def _ask(child: subprocess.Popen[bytes], line: bytes, timeout_s: float) -> Any:
    """Send a line and return the decoded line that comes back within the limit."""
    assert child.stdin is not None, "the child was started with pipes"
    assert child.stdout is not None, "the child was started with pipes"
    child.stdin.write(line)
    child.stdin.flush()
    deadline = time.monotonic() + timeout_s
    received = b""
    with selectors.DefaultSelector() as selector:
        selector.register(child.stdout, selectors.EVENT_READ)
        while not received.endswith(b"\n"):
            if not selector.select(max(0.0, deadline - time.monotonic())):
                raise TimeoutError(f"nothing after {timeout_s:g} s")
            chunk = os.read(child.stdout.fileno(), 4096)
            if not chunk:
                raise EOFError(f"the child process ended with status {child.wait()}")
            received += chunk
    return json.loads(received)


def _kill(child: subprocess.Popen[bytes]) -> None:
    child.kill()
    child.wait()
    for pipe in (child.stdin, child.stdout):
        if pipe is not None and not pipe.closed:
            # Unsent bytes of a request that the child never read.
            with contextlib.suppress(BrokenPipeError):
                pipe.close()
