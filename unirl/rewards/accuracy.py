"""Accuracy of answers (PairUni section 2.2: r_und = Acc(y_pred, y_true)): extraction, then a rule per answer type.

An answer that cannot be read is wrong, since the policy wrote it; a gold answer that cannot be read judges nobody.
"""

import math
import re
import unicodedata
from dataclasses import dataclass
from typing import Literal

import numpy as np

from unirl.rewards.math_judge import CouldNotJudgeError, MathJudge
from unirl.types import RewardScores, RolloutGroup, UnderstandingSample

AnswerFormat = Literal["tagged", "free"]

END_TOKENS = (
    "<\uff5cend\u2581of\u2581sentence\uff5c>",
    "</s>",
    "<|im_end|>",
    "<|endoftext|>",
    "<|extra_204|>",
    "<eos>",
)
"""End tokens of the families we know, DeepSeek's first; a decoded completion keeps its own."""
LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"
MAX_MATH_CHARS = 1000

_TAG = re.compile(r"</?answer>")
_CUE = re.compile(r".*\banswer\b\W*(?:is\b|:)[\s:*]*", re.IGNORECASE | re.DOTALL)
_LETTER = re.compile(r"\(?([A-Z])(?:\)|(?=$|[\s.:,]))[.:,]?\s*(.*)", re.DOTALL)
_THOUSANDS = re.compile(r"(?<![\d.,])\d{1,3}(?:,\d{3})+(?!\d|,\d)")
_NUMBER = r"[-+]?(?:\d+\.?\d*|\.\d+)(?:[eE][-+]?\d+)?"
_QUANTITY = re.compile(rf"\$?({_NUMBER})(?:\s*/\s*({_NUMBER}))?\s*(%|[^\W\d_]+)?\.?", re.ASCII)
_EDGE = " \t\n.,;:!?\"'`()[]{}"
_WORDS = re.compile(r"(?=.*[^\W\d_]{2})[^\W\d_]+(?:[\s-]+[^\W\d_]+)*")


@dataclass(frozen=True, slots=True, kw_only=True)
class _Judgement:
    """correct None: could not be judged, and why."""

    correct: bool | None
    formatted: bool
    problem: str = ""


