"""What a generated reply to a held-out sample of the seven subsets is worth, judged from its pixels and words.

A reply is a tuple of segments, text without special tokens. Pictures are judged in their order: a missing one is
wrong, one too many makes the reply ill-formed and earns nothing.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from unirl.lab.subsets.arrangements import content
from unirl.lab.subsets.lesson import Fact, Lesson, Wanted, prompt_turns, reply_segments
from unirl.lab.unified_visual import SUBSETS, Subset, make_lesson
from unirl.lab.verifier import FREE_JUNK_PX, FoundObject, detect, verify
from unirl.lab.world import CELL_PX, LETTERS, Scene, Spec, scene_relation
from unirl.types import Segment, Turn

EXAM_SEED = 777
PLACE_TOLERANCE_PX = CELL_PX / 2
"""How far from its place the centre of an object may lie, in either direction."""

Reply = Sequence[Segment]


@dataclass(frozen=True, slots=True, kw_only=True)
class ExamItem:
    """A held-out prompt and what the reply to it must hold."""

    id: str
    subset: Subset
    kind: str
    prompt: tuple[Turn, ...]
    wanted: tuple[Wanted, ...]
    """What each picture of the reply must show."""
    answer: str | None
    """The right letter; None where nothing is asked."""
    wrong: Spec | None
    """What the wrong picture shows that is to be corrected."""
    reply: tuple[Segment, ...]
    """The sample's own reply."""


def make_exam(num_per_subset: int, seed: int = EXAM_SEED, subsets: Iterable[Subset] = SUBSETS) -> list[ExamItem]:
    """Held-out items, equally many of each subset; equal arguments give equal items."""
    return [_item(subset, seed, index) for subset in subsets for index in range(num_per_subset)]


def _item(subset: Subset, seed: int, index: int) -> ExamItem:
    kind, lesson = make_lesson(subset, seed, index, heldout=True)
    return ExamItem(
        id=f"{subset}-exam-{seed}-{index:06d}",
        subset=subset,
        kind=kind,
        prompt=prompt_turns(lesson),
        wanted=tuple(drawing.wanted for drawing in lesson.drawings),
        answer=lesson.answer,
        wrong=_wrong(lesson),
        reply=reply_segments(lesson),
    )


def _wrong(lesson: Lesson) -> Spec | None:
    if lesson.first_try is None:
        return None
    objects = lesson.first_try[1].objects
    relation = scene_relation(objects) if lesson.key.relation else None
    return replace(content(objects), relation=relation)


def grade(item: ExamItem, reply: Reply) -> dict[str, float | None]:
    """The scores of one reply in [0, 1], by the names that its subset has; None where there is nothing to judge.

    Raises:
        ValueError: a picture is not uint8 [20, 20, 3].
    """
    scores = {name: measure(item, reply) for name, measure in _METRICS[item.subset].items()}
    return {"well_formed": float(is_well_formed(item, reply)), **scores}


def summarize(items: Sequence[ExamItem], replies: Sequence[Reply]) -> dict[str, float]:
    """Means over what was judged, as "subset/metric"; one that never was is absent."""
    judged: dict[str, list[float]] = {}
    for item, reply in zip(items, replies, strict=True):
        for name, score in grade(item, reply).items():
            if score is not None:
                judged.setdefault(f"{item.subset}/{name}", []).append(score)
    return {name: float(np.mean(scores)) for name, scores in judged.items()}


def is_well_formed(item: ExamItem, reply: Reply) -> bool:
    """Whether text and pictures alternate as in the sample's own reply, and an answer can be read where one is due."""
    alternation = [segment.text is None for segment in reply] == [segment.text is None for segment in item.reply]
    return alternation and (item.answer is None or read_answer(reply) is not None)


def read_answer(reply: Reply) -> str | None:
    """The letter of "<answer> A </answer>" at the end of the reply; None unless that is the only answer in it."""
    words = " ".join(segment.text or "" for segment in reply).split()
    if not reply or reply[-1].text is None or words.count("<answer>") != 1 or len(words) < 3:
        return None
    opening, letter, closing = words[-3:]
    return letter if opening == "<answer>" and closing == "</answer>" and letter in LETTERS else None


def judge(image: NDArray[np.uint8], wanted: Wanted) -> tuple[float, float]:
    """Whether the picture uint8 [20, 20, 3] shows what is wanted, and how nearly."""
    if isinstance(wanted, tuple):
        verdicts = [verify(spec, image) for spec in wanted]
        return float(all(verdict.exact for verdict in verdicts)), min(verdict.partial for verdict in verdicts)
    detection = detect(image)
    clean = detection.junk_px <= FREE_JUNK_PX
    if isinstance(wanted, Fact):
        holds = float(clean and wanted.holds(detection.objects))
        return holds, holds
    share = _share_in_place(wanted, detection.objects)
    return float(clean and share == 1), share * clean


