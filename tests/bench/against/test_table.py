"""Which contenders are asked for, and what to install."""

from __future__ import annotations

import tomllib
from pathlib import Path

import pytest

from fuse_pass.bench.against.contender import KINDS, Contender
from fuse_pass.bench.against.table import CONTENDERS, chosen
from fuse_pass.commands.errors import CommandError

ROOT = Path(__file__).parents[3]
HERE = Contender("here", (), "here", {})
ABSENT = Contender("absent", ("json", "no_such_module_here"), "fuse_pass[contenders]", {})


def test_names_once_and_in_order() -> None:
    assert chosen("absent , here,here".replace("absent", "here"), [HERE]) == (HERE,)
    other = Contender("other", (), "other", {})
    assert chosen("other,here", [HERE, other]) == (other, HERE)


def test_an_unknown_name_lists_the_valid_ones() -> None:
    with pytest.raises(CommandError, match=r"expected names among here,absent, separated by commas; got 'x', 'y'"):
        chosen("x,here,y", [HERE, ABSENT])


def test_a_missing_package_says_what_to_install() -> None:
    message = r"--against absent needs no_such_module_here, not installed here: pip install 'fuse_pass\[contenders\]'"
    with pytest.raises(CommandError, match=message):
        chosen("here,absent", [HERE, ABSENT])


def test_every_contender_can_do_something_and_be_installed() -> None:
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]["contenders"]
    packages = {extra.partition(">")[0] for extra in extras}
    for contender in CONTENDERS:
        assert contender.build.keys() <= set(KINDS)
        assert contender.build
        if contender.install == "fuse_pass[contenders]":
            assert set(contender.needs) <= packages
