"""The probe that chooses who multiplies matrices, and the file that keeps its verdicts."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from fuse_pass.gemm import measured, onednn, probe
from fuse_pass.gemm.probe import QUESTIONS, Question, Round
from fuse_pass.inductor import compat
from tests.gemm.test_providers import chosen

BREAK_EVEN = 4 * probe.MIN_FLOP
LARGE = (512, 256, 256)
VERDICTS = {question.name: BREAK_EVEN if question.name == "float32" else None for question in QUESTIONS}
TABLE = {"float32": BREAK_EVEN}
pytestmark = [
    pytest.mark.processor,
    pytest.mark.skipif(compat.onednn_linear() is None, reason="this build of PyTorch lacks oneDNN"),
]


def answering(break_even: int | None) -> Round:
    return Round(0.5 if break_even is None else 2.0, break_even)


class Asker:
    """Stands in for the timed probe and counts how often all questions were asked.

    Attributes:
        answers: of all rounds, by the name of a question; those of VERDICTS where none are given.
        contradicted: the questions whose answers no longer hold.
    """

    def __init__(self) -> None:
        self.asked: list[str] = []
        self.answers: dict[str, list[Round]] = {}
        self.contradicted: set[str] = set()

    def ask(self, question: Question) -> list[Round]:
        self.asked.append(question.name)
        return self.answers.get(question.name, [answering(VERDICTS[question.name])] * 3)

    def contradicts(self, question: Question, break_even: int | None) -> bool:
        return question.name in self.contradicted

    @property
    def runs(self) -> float:
        return len(self.asked) / len(QUESTIONS)


@pytest.fixture(autouse=True)
def forgotten_table() -> Iterator[None]:
    measured.table.cache_clear()
    yield
    measured.table.cache_clear()


@pytest.fixture
def asker(monkeypatch: pytest.MonkeyPatch) -> Asker:
    found = Asker()
    monkeypatch.setattr(probe, "ask", found.ask)
    monkeypatch.setattr(probe, "contradicts", found.contradicts)
    return found


@pytest.fixture
def file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    path = measured.cache_file()
    assert path.is_relative_to(tmp_path)
    return path


def next_process() -> dict[str, int]:
    measured.table.cache_clear()
    return measured.table()


def test_probed_once_and_read_again(file: Path, asker: Asker) -> None:
    assert measured.table() == TABLE
    written = json.loads(file.read_text())
    assert written["break_even_flop"] == VERDICTS
    assert written["machine"] == measured._machine()
    assert torch.__version__ in written["machine"]
    assert next_process() == TABLE
    assert measured.table() == TABLE
    assert asker.runs == 1
    assert list(file.parent.iterdir()) == [file], "a temporary file is left"


def write_verdicts(file: Path, verdicts: str, machine: str | None = None) -> None:
    """The file as `gemm` writes it, with this JSON as its verdicts."""
    file.parent.mkdir(parents=True)
    file.write_text(f'{{"machine": {json.dumps(machine or measured._machine())}, "break_even_flop": {verdicts}}}')


NOTHING = dict.fromkeys(VERDICTS)


@pytest.mark.parametrize("verdicts", [{"bfloat16": 1 << 21}, {"float32+activation": probe.MIN_FLOP}, {}])
def test_the_file_is_believed(verdicts: dict[str, int], file: Path, asker: Asker) -> None:
    write_verdicts(file, json.dumps(NOTHING | verdicts))
    assert measured.table() == verdicts
    assert asker.runs == 0


def test_only_what_the_file_does_not_answer_is_asked(file: Path, asker: Asker) -> None:
    write_verdicts(file, '{"bfloat16": 4000000}')
    assert measured.table() == {"bfloat16": 4_000_000} | TABLE
    assert sorted(asker.asked) == sorted(VERDICTS.keys() - {"bfloat16"})
    assert json.loads(file.read_text())["break_even_flop"] == VERDICTS | {"bfloat16": 4_000_000}


def test_rounds_that_disagree_are_no_answer(file: Path, asker: Asker) -> None:
    """PyTorch's own product until the next process, which asks again."""
    asker.answers = {"float32": [answering(flop) for flop in (BREAK_EVEN, None, BREAK_EVEN)]}
    assert measured.table() == {}
    assert "float32" not in json.loads(file.read_text())["break_even_flop"]
    asker.answers = {"float32": [answering(flop) for flop in (BREAK_EVEN, 2 * BREAK_EVEN, BREAK_EVEN)]}
    asker.asked.clear()
    assert next_process() == {"float32": 2 * BREAK_EVEN}, "all pay: from the largest on"
    assert asker.asked == ["float32"]
    assert next_process() == {"float32": 2 * BREAK_EVEN}
    assert asker.asked == ["float32"]


def test_rounds_that_disagree_by_little_are_a_tie(file: Path, asker: Asker) -> None:
    """Asked again in every process, it would change what compiled code is kept for, and gain nothing."""
    asker.answers = {"float32": [Round(1.12, BREAK_EVEN), Round(1.05, None), Round(1.2, BREAK_EVEN)]}
    assert measured.table() == {}
    assert json.loads(file.read_text())["break_even_flop"] == NOTHING


@pytest.mark.parametrize("wrong", [{"float32": None, "bfloat16": BREAK_EVEN}, {"float32": 1 << 40, "bfloat16": None}])
@pytest.mark.parametrize("contradicted", ["float32", "bfloat16"])
def test_an_answer_that_no_longer_holds_is_asked_for_anew(
    contradicted: str, wrong: dict[str, int | None], file: Path, asker: Asker
) -> None:
    """What was found on a busy machine, once the machine is idle; and all others, which were found at the same time."""
    write_verdicts(file, json.dumps(NOTHING | wrong))
    asker.contradicted = {contradicted}
    assert measured.table() == TABLE
    assert asker.runs == 1
    asker.contradicted = set()
    assert next_process() == TABLE
    assert asker.runs == 1


