import dataclasses

import numpy as np
import pytest

from tests.monitoring.made_run import make_step
from unirl.monitoring import journal
from unirl.monitoring.step_data import StepData

ODD = np.array([-0.0, -1e-45, -3.4e38, -0.1, np.nextafter(np.float32(-1), np.float32(0)), 0.0], np.float32)


def with_trajectory(data, **changes):
    """The step with the first trajectory of its first group changed."""
    first = data.groups[0]
    group = first.scored.group
    trajectories = (dataclasses.replace(group.trajectories[0], **changes), *group.trajectories[1:])
    scored = dataclasses.replace(first.scored, group=dataclasses.replace(group, trajectories=trajectories))
    return StepData(step=data.step, groups=(dataclasses.replace(first, scored=scored), *data.groups[1:]))


@pytest.fixture(scope="module")
def data():
    made = make_step(12, unjudged=(2,))
    return with_trajectory(
        made,
        completion_ids=np.arange(6, dtype=np.int32),
        loss_mask=np.array([1, 0, 1, 1, 0, 1], bool),
        logprobs=ODD,
        unmask_step=np.array([3, 1, 2, 0, 5, 4], np.int16),
        text="löng\x00 <b>\n\u2028",
    )


@pytest.fixture(scope="module")
def rows(data, tmp_path_factory):
    folder = tmp_path_factory.mktemp("run")
    path = journal.write_step(folder, data, {(data.groups[1].scored.group.request.request_id, 0): "shown.webp"})
    assert path == folder / "journal" / "step_000012.parquet"
    assert [file.name for file in path.parent.iterdir()] == [path.name]
    return journal.read_step(folder, 12)


def test_arrays_come_back_bit_for_bit(data, rows):
    trajectories = [t for group in data.groups for t in group.scored.group.trajectories]
    assert len(rows) == len(trajectories)
    for row, trajectory in zip(rows, trajectories, strict=True):
        for name in ("prompt_ids", "completion_ids", "logprobs", "loss_mask", "unmask_step"):
            wrote, read = getattr(trajectory, name), getattr(row, name)
            if wrote is None:
                assert read is None
            else:
                assert read.dtype == wrote.dtype
                assert read.tobytes() == wrote.tobytes(), name
    assert rows[0].logprobs.tobytes() == ODD.tobytes()


def test_everything_an_update_needs_comes_back(data, rows):
    every = [(group, index) for group in data.groups for index in range(len(group.advantages))]
    for row, (group, index) in zip(rows, every, strict=True):
        scored, trajectory = group.scored, group.scored.group.trajectories[index]
        assert (row.request_id, row.pair_id, row.task) == (
            scored.group.request.request_id,
            group.pair.pair_id,
            scored.group.request.task,
        )
        assert (row.index, row.seed, row.policy_version) == (index, trajectory.seed, trajectory.policy_version)
        assert (row.reward, row.judged) == (float(scored.rewards[index]), bool(scored.judged[index]))
        assert (row.advantage, row.pair_weight) == (group.advantages[index], group.pair_weight)
        assert (row.pair_kind, row.similarity) == (group.pair.kind, group.pair.similarity)
        assert (row.text, row.finish_reason) == (trajectory.text, trajectory.finish_reason)
        for part in row.components:
            scores = scored.components[part.name]
            assert part.value == scores.values[index]
            assert part.judged == scores.judged[index]
            assert part.details == {name: values[index] for name, values in scores.details.items()}
            assert part.problem == "the judge did not answer in 60 s"


def test_only_shown_images_have_a_name(data, rows):
    assert [row.image for row in rows].count("shown.webp") == 1
    assert sum(row.image is not None for row in rows) == 1


def test_a_step_run_again_replaces_its_file(data, tmp_path):
    journal.write_step(tmp_path, data, {})
    journal.write_step(tmp_path, with_trajectory(data, text="again"), {})
    assert journal.read_step(tmp_path, 12)[0].text == "again"


def test_a_step_without_journal_says_which_steps_have_one(tmp_path):
    with pytest.raises(ValueError, match=r"expected the trajectories of step 7 .*monitoring.journal=true"):
        journal.read_step(tmp_path, 7)


def test_a_cut_file_is_a_clear_error(data, tmp_path):
    path = journal.write_step(tmp_path, data, {})
    path.write_bytes(path.read_bytes()[:-40])
    with pytest.raises(ValueError, match="expected the trajectories of step 12"):
        journal.read_step(tmp_path, 12)