class AccuracyReward:
    """1 for a right answer, 0 for a wrong, unreadable or cut-off one.

    Details: correct, formatted (an answer of the demanded form was found) and truncated (cut off before its end).
    Texts: extracted, the answer that was read.
    """

    def __init__(
        self,
        *,
        answer_format: AnswerFormat = "tagged",
        number_tolerance: float = 1e-6,
        math_timeout_s: float = 3.0,
        end_tokens: tuple[str, ...] = END_TOKENS,
    ) -> None:
        """Choose how answers are read.

        Args:
            answer_format: "tagged" wants `<answer> X </answer>` with nothing but the end token behind it, since a
                looser parser gets exploited; "free" also takes a box, a phrase such as "the answer is X", the text of
                the one option that is mentioned, or the one number.
            number_tolerance: relative difference at which two numbers are still equal.
            math_timeout_s: longest time for one mathematical comparison; a longer one is not judged.
            end_tokens: strings that may end a completion.

        Raises:
            ValueError: an option is out of range.
        """
        if answer_format not in ("tagged", "free"):
            raise ValueError(f"accuracy: expected answer_format tagged or free; got {answer_format!r}; correct it")
        if not 0 <= number_tolerance < 1:
            raise ValueError(f"accuracy: expected number_tolerance in [0, 1); got {number_tolerance}; correct it")
        if not 0 < math_timeout_s < math.inf:
            raise ValueError(f"accuracy: expected a positive, finite math_timeout_s; got {math_timeout_s}; correct it")
        if isinstance(end_tokens, str) or not all(end_tokens):
            raise ValueError(f"accuracy: expected a list of non-empty end_tokens; got {end_tokens!r}; write [token]")
        self._format: AnswerFormat = answer_format
        self._tolerance = number_tolerance
        self._end_tokens = tuple(end_tokens)
        self._math = MathJudge(timeout_s=math_timeout_s)

    def score(self, group: RolloutGroup) -> RewardScores:
        """0 or 1 per answer.

        Raises:
            ValueError: the group holds images.
        """
        sample = group.request.sample
        if not isinstance(sample, UnderstandingSample):
            raise ValueError(
                f"accuracy: expected answers to a question; got the {group.request.task} request "
                f"{group.request.request_id}; list this reward under rewards.understanding"
            )
        truncated = np.array([t.finish_reason == "length" for t in group.trajectories])
        answers = [
            None if cut else extract_answer(t.text or "", self._format, self._end_tokens)
            for t, cut in zip(group.trajectories, truncated, strict=True)
        ]
        results = [self._judge(sample, answer, cut=cut) for answer, cut in zip(answers, truncated, strict=True)]
        correct = np.array([bool(r.correct) for r in results], np.float32)
        problems = dict.fromkeys(r.problem for r in results if r.problem)
        return RewardScores(
            values=correct,
            judged=np.array([r.correct is not None for r in results]),
            details={
                "correct": correct,
                "formatted": np.array([r.formatted for r in results], np.float32),
                "truncated": truncated.astype(np.float32),
            },
            problem="; ".join(problems),
            texts={"extracted": tuple(answers)},
        )

    def close(self) -> None:
        """End the child process that compares expressions."""
        self._math.close()

    def _judge(self, sample: UnderstandingSample, answer: str | None, *, cut: bool) -> _Judgement:
        if cut:
            return _Judgement(correct=False, formatted=False)
        match sample.answer_type:
            case "choice":
                letter = answer and read_choice(answer, sample.choices, self._format)
                return _Judgement(correct=letter == sample.answer, formatted=bool(letter))
            case "number":
                return self._judge_number(sample, answer)
            case "math":
                return self._judge_math(sample, answer)
            case "text":
                return _judge_text(sample, answer)

    def _judge_number(self, sample: UnderstandingSample, answer: str | None) -> _Judgement:
        gold = read_quantity(sample.answer)
        if gold is None:
            return _unreadable_gold(sample, "a finite number such as 3, -0.5, 1,200, 3/4 or 12 cm")
        read = answer and (read_quantity(answer) or (self._format == "free" and _only_quantity(answer)))
        if not read:
            return _Judgement(correct=False, formatted=False)
        same_unit = not (gold[1] and read[1]) or gold[1] == read[1]
        close = math.isclose(gold[0], read[0], rel_tol=self._tolerance, abs_tol=1e-12)
        return _Judgement(correct=close and same_unit, formatted=True)

    def _judge_math(self, sample: UnderstandingSample, answer: str | None) -> _Judgement:
        gold, answer = strip_math(sample.answer), strip_math(answer or "")
        if _WORDS.fullmatch(gold):
            # As products of symbols, words would equal their anagrams.
            return _judge_text(sample, answer)
        if not answer or len(answer) > MAX_MATH_CHARS or r"\boxed" in answer or not _braces_match(answer):
            return _Judgement(correct=False, formatted=False)
        try:
            verdict = self._math.judge(split_list(gold), split_list(answer))
        except CouldNotJudgeError as error:
            return _Judgement(correct=None, formatted=True, problem=str(error))
        if verdict == "unreadable_gold":
            return _unreadable_gold(sample, "an expression that math_verify reads")
        return _Judgement(correct=verdict == "equal", formatted=verdict != "unreadable_answer")


build = AccuracyReward