def test_what_does_not_pay_beside_the_plain_product_is_not_looked_at(file: Path, asker: Asker) -> None:
    """A look costs every process some milliseconds."""
    asker.contradicted = {"float32+activation"}
    write_verdicts(file, json.dumps(NOTHING))
    assert measured.table() == {}
    measured.table.cache_clear()
    file.write_text(file.read_text().replace('"float32+activation": null', '"float32+activation": 4000000'))
    assert measured.table() == TABLE


def test_forget(file: Path, asker: Asker) -> None:
    measured.table()
    measured.forget()
    assert not file.exists()
    assert measured.table() == TABLE
    assert asker.runs == 2
    measured.forget()
    measured.forget()


def assert_replaced(file: Path, asker: Asker) -> None:
    assert measured.table() == TABLE
    assert next_process() == TABLE
    assert asker.runs == 1
    assert json.loads(file.read_text())["break_even_flop"] == VERDICTS


@pytest.mark.parametrize(
    "content",
    [b"", b"{", b"{}", b"[]", b"null", b"17", b'"x"', b"\xff\xfe\x00", b"[" * 200_000, b'{"machine":' * 200_000],
    ids=lambda content: content[:12].decode(errors="replace"),
)
def test_a_corrupt_file_is_replaced(content: bytes, file: Path, asker: Asker) -> None:
    file.parent.mkdir(parents=True)
    file.write_bytes(content)
    assert_replaced(file, asker)


DEEP = "[" * 200_000 + "]" * 200_000
NO_VERDICTS = [*("null", "3", "[]", DEEP), '{"float32": "onednn"}', '{"float64": 4000000}', '{"": 4000000}']
NO_FLOP = [*("NaN", "Infinity", "-Infinity", "1e999", "0", "-4000000", "true", "false", "4000000.0", "999999")]
NO_FLOP += ['"4000000"', "[4000000]", "9" * 10_000, DEEP]


@pytest.mark.parametrize(
    "verdicts", [*NO_VERDICTS, *(f'{{"float32": {flop}}}' for flop in NO_FLOP)], ids=lambda text: text[:24]
)
def test_verdicts_that_no_probe_can_have_found_are_replaced(verdicts: str, file: Path, asker: Asker) -> None:
    write_verdicts(file, verdicts)
    assert_replaced(file, asker)


def test_a_file_of_another_machine_is_replaced(file: Path, asker: Asker) -> None:
    """However it came by this name."""
    write_verdicts(file, '{"bfloat16": 4000000}', machine="another")
    assert_replaced(file, asker)


def test_an_unwritable_cache_costs_only_a_probe(file: Path, asker: Asker) -> None:
    file.parent.parent.mkdir(parents=True, exist_ok=True)
    file.parent.write_text("a file stands where the folder should be")
    assert measured.table() == TABLE
    assert next_process() == TABLE
    assert asker.runs == 2


def test_a_directory_in_place_of_the_file(file: Path, asker: Asker) -> None:
    (file / "in the way").mkdir(parents=True)
    assert measured.table() == TABLE


def test_all_that_a_verdict_depends_on_has_its_own_file(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    files = {file}
    others: list[tuple[object, str, object]] = [
        (torch, "get_num_threads", lambda: 77),
        (torch, "__version__", "9.9"),
        (measured, "processor", lambda: "another CPU @ 3 GHz / x"),
        (measured, "instruction_set", lambda: "SIMD77"),
        (onednn, "multiplies", lambda dtype: False),
        (onednn, "multiplies", lambda dtype: dtype in (torch.float16, torch.int8)),
        (compat, "onednn_version", lambda: "7.7"),
        (measured, "_VERSION", 77),
    ]
    for owner, name, value in others:
        with monkeypatch.context() as patch:
            patch.setattr(owner, name, value)
            files.add(measured.cache_file())
    assert len(files) == len(others) + 1
    assert all(path.parent == file.parent for path in files)


def test_processors_of_one_name_have_a_table_each(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """`AMD EPYC` is any of five generations. Their caches meet where a home or an image of a container is shared."""
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    found = {"rich": {"bfloat16": probe.MIN_FLOP}, "poor": {"float32": 8 * probe.MIN_FLOP}}
    probed: list[str] = []
    monkeypatch.setattr(probe, "contradicts", lambda question, break_even: False)
    for kind in ("rich", "poor", "rich", "poor"):

        def ask(question: Question, kind: str = kind) -> list[Round]:
            probed.append(kind)
            return [answering(found[kind].get(question.name))]

        monkeypatch.setattr(compat, "has_fast_cpu_dtype", lambda dtype, kind=kind: kind == "rich")
        monkeypatch.setattr(probe, "ask", ask)
        assert next_process() == found[kind]
        assert chosen(torch.bfloat16, LARGE) == ("onednn" if kind == "rich" else "via_float32")
    assert probed == ["rich"] * len(QUESTIONS) + ["poor"] * len(QUESTIONS)


def test_without_onednn_nothing_is_probed(monkeypatch: pytest.MonkeyPatch, file: Path, asker: Asker) -> None:
    monkeypatch.setattr(compat, "onednn_linear", lambda: None)
    assert measured.table() == {}
    assert chosen(torch.float32, LARGE) == "aten"
    assert asker.runs == 0
    assert not file.exists()