def _share_in_place(scene: Scene, objects: Sequence[FoundObject]) -> float:
    """F1 of the scene's objects, each found at its place."""
    found, hits = list(objects), 0
    for placed in scene.objects:
        for other in found:
            gap = max(abs(a - b) for a, b in zip(placed.centre, other.centre, strict=True))
            if (placed.shape, placed.color) == (other.shape, other.color) and gap <= PLACE_TOLERANCE_PX:
                found.remove(other)
                hits += 1
                break
    return 2 * hits / (len(scene.objects) + len(objects))


Metric = Callable[[ExamItem, Reply], float | None]


def _pictures(reply: Reply) -> list[NDArray[np.uint8]]:
    return [segment.image for segment in reply if segment.image is not None]


def _judged(item: ExamItem, reply: Reply) -> list[tuple[float, float]]:
    """(exact, partial) of each wanted picture."""
    scores = [judge(image, wanted) for image, wanted in zip(_pictures(reply), item.wanted, strict=False)]
    return scores + [(0.0, 0.0)] * (len(item.wanted) - len(scores))


def _exact(item: ExamItem, reply: Reply) -> float:
    return float(np.mean([exact for exact, _ in _judged(item, reply)]))


def _partial(item: ExamItem, reply: Reply) -> float:
    return float(np.mean([partial for _, partial in _judged(item, reply)]))


def _rationale(item: ExamItem, reply: Reply) -> float:
    """Whether the words before the picture end by naming the right one."""
    gold = item.reply[0].text or ""
    said = reply[0].text if reply else None
    return float(said is not None and said.endswith(gold[gold.rindex("so draw") :]))


def _answer(item: ExamItem, reply: Reply) -> float:
    return float(read_answer(reply) == item.answer)


def _answer_given_right_drawing(item: ExamItem, reply: Reply) -> float | None:
    """Counted only where the drawing is right: how well the answer is read off it."""
    return _answer(item, reply) if _exact(item, reply) == 1 else None


def _wrong_replaced(item: ExamItem, reply: Reply) -> float | None:
    """0 where the wrong picture is drawn once more; None without a picture that shows anything."""
    pictures = _pictures(reply)
    detection = detect(pictures[0]) if pictures else None
    if detection is None or not detection.objects or detection.junk_px > FREE_JUNK_PX:
        return None
    assert item.wrong, "a correction starts from a wrong picture"
    return float(not verify(item.wrong, pictures[0]).exact)


def _steps_in_order(item: ExamItem, reply: Reply) -> float:
    """Whether the steps are numbered from 1 to the last and every picture shows its own step."""
    numbers = [(segment.text or "").split()[:3] for segment in reply if segment.text is not None]
    wanted = [["(", str(number), ")"] for number in range(1, len(item.wanted) + 1)]
    return float(numbers == wanted and len(_pictures(reply)) == len(wanted) and _exact(item, reply) == 1)


def _goal_reached(item: ExamItem, reply: Reply) -> float:
    """Whether the last picture of the reply shows what was to be built."""
    pictures = _pictures(reply)
    return judge(pictures[-1], item.wanted[-1])[0] if pictures else 0.0


_METRICS: dict[Subset, dict[str, Metric]] = {
    "image_generation": {"picture_exact": _exact, "picture_partial": _partial, "rationale_right": _rationale},
    "image_editing": {"edit_exact": _exact, "edit_partial": _partial, "rationale_right": _rationale},
    "image_correction": {
        "corrected": _exact,
        "corrected_partial": _partial,
        "wrong_replaced": _wrong_replaced,
        "rationale_right": _rationale,
    },
    "mm_reasoning_o": {"crop_exact": _exact, "crop_partial": _partial, "answer_right": _answer},
    "mm_reasoning_mm": {"recalled_fits": _exact, "answer_right": _answer},
    "mm_reasoning_t": {
        "drawing_exact": _exact,
        "drawing_partial": _partial,
        "answer_with_drawing": _answer,
        "answer_given_right_drawing": _answer_given_right_drawing,
    },
    "mm_reasoning_t_direct": {"answer_without_drawing": _answer},
    "mm_internet": {"steps_exact": _exact, "steps_in_order": _steps_in_order, "goal_reached": _goal_reached},
    "understanding": {"answer_right": _answer},
    "text_reasoning": {"answer_right": _answer},
    "normal": {"picture_exact": _exact, "picture_partial": _partial},
}
