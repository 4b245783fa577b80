"""No random model is computed wrongly: 300 in the ordinary run, 20 000 and 500 through Inductor in the slow one."""

from __future__ import annotations

import functools
import subprocess
import sys
from pathlib import Path

import pytest

from fuse_pass.testing import fuzz as command
from fuse_pass.testing.compare import Difference, Status, Verdict, check
from fuse_pass.testing.fuzz import Summary, fuzz
from fuse_pass.testing.generate import generate
from fuse_pass.testing.program import Program, load, script
from fuse_pass.testing.shrink import shrink
from fuse_pass.testing.sources import spellings
from tests.testing.faults import FAULTS

planted_and_near = pytest.mark.parametrize("near_misses", [False, True], ids=["planted", "near misses"])


def explained(summary: Summary) -> str:
    return "\n".join([str(summary), *(f"seed {seed}: {verdict}" for seed, _, verdict in summary.failures)])


def assert_none_wrong(seed: int, graphs: int, near_misses: bool, level: str = "aot") -> None:
    summary = fuzz(seed, graphs, programs=functools.partial(generate, near_misses=near_misses), level=level)
    assert not summary.failures, explained(summary)
    assert summary.graphs == graphs
    # What is not compared finds nothing: few programs may be refused, and many must fuse.
    assert summary.statuses[Status.REFUSED] + summary.statuses[Status.AS_STOCK] <= graphs / 4, explained(summary)
    assert summary.fusions.total() >= graphs / 4, explained(summary)


@planted_and_near
@pytest.mark.parametrize("seed", range(0, 9000, 3000))
def test_fifty_graphs(seed: int, near_misses: bool) -> None:
    assert_none_wrong(seed, 50, near_misses)


@pytest.mark.slow
@planted_and_near
@pytest.mark.parametrize("seed", range(1_000_000, 2_000_000, 50_000))
def test_five_hundred_graphs(seed: int, near_misses: bool) -> None:
    """Twenty shards of each kind."""
    assert_none_wrong(seed, 500, near_misses)


@pytest.mark.slow
@planted_and_near
@pytest.mark.parametrize("seed", range(5_000_000, 6_000_000, 100_000))
def test_through_inductor(seed: int, near_misses: bool) -> None:
    """Ten shards of each kind, 500 graphs altogether."""
    assert_none_wrong(seed, 25, near_misses, "inductor")


def test_every_spelling_of_every_pattern_can_be_planted() -> None:
    from fuse_pass.patterns import PATTERNS

    known = {(spelling.pattern, spelling.name) for spelling in spellings()}
    assert known == {(pattern.name, name) for pattern in PATTERNS for name in pattern.corpus.spellings}


def test_a_seed_always_gives_the_same_program() -> None:
    for near_misses in (False, True):
        texts = [generate(7, near_misses=near_misses).text() for _ in range(2)]
        assert texts[0] == texts[1]
        assert texts[0] != generate(8, near_misses=near_misses).text()


def test_the_text_of_every_program_can_be_loaded() -> None:
    for seed in range(200):
        for near_misses in (False, True):
            namespace = load(generate(seed, near_misses=near_misses).text())
            assert namespace["Model"]().training


@planted_and_near
def test_the_text_of_every_program_is_python(near_misses: bool) -> None:
    for seed in range(4000):
        text = generate(seed, near_misses=near_misses).text()
        assert "Model" in compile(text, f"seed {seed}", "exec").co_names


def wrong_program() -> tuple[Program, Verdict]:
    summary = fuzz(0, 60, until=lambda summary: bool(summary.failures))
    ((_, program, verdict),) = summary.failures
    return program, verdict


def test_a_wrong_program_is_shrunk_and_its_script_reproduces_it() -> None:
    fault = next(fault for fault in FAULTS if fault.name == "norm bias not applied")
    with fault.installed():
        program, verdict = wrong_program()
        assert verdict.status is Status.WRONG
        assert "value: error" in str(verdict)
        small = command.smallest(program, "aot")
        assert len(small.statements) <= 3 <= len(program.statements)
        assert check(small.text()).status is Status.WRONG
    assert check(small.text()).status is Status.RIGHT, "without the fault"
    assert 'print(check(Path(__file__).read_text(), "aot"))' in script(small.text(), "aot")


def test_shrinking_stops_where_nothing_can_be_dropped() -> None:
    program = generate(3)
    assert shrink(program, lambda candidate: False) is program
    assert shrink(program, lambda candidate: True, attempts=0) is program


def test_command_line(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    assert command.main(["--seed", "1", "--graphs", "2"]) == 0
    assert "seeds from 1, level aot: 2 graphs: 0 wrong; fused" in capsys.readouterr().out
    bad = Verdict(Status.WRONG, [Difference("round 0: output 0", "value", "error 1")])
    monkeypatch.setattr(command, "check", lambda text, level: bad)
    assert command.main(["--seed", "1", "--graphs", "1", "--shrink"]) == 1
    printed = capsys.readouterr().out
    assert "# seed 1: wrong\n#   round 0: output 0: value: error 1\n" in printed
    assert "class Model(nn.Module):" in printed


def test_a_script_runs_by_itself(tmp_path: Path) -> None:
    path = tmp_path / "reproduction.py"
    path.write_text(script(generate(1).text(), "aot"))
    result = subprocess.run([sys.executable, str(path)], capture_output=True, text=True, check=False)
    assert result.stdout.strip() == "right", result.stderr
