"""Contenders alternate, and a machine has a description."""

from __future__ import annotations

import os
import threading
import time

import pytest
import torch

from fuse_pass.commands import timing


def test_contenders_take_turns() -> None:
    order: list[str] = []
    samples = timing.alternate({"a": lambda: order.append("a"), "b": lambda: order.append("b")}, budget=0.0)
    assert order[:4] == ["a", "a", "b", "b"], "warm-up"
    assert order[4:8] == ["a", "b", "a", "b"]
    assert len(samples["a"]) == len(samples["b"]) == timing.MIN_ROUNDS == 9
    assert len(timing.alternate({"a": lambda: None}, 0.0, rounds=3)["a"]) == 3
    assert len(timing.alternate({"a": lambda: None}, 0.02)["a"]) > 9, "as many rounds as the time allows"


def test_ratio_is_the_median_over_rounds() -> None:
    assert timing.ratio({"a": [4.0, 6.0, 9.0], "b": [2.0, 2.0, 2.0]}, "a", "b") == 3.0
    assert timing.ratio({"a": [1.0, 10.0, 100.0], "b": [1.0, 10.0, 100.0]}, "a", "b") == 1.0, "speed changes hit both"


def test_threads_and_cores_are_put_back() -> None:
    before = torch.get_num_threads()
    with timing.threads(before + 1):
        assert torch.get_num_threads() == before + 1
    assert torch.get_num_threads() == before


@pytest.mark.skipif(not hasattr(os, "sched_getaffinity"), reason="this system cannot pin a process")
def test_pinned_to_the_first_cores() -> None:
    before = os.sched_getaffinity(0)
    with timing.pinned(1):
        assert os.sched_getaffinity(0) == {min(before)}
    assert os.sched_getaffinity(0) == before


def test_machine_is_described() -> None:
    machine = timing.machine("cpu", 2)
    assert set(machine) == {"cpu", "instructions", "threads", "clock", "torch", "python", "date"}
    text = timing.described(machine)
    assert "2 threads" in text
    for part in (machine["cpu"], machine["instructions"], f"torch {torch.__version__}", machine["date"]):
        assert part in text
    assert "1 thread," in timing.described(machine | {"threads": "1"})


def test_one_thread_is_timed_by_its_cpu_time() -> None:
    with timing.threads(1):
        assert timing.seconds(lambda: time.sleep(0.05)) < 0.02, "a process that waits uses no CPU"
    with timing.threads(2):
        assert timing.seconds(lambda: time.sleep(0.05)) >= 0.05


def test_work_in_other_threads_counts() -> None:
    def spin() -> None:
        end = time.thread_time() + 0.05
        while time.thread_time() < end:
            pass

    def elsewhere() -> None:
        worker = threading.Thread(target=spin)
        worker.start()
        worker.join()

    with timing.threads(1):
        assert timing.seconds(elsewhere) >= 0.05


def test_the_second_call_in_a_row_is_timed() -> None:
    order: list[str] = []
    calls = {"a": lambda: order.append("a"), "b": lambda: order.append("b")}
    samples = timing.alternate(calls, 0.0, rounds=2, again=True)
    assert order[4:] == ["a", "a", "b", "b"] * 2
    assert [len(values) for values in samples.values()] == [2, 2]


def test_the_clock_is_named() -> None:
    assert "1 thread (CPU time)," in timing.described(timing.machine("cpu", 1))
    assert timing.machine("cpu", 2)["clock"] == "wall"
    assert "(wall)" not in timing.described(timing.machine("cpu", 2))
    old = {name: value for name, value in timing.machine("cpu", 1).items() if name != "clock"}
    assert "1 thread, torch" in timing.described(old)
    assert "1 thread (CPU time), busy, torch" in timing.described(timing.machine("cpu", 1) | {"note": "busy"})
