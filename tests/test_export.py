"""Fused programs: what `fuse_pass.fuse` makes, and what runs where fuse_pass is not installed."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram

import fuse_pass

# As if fuse_pass were not installed, and as if it were.
WITHOUT = "import sys; sys.modules['fuse_pass'] = None\n"
WITH = "import fuse_pass\n"


def elsewhere(code: str, folder: Path, *, with_us: bool = False) -> str:
    """What another process prints that runs there."""
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    if with_us:
        environment["PYTHONPATH"] = str(Path(fuse_pass.__file__).parents[1])
    code = (WITH if with_us else WITHOUT) + "import torch\n" + code
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=False, cwd=folder, env=environment
    )
    return result.stdout + result.stderr


class Block(nn.Module):
    """A pre-norm feed-forward block with what makes exporting hard: keywords, structures, buffers, a tied weight."""

    def __init__(self, p: float = 0.1) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(16, 40), nn.Linear(40, 16)
        self.dropout, self.norm, self.count = nn.Dropout(p), nn.LayerNorm(16), nn.BatchNorm1d(16)
        self.again = nn.Linear(16, 40, bias=False)
        self.again.weight = self.up.weight
        self.register_buffer("offset", torch.ones(16), persistent=False)

    def forward(self, x: Tensor, more: dict[str, Tensor], *, scale: Tensor | None = None) -> dict[str, Any]:
        y = self.norm(x + self.dropout(self.down(F.gelu(self.up(x))))) + more["bias"] + self.offset
        y = self.count(y if scale is None else y * scale)
        return {"y": y, "both": (y.sum(), self.again(y))}


def names_of_ops(program: ExportedProgram) -> set[str]:
    calls = (node.target for node in program.graph.nodes if node.op == "call_function")
    return {str(target).removesuffix(".default") for target in calls if "fuse_pass" in str(target)}


def given(rows: int = 6) -> tuple[tuple[Any, ...], dict[str, Tensor]]:
    return (torch.randn(rows, 16), {"bias": torch.ones(16)}), {"scale": torch.full((16,), 2.0)}


def test_a_program_is_called_like_the_model_and_gives_its_numbers() -> None:
    model = Block().eval()
    args, kwargs = given()
    with torch.no_grad(), fuse_pass.collect() as report:
        program = fuse_pass.fuse(model, args, kwargs)
    assert report.counts() == {"dense_act_dense": 1, "dropout_norm": 1}
    assert names_of_ops(program) == {"fuse_pass.dense_act_dense_inference", "fuse_pass.dropout_norm"}
    fused = program.module()
    torch.testing.assert_close(fused(*args, **kwargs), model(*args, **kwargs))


def test_parameters_and_buffers_keep_their_names() -> None:
    model = Block().train()
    args, kwargs = given()
    program = fuse_pass.fuse(model, args, kwargs)
    stock = torch.export.export(model, args, kwargs)
    assert program.state_dict.keys() == stock.state_dict.keys() == model.state_dict().keys()
    assert program.graph_signature.non_persistent_buffers == stock.graph_signature.non_persistent_buffers == ("offset",)
    assert program.state_dict["up.weight"].data_ptr() == program.state_dict["again.weight"].data_ptr()


def test_dynamic_shapes_by_name() -> None:
    model = Block().eval()
    args, kwargs = given()
    shapes = {"x": {0: Dim("rows", min=2)}, "more": {"bias": None}, "scale": None}
    for dynamic_shapes in (shapes, {**shapes, "x": {0: Dim.AUTO}}, ({0: Dim.DYNAMIC}, {"bias": None}, None)):
        program = fuse_pass.fuse(model, args, kwargs, dynamic_shapes=dynamic_shapes)
        assert "fuse_pass.dropout_norm" in names_of_ops(program)
        others, _ = given(rows=11)
        torch.testing.assert_close(program.module()(*others, **kwargs), model(*others, **kwargs))


def test_patterns_can_be_chosen() -> None:
    args, kwargs = given()
    assert names_of_ops(fuse_pass.fuse(Block(), args, kwargs, patterns=["dropout_norm"])) == {
        "fuse_pass.dropout_norm",
        "fuse_pass.seed",
    }
    with pytest.raises(ValueError, match="unknown pattern 'gelu'"):
        fuse_pass.fuse(Block(), args, kwargs, patterns=["gelu"])


def test_training_draws_in_every_call_and_follows_manual_seed() -> None:
    model = Block(p=0.5).train()
    args, kwargs = given()
    program = fuse_pass.fuse(model, args, kwargs)
    assert "fuse_pass.seed" in names_of_ops(program)
    in_aten = program.run_decompositions(fuse_pass.decompositions())
    assert not names_of_ops(in_aten)

    def masks(program: ExportedProgram) -> list[Tensor]:
        fused = program.module()
        torch.manual_seed(5)
        return [fused(*args, **kwargs)["y"] for _ in range(2)]

    first, second = masks(program)
    assert not torch.allclose(first, second)
    torch.testing.assert_close(masks(program), [first, second], rtol=0, atol=0)
    torch.testing.assert_close(masks(in_aten), [first, second])


def test_a_program_can_be_trained() -> None:
    model = Block(p=0.0).train()
    args, kwargs = given()
    program = fuse_pass.fuse(model, args, kwargs)
    fused = program.module()
    for run in (fused, model):
        run(*args, **kwargs)["both"][1].square().sum().backward()
    expected = {name: parameter.grad for name, parameter in model.named_parameters()}
    found = {name: parameter.grad for name, parameter in fused.named_parameters()}
    torch.testing.assert_close({name: found[name] for name in expected}, expected, rtol=1e-4, atol=1e-5)
    assert int(fused.get_buffer("count.num_batches_tracked")) == 2, "the state is the model's own"


def test_the_fast_path_of_encoders_is_off_while_one_is_traced() -> None:
    layer = nn.TransformerEncoderLayer(16, 2, 40, activation="gelu", batch_first=True)
    model, x = nn.TransformerEncoder(layer, 2).eval(), torch.randn(2, 5, 16)
    with torch.no_grad(), fuse_pass.collect() as report:
        program = fuse_pass.fuse(model, (x,))
    assert report.counts() == {"dense_act_dense": 2, "dropout_norm": 4}
    assert torch.backends.mha.get_fastpath_enabled()
    with torch.no_grad():
        torch.testing.assert_close(program.module()(x), model(x))


class Recurrent(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.lstm, self.head = nn.LSTM(16, 12, batch_first=True), nn.Linear(12, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.lstm(x)[0])


def test_a_quantized_program_has_the_bits_of_a_converted_model() -> None:
    model, x = Recurrent().eval(), torch.randn(2, 4, 16)
    program = fuse_pass.fuse(model, (x,), quantize="fp8_e4m3")
    assert torch.equal(program.module()(x), fuse_pass.convert(model, "fp8_e4m3")(x))
    assert type(model.lstm) is nn.LSTM


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((torch.relu, (torch.ones(2),)), "expected a torch.nn.Module"),
        (
            (nn.Linear(2, 2), torch.ones(2)),
            r"expected a tuple of example arguments, got Tensor; write fuse\(model, \(x,\)\)",
        ),
    ],
)
def test_what_is_no_module_or_no_tuple_is_an_error(arguments: tuple[Any, ...], message: str) -> None:
    with pytest.raises(TypeError, match=message):
        fuse_pass.fuse(*arguments)


def test_what_is_inside_of_a_compiled_model_is_exported() -> None:
    args, kwargs = given()
    with torch.no_grad():
        for compiled in (fuse_pass.compile(Block().eval()), torch.compile(Block().eval())):
            program = fuse_pass.fuse(compiled, args, kwargs)
            assert "fuse_pass.dropout_norm" in names_of_ops(program)
            assert "up.weight" in program.state_dict


# --- other processes --------------------------------------------------------------------------------------------------


def mlp() -> nn.Sequential:
    return nn.Sequential(nn.Linear(64, 96), nn.GELU(), nn.Linear(96, 64), nn.Dropout(0.1), nn.LayerNorm(64))


def bits(model: nn.Sequential) -> nn.Module:
    model[0] = fuse_pass.BitLinear.from_float(model[0], variant="b1.58").pack()
    model[2] = fuse_pass.BitLinear.from_float(model[2])
    return model


def calibrated(model: nn.Module) -> nn.Module:
    spec = fuse_pass.QuantSpec(fuse_pass.Site("int8", scale="static"), "int8")
    converted = fuse_pass.convert(model, spec, include=["0", "2"])
    fuse_pass.calibrate(converted, [torch.randn(8, 64)])
    return fuse_pass.pack(converted)


def with_outliers() -> Tensor:
    x = torch.randn(8, 64)
    x[:, 5] *= 20  # a column of them
    return x


KINDS: dict[str, Callable[[nn.Sequential], nn.Module]] = {
    "fused": lambda model: model,
    "converted to int8": lambda model: fuse_pass.convert(model, "int8"),
    "converted to fp8": lambda model: fuse_pass.convert(model, "fp8_e4m3"),
    "LLM.int8": lambda model: fuse_pass.convert(model, "llm_int8"),
    "BitLinear": bits,
    "packed int8": lambda model: fuse_pass.pack(model, "int8"),
    "packed int8 weights": lambda model: fuse_pass.pack(model, "int8_weight_only"),
    "packed int4 weights": lambda model: fuse_pass.pack(model, "int4_weight_only"),
    "packed LLM.int8": lambda model: fuse_pass.pack(model, "llm_int8"),
    "packed b1.58": lambda model: fuse_pass.pack(model, "b1.58"),
    "packed b1": lambda model: fuse_pass.pack(model, "b1"),
    "calibrated and packed": calibrated,
}
RUN_ALL = """
for file, x, expected in torch.load("cases.pt"):
    y = torch.export.load(file).module()(x)
    torch.testing.assert_close(y, expected, rtol=1e-4, atol=1e-4, msg=lambda text: file + text)
