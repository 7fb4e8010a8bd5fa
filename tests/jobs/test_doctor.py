import json

import pytest

from unirl.jobs import doctor
from unirl.jobs.doctor import Finding, check_lab, check_owner, check_room, check_torchvision, check_versions, render


def test_this_environment_has_no_problem(capsys):
    code = doctor.main(as_json=True)
    findings = json.loads(capsys.readouterr().out)
    assert [finding for finding in findings if finding["state"] == "problem"] == []
    assert code == 0
    assert {"python", "torch build", "torchvision", "lab checkpoint", "ports", "disk"} <= {f["name"] for f in findings}


def test_torchvision_is_native_or_declared():
    (finding,) = check_torchvision()
    assert finding.value.split()[-1] in {"native", "declared"}


def test_a_missing_package_is_a_problem_with_a_fix():
    (finding,) = check_versions(("a-package-that-is-nowhere",))
    assert (finding.state, finding.value) == ("problem", "not installed")
    assert "setup.sh" in finding.fix


def test_two_owners_of_the_package_are_a_problem(monkeypatch):
    monkeypatch.setattr(doctor, "packages_distributions", lambda: {"unirl": ["unirl", "unirl-posttrain"]})
    (finding,) = check_owner()
    assert finding.state == "problem"
    assert "pip uninstall unirl;" in finding.fix


@pytest.mark.parametrize(("heads", "state"), [(4, "ok"), (8, "problem")])
def test_a_head_size_without_a_cpu_kernel_is_a_problem(tmp_path, heads, state):
    text = {"hidden_size": 128, "num_attention_heads": heads}
    (tmp_path / "config.json").write_text(json.dumps({"text_config": text}))
    assert check_lab(tmp_path)[0].state == state


def test_a_missing_checkpoint_is_a_problem(tmp_path):
    assert check_lab(tmp_path)[0].state == "problem"


def test_too_little_room_is_a_problem(monkeypatch, tmp_path):
    monkeypatch.setattr(doctor, "MIN_DISK_GIB", 1e9)
    finding = check_room(tmp_path)[0]
    assert finding.state == "problem"
    assert str(tmp_path) in finding.fix


def test_a_broken_package_hides_no_other_finding(monkeypatch, capsys):
    def broken():
        raise ImportError("no such library")

    monkeypatch.setattr(doctor, "check_torch", broken)
    monkeypatch.setattr(doctor, "check_torchvision", lambda: [])
    assert doctor.main(as_json=False) == 3
    assert "PROBLEM" in capsys.readouterr().out


def test_a_fix_stands_below_its_finding():
    line = render(Finding(name="disk", state="problem", value="1.0 GiB free", fix="free space"))
    assert line == "PROBLEM disk: 1.0 GiB free\n        fix: free space"
