import json

from tests.data.importers.made_store import made
from tests.data.interleaved_samples import outline


def test_rationale_and_target_become_the_answer(tmp_path):
    record = {
        "source": "Is ice cold?",
        "target": "yes",
        "rationale": "Ice is frozen water.",
        "task": "t",
        "type": "CoT",
    }
    records = {"0": record, "1": record | {"rationale": " "}, "2": record | {"source": "Is fire?"}}
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "CoT_collection_en.json").write_text(json.dumps(records))
    reasons = []
    first, last = made(tmp_path, "cot_collection", tmp_path, bad=reasons)
    answer = "+Ice is frozen water.\n\nThe answer is: yes"
    assert outline(first) == [("user", "-Is ice cold?"), ("assistant", answer)]
    assert (last.id, last.source, last.subset) == (
        "cot_collection/CoT_collection_en/2", "cot_collection", "understanding",
    )  # fmt: skip
    assert "expected text under 'rationale'" in reasons[0]