print("all agree; fuse_pass is", sys.modules["fuse_pass"])
"""


def test_programs_of_every_kind_of_model_run_without_fuse_pass(tmp_path: Path) -> None:
    cases = []
    x = with_outliers()
    for i, kind in enumerate(KINDS.values()):
        model = kind(mlp().eval())
        with torch.no_grad():
            program = fuse_pass.fuse(model, (x,), dynamic_shapes=({0: Dim("rows", min=2)},))
            assert names_of_ops(program)
            in_aten = program.run_decompositions(fuse_pass.decompositions())
            assert not names_of_ops(in_aten)
            torch.export.save(in_aten, tmp_path / f"{i}.pt2")
            cases.append((f"{i}.pt2", x, model(x)))
    torch.save(cases, tmp_path / "cases.pt")
    assert "all agree; fuse_pass is None" in elsewhere(RUN_ALL, tmp_path)


def test_a_saved_program_runs_where_fuse_pass_is_and_says_so_where_it_is_not(tmp_path: Path) -> None:
    model, x = mlp().eval(), torch.randn(8, 64)
    with torch.no_grad():
        torch.export.save(fuse_pass.fuse(model, (x,)), tmp_path / "fused.pt2")
        torch.save((x, model(x)), tmp_path / "case.pt")
    load = "program = torch.export.load('fused.pt2')\n"
    code = load + "x, y = torch.load('case.pt')\ntorch.testing.assert_close(program.module()(x), y)\nprint('agrees')"
    assert "agrees" in elsewhere(code, tmp_path, with_us=True)
    assert "failed to resolve torch.ops.fuse_pass." in elsewhere(load, tmp_path)


def test_the_example_runs() -> None:
    root = Path(fuse_pass.__file__).parents[1]
    environment = {**os.environ, "PYTHONPATH": str(root)}
    command = [sys.executable, str(root / "examples" / "export.py")]
    result = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    assert result.returncode == 0, result.stderr
    assert "torch.export, packed to int8: fused" in result.stdout


# --- packages ---------------------------------------------------------------------------------------------------------

RUN_PACKAGE = """
x, expected = torch.load("case.pt")
y = torch._inductor.aoti_load_package("model.pt2")(x)
torch.testing.assert_close(y, expected, rtol=1e-4, atol=1e-4)
print("agrees; fuse_pass is", sys.modules["fuse_pass"])
"""


def assert_packaged(model: nn.Module, x: Tensor, folder: Path, *, in_aten: bool = False) -> None:
    """An AOTInductor package of the fused model gives its numbers where fuse_pass is not installed."""
    with torch.no_grad():
        program = fuse_pass.fuse(model, (x,))
        assert names_of_ops(program)
        if in_aten:
            program = program.run_decompositions(fuse_pass.decompositions())
        torch._inductor.aoti_compile_and_package(program, package_path=str(folder / "model.pt2"))
        torch.save((x, model(x)), folder / "case.pt")
    assert "agrees; fuse_pass is None" in elsewhere(RUN_PACKAGE, folder)


def test_a_package_calls_no_op_of_ours(tmp_path: Path) -> None:
    """One of layers whose products are ours: int8, packed integers, packed numbers, outliers."""
    specs = {0: "int8", 2: "llm_int8", 4: "int4_weight_only"}
    layers = [nn.Linear(64, 64) if i in (*specs, 6) else nn.LayerNorm(64) for i in range(8)]
    model = nn.Sequential(*layers).eval()
    for i, spec in specs.items():
        model[i] = fuse_pass.pack(nn.Sequential(model[i]), spec)[0]
    model[6] = fuse_pass.BitLinear.from_float(model[6]).pack()
    assert_packaged(model, with_outliers(), tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("in_aten", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_packages_of_every_kind_of_model(kind: str, in_aten: bool, tmp_path: Path) -> None:
    assert_packaged(KINDS[kind](mlp().eval()), with_outliers(), tmp_path, in_aten=in_aten)
