import io
import time

import pytest
from rich.console import Console

from tests.monitoring.made_run import make_step
from unirl.monitoring.metrics import step_metrics
from unirl.monitoring.terminal import Terminal, format_duration, step_line


def make_terminal(num_steps=5, *, tty=False, waiting_for=lambda: "rollout", **options):
    out = io.StringIO()
    console = Console(file=out, force_terminal=tty, width=200, soft_wrap=True, highlight=False)
    terminal = Terminal(num_steps, waiting_for=waiting_for, console=console, **options)
    return terminal, out


@pytest.fixture(scope="module")
def metrics():
    return [step_metrics(make_step(step, skill=0.3 + 0.1 * step)) for step in range(1, 6)]


def test_without_a_terminal_each_step_is_one_line_of_words(metrics):
    terminal, out = make_terminal()
    with terminal:
        for step, values in enumerate(metrics, 1):
            terminal.step(step, values)
    lines = out.getvalue().splitlines()
    assert len(lines) == 5
    assert lines[0].startswith(f"step=1/5 r_und={metrics[0]['reward/understanding']:.3f} r_gen=")
    assert all(word in lines[4] for word in (" flat_gen=", " clip=0.000 ", " gap=", " t=", "(rollout ", " eta=0s"))
    assert "\x1b" not in out.getvalue()
    assert max(map(len, lines)) < 300


def test_on_a_terminal_a_table_is_kept_up_to_date(metrics):
    terminal, out = make_terminal(tty=True)
    with terminal:
        terminal.step(1, metrics[0])
    assert "step 1/5" in out.getvalue()
    assert "now: rollout" in out.getvalue()
    assert "reward/generation" in out.getvalue()
    assert "step=1/5" not in out.getvalue()


def eta_after(*steps, num_steps=11):
    """The ETA shown after steps that took these seconds by phase."""
    terminal, out = make_terminal(num_steps)
    with terminal:
        for step, seconds in enumerate(steps, 1):
            phases = {f"time/{phase}_s": value for phase, value in seconds.items()}
            terminal.step(step, phases | ({"time/step_s": sum(seconds.values())} if seconds else {}))
    return out.getvalue().splitlines()[-1].split("eta=")[1]


def test_the_remaining_time_leaves_out_what_came_before_the_first_step():
    assert eta_after({"evaluate": 600.0, "rollout": 3.0, "update": 1.0}) == "40s"


def test_the_remaining_time_holds_what_most_steps_hold():
    usual, evaluated = {"rollout": 3.0, "save": 1.0}, {"rollout": 3.0, "save": 1.0, "evaluate": 600.0}
    assert eta_after(evaluated, usual, evaluated, usual, usual) == "24s"
    assert eta_after(*[usual | {"evaluate": 6.0}] * 5) == "1m00s"


def test_without_a_timed_step_no_remaining_time_is_shown(metrics):
    assert eta_after({}) == "-"
    terminal, out = make_terminal(tty=True)
    with terminal:
        time.sleep(0.1)
    assert "step 0/5   ETA -   now" in out.getvalue()


def test_the_summary_gives_first_last_and_best(metrics):
    terminal, out = make_terminal(12)
    with terminal:
        for step in range(1, 13):
            values = {"reward/generation": 0.1 * step if step < 9 else 0.2}
            terminal.step(step, values | ({"reward/generation/aligned": 0.5} if step == 3 else {}))
    terminal.summary({"report": "runs/x/report.html"})
    shown = out.getvalue()
    row = next(line for line in shown.splitlines() if " reward/generation " in line)
    # Means of five steps: 1 to 5, 8 to 12, and the best, 4 to 8.
    assert [word for word in row.replace("│", " ").split() if word[0].isdigit()] == ["0.300", "0.320", "0.600", "8"]
    aligned = next(line for line in shown.splitlines() if " reward/generation/aligned " in line)
    assert aligned.replace("│", " ").split()[-1] == "3"
    assert "report  runs/x/report.html" in shown


def test_quiet_shows_nothing(metrics):
    terminal, out = make_terminal(quiet=True)
    with terminal:
        terminal.banner({"run": "x"})
        terminal.step(1, metrics[0])
    terminal.summary({"report": "x"})
    assert out.getvalue() == ""


def test_model_text_in_a_fact_is_not_taken_for_markup():
    terminal, out = make_terminal()
    terminal.banner({"prompt": "[red]a[/red] [/nonsense]"})
    assert "[red]a[/red] [/nonsense]" in out.getvalue()


@pytest.mark.parametrize(("seconds", "text"), [(0.4, "0s"), (59.6, "1m00s"), (192, "3m12s"), (18420, "5h07m")])
def test_durations_read_easily(seconds, text):
    assert format_duration(seconds) == text


def test_a_line_shows_only_what_was_measured():
    assert step_line(3, 9, {"reward/generation": 0.5}, 6.0) == "step=3/9 r_gen=0.500 t=0.0s eta=6s"
    assert step_line(3, 9, {}, None).endswith(" eta=-")