def extract_answer(text: str, answer_format: AnswerFormat, end_tokens: tuple[str, ...] = END_TOKENS) -> str | None:
    """What a completion gives as its answer, stripped; None when it gives none in the demanded form.

    Answer tags must come in closed pairs, not nested; the last pair counts.
    """
    text = text.strip()
    for token in end_tokens:
        if text.endswith(token):
            text = text.removesuffix(token).rstrip()
            break
    tags = _TAG.findall(text)
    paired = tags == ["<answer>", "</answer>"] * (len(tags) // 2)
    content, _, behind = text.rpartition("<answer>")[2].partition("</answer>") if tags and paired else ("", "", "")
    if answer_format == "tagged":
        return content.strip() or None if not behind else None
    spoken = text.rpartition("</think>")[2].partition("<think>")[0]
    if tags:
        return content.strip() or None if "</answer>" in spoken else None
    return _last_box(spoken) or _CUE.sub("", spoken, count=1).strip(" \n*") or spoken.strip() or None


def read_choice(answer: str, choices: tuple[str, ...], answer_format: AnswerFormat = "tagged") -> str | None:
    """The letter that an answer names, or None.

    "B", "(B)", "B." and "B. text of option B" name B; with any other text behind it a letter names nothing. Free form
    also takes lower case, full-width letters, and the text of exactly one option.
    """
    letters = LETTERS[: len(choices)]
    if answer_format == "tagged":
        return _leading_letter(answer, choices, letters)
    answer = unicodedata.normalize("NFKC", answer).strip()
    if letter := _leading_letter(answer[:2].upper() + answer[2:], choices, letters):
        return letter
    given, options = _as_words(answer), [_as_words(choice) for choice in choices]
    # An option may be part of another ("red", "dark red"): the whole answer counts before mentions do.
    named = [option == given for option in options] if given in options else [option in given for option in options]
    return letters[named.index(True)] if sum(named) == 1 else None


def _as_words(text: str) -> str:
    """The words alone, each between blanks, so that `in` finds whole words only."""
    words = re.findall(r"[^\W_]+", normalise_text(text))
    return f" {' '.join(words)} "


def _leading_letter(answer: str, choices: tuple[str, ...], letters: str) -> str | None:
    match = _LETTER.fullmatch(answer)
    if match is None or match[1] not in letters:
        return None
    rest = normalise_text(match[2])
    return match[1] if rest in ("", normalise_text(choices[letters.index(match[1])])) else None


def read_quantity(text: str) -> tuple[float, str] | None:
    """Value and unit of a text that is one number and nothing else, e.g. (12.0, "cm"); a percentage is a hundredth."""
    text = unicodedata.normalize("NFKC", text).replace("\N{MINUS SIGN}", "-").strip()
    match = _QUANTITY.fullmatch(_THOUSANDS.sub(lambda found: found[0].replace(",", ""), text))
    if match is None:
        return None
    number, divisor, unit = match.groups()
    if divisor and float(divisor) == 0:
        return None
    value = float(number) / float(divisor or 1) / (100 if unit == "%" else 1)
    return (value, "" if unit in (None, "%") else unit.casefold()) if math.isfinite(value) else None


def _only_quantity(text: str) -> tuple[float, str] | None:
    """The number that a text mentions, when it mentions one only."""
    text = _THOUSANDS.sub(lambda found: found[0].replace(",", ""), unicodedata.normalize("NFKC", text))
    found = {
        float(number) / (100 if percent else 1) for number, percent in re.findall(rf"(?<![\w.])({_NUMBER})(%?)", text)
    }
    value = found.pop() if len(found) == 1 else math.nan
    return (value, "") if math.isfinite(value) else None


def normalise_text(text: str) -> str:
    """Text for comparison: compatibility forms, case folded, single blanks, no punctuation at the edges."""
    return " ".join(unicodedata.normalize("NFKC", text).casefold().split()).strip(_EDGE)


def strip_math(text: str) -> str:
    r"""An expression without its display: `$x$`, `\(x\)`, `\[x\]` and `\boxed{x}` give x; dashes become minus signs."""
    text = text.replace("\N{MINUS SIGN}", "-").strip().rstrip(".")
    for opening, closing in (("$$", "$$"), ("$", "$"), (r"\(", r"\)"), (r"\[", r"\]"), (r"\boxed{", "}")):
        inner = text.removeprefix(opening).removesuffix(closing)
        if len(inner) == len(text) - len(opening) - len(closing) and _braces_match(inner):
            text = inner.strip()
    return text


def split_list(expression: str) -> list[str]:
    """Parts between commas outside brackets. math_verify would read a comma list as a set and lose its order."""
    expression = _THOUSANDS.sub(lambda found: found[0].replace(",", ""), expression)
    parts, depth = [""], 0
    for char in expression:
        depth += (char in "([{") - (char in ")]}")
        if char == "," and depth == 0:
            parts.append("")
        else:
            parts[-1] += char
    return [part.strip() for part in parts]


def _judge_text(sample: UnderstandingSample, answer: str | None) -> _Judgement:
    gold = normalise_text(sample.answer)
    if not gold:
        return _unreadable_gold(sample, "a text with letters or digits")
    given = normalise_text(answer or "")
    return _Judgement(correct=given == gold, formatted=bool(given))


def _unreadable_gold(sample: UnderstandingSample, expected: str) -> _Judgement:
    problem = (
        f"accuracy: expected the gold answer of sample {sample.id} ({sample.answer_type}) to be {expected}; got "
        f"{sample.answer!r}; correct the record or its answer_type"
    )
    return _Judgement(correct=None, formatted=False, problem=problem)


def _braces_match(text: str) -> bool:
    """Whether curly braces close in order, so that a text cannot end the box it is put in."""
    depth = 0
    for char in re.findall(r"(?<!\\)[{}]", text):
        depth += 1 if char == "{" else -1
        if depth < 0:
            return False
    return depth == 0


def _last_box(text: str) -> str | None:
    r"""Content of the last balanced `\boxed{...}`."""
    for start in reversed([match.end() for match in re.finditer(r"\\boxed\{", text)]):
        depth = 1
        for end, char in enumerate(text[start:], start):
            depth += (char == "{") - (char == "}")
            if depth == 0:
                return text[start:end].strip()
    return None
