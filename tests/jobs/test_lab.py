from unirl.jobs import lab
from unirl.lab.show import Shown


def test_show_prints_a_table_and_last_the_path_of_the_sheet(tmp_path, capfd):
    assert lab.show(tmp_path / "sheet", checkpoint="lab:janus", count=3, seed=0, guidance=1.0) == 0
    printed = capfd.readouterr()
    *table, path = printed.out.splitlines()
    assert path == str(tmp_path / "sheet" / "lab.png")
    assert (tmp_path / "sheet" / "lab.png").is_file()
    assert "drawn exactly" in table[0]
    assert any(line.split()[:2] == ["all", "3"] for line in table)
    assert "%|" not in printed.err


def test_a_competence_table_counts_by_category():
    def make(category, exact, partial, right):
        return Shown(category=category, prompt="p", exact=exact, partial=partial, question="q", answer="a", right=right)

    shown = [make("counting", True, 1.0, True), make("counting", False, 0.5, True), make("colors", True, 1.0, False)]
    table = lab.competence_table([*shown, make("colors", True, 1.0, True)] * 2)
    rows = [line.split() for line in table.splitlines()]
    assert rows[1:4] == [
        ["colors", "4", "4", "1.00", "2"],
        ["counting", "4", "2", "0.75", "4"],
        ["all", "8", "6", "0.88", "6"],
    ]
    assert table.splitlines()[4].count("0.41 to 0.93") == 2
    assert len(set(map(len, table.splitlines()))) == 1
