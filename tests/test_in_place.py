"""`fuse_pass.compile(model, inplace=True)`: the model stays what it is, and every way of calling it is compiled."""

from __future__ import annotations

import copy
import inspect
import io
import pickle
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fuse_pass

X = torch.linspace(-2, 2, 96).view(6, 16)


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.down, self.norm = nn.Linear(16, 40), nn.Linear(40, 16), nn.LayerNorm(16)

    def forward(self, x: Tensor, *, scale: float = 1.0) -> Tensor:
        """Says what it does."""
        return self.norm(x + self.down(nn.functional.gelu(self.up(x)))) * scale


class Recurrent(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attention, self.lstm = nn.MultiheadAttention(16, 2, batch_first=True), nn.LSTM(16, 16, batch_first=True)
        self.head = nn.Linear(16, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = x.unsqueeze(0)
        return self.head(self.lstm(x + self.attention(x, x, x)[0])[0])


CALLS: dict[str, Callable[[nn.Module, Tensor], Tensor]] = {
    "model(x)": lambda model, x: model(x),
    "model.forward(x)": lambda model, x: model.forward(x),
}
every_call = pytest.mark.parametrize("call", CALLS.values(), ids=CALLS)


@every_call
def test_both_ways_of_calling_are_compiled(call: Callable[[nn.Module, Tensor], Tensor]) -> None:
    model, expected = Block(), None
    expected = call(model, X)
    assert fuse_pass.compile(model, inplace=True) is model
    with fuse_pass.collect() as report:
        y = call(model, X)
    assert report.counts() == {"dense_act_dense": 1, "dropout_norm": 1}
    torch.testing.assert_close(y, expected)
    y.sum().backward()
    assert model.up.weight.grad is not None


def test_the_model_stays_what_it_is() -> None:
    model = Block()
    keys, signature, doc = list(model.state_dict()), inspect.signature(model.forward), model.forward.__doc__
    modules, parameters = list(model.modules()), list(model.parameters())
    fuse_pass.compile(model, inplace=True)
    assert type(model) is Block
    assert list(model.state_dict()) == keys
    assert inspect.signature(model.forward) == signature
    assert (model.forward.__doc__, model.forward.__name__) == (doc, "forward")
    assert all(a is b for a, b in zip(model.modules(), modules, strict=True))
    assert all(a is b for a, b in zip(model.parameters(), parameters, strict=True))
    assert "_orig_mod" not in repr(model)


def test_hooks_and_modes_are_those_of_the_model() -> None:
    model, seen = nn.Sequential(nn.Linear(16, 16), nn.Dropout(0.5)), []
    fuse_pass.compile(model, inplace=True)
    model.register_forward_hook(lambda *_: seen.append("hook"))
    model.eval()
    torch.testing.assert_close(model(X), model[0](X))
    assert seen == ["hook"]
    model.train()
    assert not torch.equal(model(X), model(X))


def test_the_fast_path_is_off_while_it_runs_and_only_then() -> None:
    layer = nn.TransformerEncoderLayer(16, 2, 40, dropout=0.0, activation="gelu", batch_first=True)
    model, x = nn.TransformerEncoder(layer, 2).eval(), torch.randn(2, 5, 16)
    with torch.no_grad(), fuse_pass.collect() as report:
        expected = model(x)
        torch.testing.assert_close(fuse_pass.compile(model, inplace=True)(x), expected)
    assert report.counts() == {"dense_act_dense": 2, "dropout_norm": 4}
    assert torch.backends.mha.get_fastpath_enabled()


# --- quantize ---------------------------------------------------------------------------------------------------------


@every_call
def test_quantized_in_place_gives_the_bits_of_a_converted_model(call: Callable[[nn.Module, Tensor], Tensor]) -> None:
    model = Recurrent()
    x = X[:2]
    keys, expected = list(model.state_dict()), fuse_pass.convert(model, "fp8_e4m3")(x)
    with torch.no_grad():
        fuse_pass.compile(model, quantize="fp8_e4m3", inplace=True)
        torch.testing.assert_close(call(model, x), expected, rtol=1e-6, atol=1e-6)
    assert type(model) is Recurrent
    assert list(model.state_dict()) == keys
    assert type(model.lstm) is fuse_pass.nn.QuantizedLSTM, "what is one call in a graph is converted in the model"


@every_call
def test_a_call_that_would_compute_in_float_raises(call: Callable[[nn.Module, Tensor], Tensor]) -> None:
    model = fuse_pass.compile(Block(), quantize="fp8_e4m3", inplace=True)
    with torch.compiler.set_stance("force_eager"), pytest.raises(RuntimeError, match="unquantised"):
        call(model, X)
    assert torch.equal(torch.compiler.disable(call)(model, X), call(model, X)), "as compiled as by itself"
    with pytest.raises(RuntimeError, match="unquantised"):
        torch.export.export(model, (X,))


def test_an_outer_compiler_does_not_look_inside_of_a_quantized_model() -> None:
    model = fuse_pass.compile(Block(), quantize="fp8_e4m3", inplace=True)
    expected = model(X)
    torch.testing.assert_close(torch.compile(nn.Sequential(model), backend="eager")(X), expected)


def test_switched_off_compilation_is_an_error_before_anything_is_converted() -> None:
    model = Recurrent()
    with pytest.raises(RuntimeError, match="switched off"):
        fuse_pass.compile(model, quantize="fp8_e4m3", inplace=True, disable=True)
    assert type(model.lstm) is nn.LSTM
    assert "forward" not in vars(model)
    assert fuse_pass.compile(model, inplace=True, disable=True) is model


def test_a_model_that_is_one_opaque_call_cannot_change_its_class() -> None:
    with pytest.raises(ValueError, match=r"LSTM itself.*without inplace=True"):
        fuse_pass.compile(nn.LSTM(4, 4), quantize="int8", inplace=True)


# --- copies -----------------------------------------------------------------------------------------------------------


def test_a_copy_is_compiled_as_well_and_has_weights_of_its_own() -> None:
    model = fuse_pass.compile(Block(), inplace=True)
    before = model(X)
    twin = copy.deepcopy(copy.deepcopy(model))
    with torch.no_grad():
        twin.norm.bias += 1.0
    with fuse_pass.collect() as report:
        for call in CALLS.values():
            torch.testing.assert_close(call(twin, X), before + 1)
    assert report.counts()["dropout_norm"] <= 1
    torch.testing.assert_close(model(X), before)


def test_a_quantized_copy_stays_quantized() -> None:
    model = fuse_pass.compile(Block(), quantize="fp8_e4m3", inplace=True)
    twin = copy.deepcopy(model)
    assert torch.equal(twin(X), model(X))
    with torch.compiler.set_stance("force_eager"), pytest.raises(RuntimeError, match="unquantised"):
        twin(X)


def test_pickled_it_is_an_ordinary_model(tmp_path: Path) -> None:
    """As with `nn.Module.compile`; the file needs no fuse_pass."""
    model = fuse_pass.compile(nn.Sequential(nn.Linear(16, 16), nn.GELU()), inplace=True)
    expected = model(X)
    torch.save(model, tmp_path / "model.pt")
    again = torch.load(tmp_path / "model.pt", weights_only=False)
    torch.testing.assert_close(again(X), expected)
    torch.testing.assert_close(pickle.loads(pickle.dumps(again)).forward(X), expected)
    code = (
        "import sys; sys.modules['fuse_pass'] = None; import torch\n"
        "model = torch.load('model.pt', weights_only=False); print(model(torch.ones(2, 16)).shape)"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=tmp_path)
    assert "[2, 16]" in result.stdout


def test_a_quantized_model_is_not_pickled_into_a_float_one() -> None:
    model = fuse_pass.compile(Block(), quantize="fp8_e4m3", inplace=True)
    with pytest.raises(TypeError, match=r"fp8_e4m3.*state_dict\(\)"):
        torch.save(model, io.BytesIO())


# --- twice ------------------------------------------------------------------------------------------------------------


def test_the_last_call_holds() -> None:
    model = fuse_pass.compile(Block(), inplace=True, patterns=["dense_act_dense"])
    fuse_pass.compile(model, inplace=True, patterns=["dropout_norm"])
    with fuse_pass.collect() as report:
        model(X)
    assert report.counts() == {"dropout_norm": 1}


def test_another_format_is_refused() -> None:
    model = fuse_pass.compile(Block(), inplace=True, quantize="fp8_e4m3")
    fuse_pass.compile(model, inplace=True, quantize="fp8_e4m3", memory="smallest")
    for other in (None, "int8"):
        with pytest.raises(ValueError, match=r"is compiled in place with quantize=.*fp8_e4m3"):
            fuse_pass.compile(model, inplace=True, quantize=other)


def test_others_look_at_the_model_inside() -> None:
    model = fuse_pass.compile(Block(), inplace=True)
    expected = model(X)
    assert fuse_pass.coverage(model, X).counts() == {"dense_act_dense": 1, "dropout_norm": 1}
    assert "fuse_pass" in str(fuse_pass.fuse(model, (X,)).graph)
    torch.testing.assert_close(torch.export.export(model, (X,)).module()(X), expected)
    torch.testing.assert_close(torch.compile(nn.Sequential(model), backend="eager", fullgraph=True)(X), expected)
    torch.testing.assert_close(fuse_pass.compile(model)(X), expected)
    assert model(X) is not None


@pytest.mark.parametrize("what", [torch.relu, torch.compile(nn.Linear(2, 2))])
def test_only_modules_have_a_place(what: Any) -> None:
    with pytest.raises(TypeError, match=r"inplace=True: expected a torch.nn.Module"):
        fuse_pass.compile(what, inplace=True)


@pytest.mark.slow
def test_type_checkers_know_what_comes_back(tmp_path: Path) -> None:
    script = tmp_path / "snippet.py"
    script.write_text(
        "import fuse_pass\n"
        "from torch import nn\n"
        "def double(x: int, y: str = '') -> float: return 2.0 * x\n"
        "@fuse_pass.compile(strict=True)\n"
        "def half(x: int) -> float: return x / 2\n"
        "reveal_type(fuse_pass.compile(nn.Linear(2, 2), inplace=True))\n"
        "reveal_type(fuse_pass.compile(nn.Sequential()))\n"
        "reveal_type(fuse_pass.compile(double, fullgraph=True))\n"
        "reveal_type(half)\n"
    )
    mypy = pytest.importorskip("mypy.api")
    out, _, _ = mypy.run([str(script), "--no-error-summary", "--follow-imports=silent", f"--cache-dir={tmp_path}"])
    revealed = [line.partition('"')[2].rstrip('"') for line in out.splitlines() if "Revealed" in line]
    assert revealed == [
        "torch.nn.modules.linear.Linear",
        "torch.nn.modules.container.Sequential",
        "def (x: int, y: str =) -> float",
        "def (x: int) -> float",
    ], out
