"""What we ask of Dynamo and Inductor: each name still means what we take it for."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch._inductor.config as inductor_config

from fuse_pass.inductor import compat, compiler, private


@pytest.mark.parametrize(
    "name", ["max_autotune", "fallback_random", "triton.cudagraphs", "cpp.threads", "max-autotune"]
)
def test_options_of_inductor_are_known(name: str) -> None:
    assert compiler.is_inductor_option(name)


@pytest.mark.parametrize("name", ["patterns", "strict", "max_autotunes", "", "cpp"])
def test_other_options_are_not(name: str) -> None:
    assert not compiler.is_inductor_option(name)


def test_options_are_those_that_inductor_takes() -> None:
    for name in torch._inductor.list_options():
        assert compiler.is_inductor_option(name)


@pytest.mark.parametrize("name", ["fallback_random", "align_random_eager", "fallback-random"])
def test_stock_random_numbers_by_option(name: str) -> None:
    assert compiler.draws_stock_random_numbers({name: True})
    assert not compiler.draws_stock_random_numbers({name: False})


def test_stock_random_numbers_by_configuration() -> None:
    assert not compiler.draws_stock_random_numbers({})
    with inductor_config.patch(fallback_random=True):
        assert compiler.draws_stock_random_numbers({})
        assert compiler.draws_stock_random_numbers({"max_autotune": True})
        assert not compiler.draws_stock_random_numbers({"fallback_random": False})


def first(graph: Any) -> None:
    """A pass."""


def second(graph: Any) -> None:
    """Another."""


@pytest.mark.parametrize(
    ("given", "expected"),
    [(None, ()), (first, (first,)), ([first, second], (first, second)), ((second,), (second,)), ([], ())],
)
def test_joint_passes(given: Any, expected: tuple[Any, ...]) -> None:
    assert compiler.joint_passes({"joint_custom_post_pass": given}) == expected
    assert compiler.joint_passes({"joint-custom-post-pass": given}) == expected
    with inductor_config.patch(joint_custom_post_pass=given):
        assert compiler.joint_passes({}) == expected
        assert compiler.joint_passes({"joint_custom_post_pass": second}) == (second,)
    assert compiler.joint_passes({}) == ()


def test_compiler_takes_options_and_patches() -> None:
    inductor = compiler.inductor_compiler(None, {"max_autotune": False})
    assert inductor.config["max_autotune"] is False
    marker = object()
    inductor.config["joint_custom_post_pass"] = marker
    assert inductor.config["joint_custom_post_pass"] is marker
    assert compiler.inductor_compiler("max-autotune-no-cudagraphs", None).config["max_autotune"] is True
    with pytest.raises(RuntimeError):
        compiler.inductor_compiler(None, {"no_such_option": 1})


def test_a_limit_that_the_user_has_chosen_stays() -> None:
    name = "realize_opcount_threshold"
    assert compiler.room_for_masks({}) == {name: 60}
    assert compiler.room_for_masks({name: 100}) == {}
    with inductor_config.patch({name: 45}):
        assert compiler.room_for_masks({}) == {}


def test_settings_for_a_gpu_are_settings_of_inductor() -> None:
    """With them, and where nothing is compiled, quotients are exact."""
    settings, found = {**compiler.room_for_masks({}), **compiler.EXACT_QUOTIENTS}, []
    assert all(map(compiler.is_inductor_option, settings))

    def recorded(x: torch.Tensor) -> torch.Tensor:
        found.append(compat.rounds_quotients())
        return x + 1

    private.make_fx(recorded)(torch.ones(1))
    with inductor_config.patch(settings):
        private.make_fx(recorded)(torch.ones(1))
    assert [*found, compat.rounds_quotients()] == [False, True, True]
