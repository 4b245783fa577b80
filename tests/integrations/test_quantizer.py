"""transformers saves converted and packed models, and loads them as they were; nothing of it goes wrong silently."""

from __future__ import annotations

import json
import re
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from fuse_pass import Granularity, PackSpec, QuantSpec, Site, calibrate, convert, pack, unpack

transformers = pytest.importorskip("transformers")

from safetensors.torch import load_file, save_file  # noqa: E402
from transformers import AutoModel, AutoModelForCausalLM, AutoModelForSequenceClassification  # noqa: E402

from fuse_pass.integrations.transformers import FusePassConfig, FusePassQuantizer, attach  # noqa: E402
from fuse_pass.quantization import swapping  # noqa: E402
from fuse_pass.quantization.layers.packed import PackedLinear  # noqa: E402
from tests.integrations.tiny import bert, llama, logits, python, tokens  # noqa: E402

STATIC = QuantSpec(input=Site("int8", scale="static"), weight=Site("int8", granularity=Granularity("channel", axis=0)))
OTHER_SPECS = ("int8", "int8_weight_only", "fp4", "b1", "b1.58")


@pytest.fixture(autouse=True)
def quiet() -> Iterator[None]:
    transformers.utils.logging.disable_progress_bar()
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        yield


def calibrated(model: nn.Module) -> nn.Module:
    return calibrate(convert(model, STATIC, exclude=["*embed*", "lm_head"]), [tokens()])


MODELS: dict[str, Callable[[Any], nn.Module]] = {
    "packed": lambda model: pack(model, "int4_weight_only"),
    "packed by groups": lambda model: pack(model, PackSpec("int4_weight_only", group=32, symmetric=False)),
    "packed, but for embeddings": lambda model: pack(model, "nf4", exclude=["*embed_tokens", "lm_head"]),
    "only the head packed": lambda model: pack(model, "nf4", include="lm_head"),
    "converted": lambda model: convert(model, "fp8_e4m3"),
    "llm_int8": lambda model: convert(model, "llm_int8"),
    "calibrated": calibrated,
    "learned scales": lambda model: calibrate(convert(model, "int8", learn_scales=True), [tokens()]),
    "calibrated and packed": lambda model: pack(calibrated(model)),
    "converted, the rest packed": lambda model: pack(convert(model, "fp16", include="*mlp*"), "llm_int8"),
    **{f"packed to {spec}": lambda model, spec=spec: pack(model, spec) for spec in OTHER_SPECS},
}


@pytest.mark.parametrize("build", MODELS.values(), ids=MODELS.keys())
def test_comes_back_as_it_was(build: Callable[[Any], Any], tmp_path: Path) -> None:
    model = build(llama()).eval()  # whose embeddings are tied
    model.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert torch.equal(logits(again), logits(model))
    assert repr(again) == repr(model)
    assert again.state_dict().keys() == model.state_dict().keys()
    again.save_pretrained(tmp_path / "twice")
    assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(tmp_path / "twice")), logits(model))


def test_in_a_new_process(tmp_path: Path, works_with: Callable[..., None]) -> None:
    """The file holds the codes, and the config says so, with a version."""
    model = pack(bert(), "int4_weight_only")
    model.save_pretrained(tmp_path)
    torch.save(logits(model), tmp_path / "logits.pt")
    python(
        "import torch, fuse_pass.integrations.transformers\n"
        "from transformers import AutoModelForSequenceClassification\n"
        "from tests.integrations.tiny import logits\n"
        f"model = AutoModelForSequenceClassification.from_pretrained({str(tmp_path)!r})\n"
        f"assert torch.equal(logits(model), torch.load({str(tmp_path / 'logits.pt')!r}))"
    )
    described = json.loads((tmp_path / "config.json").read_text())["quantization_config"]
    assert described["quant_method"] == "fuse_pass"
    assert described["version"] == 1
    saved = load_file(tmp_path / "model.safetensors")
    assert saved["bert.encoder.layer.0.intermediate.dense.words"].dtype is torch.int32
    sizes = [sum(value.nbytes for value in state.values()) for state in (saved, bert().state_dict())]
    assert sizes[0] < 0.5 * sizes[1]
    layers = sum(isinstance(module, PackedLinear) for module in model.modules())
    works_with(
        "transformers", "pack → save_pretrained → from_pretrained", f"{layers} layers of 4 bits", "the same bits"
    )


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_types_and_shards(dtype: torch.dtype, tmp_path: Path) -> None:
    llama().save_pretrained(tmp_path / "float")
    model = pack(AutoModelForCausalLM.from_pretrained(tmp_path / "float", dtype=dtype), "int8_weight_only")
    model.save_pretrained(tmp_path, max_shard_size="20KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 2
    again = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert again.dtype is dtype
    assert torch.equal(logits(again), logits(model))


def test_another_head_and_none(tmp_path: Path) -> None:
    """Names have the prefix of the class that was saved."""
    model = pack(bert(), "int8")
    model.save_pretrained(tmp_path / "whole")
    base = AutoModel.from_pretrained(tmp_path / "whole")
    with torch.no_grad():
        assert torch.equal(base(tokens()).pooler_output, model.bert(tokens()).pooler_output)
    base.save_pretrained(tmp_path / "base")
    again = AutoModelForSequenceClassification.from_pretrained(tmp_path / "base")
    assert isinstance(again.bert.pooler.dense, PackedLinear)
    assert type(again.classifier) is nn.Linear  # which nobody packed
    again.classifier = model.classifier
    assert torch.equal(logits(again), logits(model))


def test_a_head_that_alone_was_packed_is_left_behind(tmp_path: Path) -> None:
    pack(llama(), "int8", include="lm_head").save_pretrained(tmp_path)
    base = AutoModel.from_pretrained(tmp_path)
    assert not hasattr(base, "hf_quantizer")
    assert not hasattr(base.config, "quantization_config")


# --- quantised while it is loaded

WISHES: dict[str, tuple[dict[str, Any], Callable[[Any], nn.Module]]] = {
    "packed": ({"pack": "int4_weight_only"}, lambda model: pack(model, "int4_weight_only", exclude=KEPT)),
    "packed whole": ({"pack": "int4_weight_only", "exclude": ()}, lambda model: pack(model, "int4_weight_only")),
    "by a spec": (
        {"pack": PackSpec("int4_weight_only", group=32), "include": "*mlp*"},
        lambda model: pack(model, PackSpec("int4_weight_only", group=32), include="*mlp*"),
    ),
    "the head alone": ({"pack": "nf4", "include": "lm_head"}, lambda model: pack(model, "nf4", include="lm_head")),
    "converted": ({"convert": "fp8_e4m3"}, lambda model: convert(model, "fp8_e4m3", exclude=KEPT)),
    "by a QuantSpec": (
        {"convert": QuantSpec(weight="int8")},
        lambda m: convert(m, QuantSpec(weight="int8"), exclude=KEPT),
    ),
    "llm_int8": ({"convert": "llm_int8"}, lambda model: convert(model, "llm_int8", exclude=KEPT)),
}
KEPT = ["lm_head", "model.embed_tokens"]


@pytest.mark.parametrize(("wish", "expected"), WISHES.values(), ids=WISHES.keys())
def test_quantises_while_it_loads(wish: dict[str, Any], expected: Callable[[Any], nn.Module], tmp_path: Path) -> None:
    model = llama()
    model.save_pretrained(tmp_path / "float")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "float", quantization_config=FusePassConfig(**wish))
    assert torch.equal(logits(loaded), logits(expected(model)))
    assert repr(loaded) == repr(expected(model))
    loaded.save_pretrained(tmp_path / "packed")
    assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(tmp_path / "packed")), logits(loaded))


def test_a_wish_may_stand_in_the_config(tmp_path: Path) -> None:
    llama().save_pretrained(tmp_path)
    path = tmp_path / "config.json"
    wish = {"quantization_config": FusePassConfig("int8", exclude="lm_head").to_dict()}
    path.write_text(json.dumps(json.loads(path.read_text()) | wish))
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert isinstance(loaded.model.layers[0].mlp.up_proj, PackedLinear)


def test_a_wish_for_several_devices_is_refused(tmp_path: Path) -> None:
    quantizer = FusePassQuantizer(FusePassConfig("int8"), pre_quantized=False)
    with pytest.raises(ValueError, match="quantises on one device, got device_map="):
        quantizer.validate_environment(device_map={"model": "cpu", "lm_head": "disk"})


# --- what is saved says what it is


def test_swaps_are_followed(tmp_path: Path) -> None:
    """Layers that were swapped or calibrated since count, and those that went back."""
    model = pack(convert(llama(), "int8", include="*mlp*"), "nf4", include="*self_attn*")
    assert {group["kind"] for group in FusePassConfig.of(model).layers or []} == {"packed", "quantized"}
    calibrate(model, [tokens()])  # after the model was told
    model.save_pretrained(tmp_path)
    assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(tmp_path)), logits(model))
    back = unpack(convert(model, None))
    assert not hasattr(back, "hf_quantizer")
    assert not hasattr(back.config, "quantization_config")
    back.save_pretrained(tmp_path / "float")
    assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(tmp_path / "float")), logits(back))


def test_dequantize_gives_a_float_model(tmp_path: Path) -> None:
    pack(llama(), "int8_weight_only").save_pretrained(tmp_path)
    model = AutoModelForCausalLM.from_pretrained(tmp_path)
    expected = logits(model)
    back = model.dequantize()
    assert type(back.lm_head) is nn.Linear
    torch.testing.assert_close(logits(back), expected, atol=1e-5, rtol=1e-5)
    with pytest.raises(ValueError, match="no way back from the int8 weights"):
        convert(llama(), "llm_int8").dequantize()


@pytest.mark.parametrize("spec", ["int8", "llm_int8", "fp16"])
def test_a_part_that_was_swapped_alone_warns(spec: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nobody told the model: neither of its part, nor of all of it where this module was not imported in time."""
    model = llama()
    swap = convert if spec != "int8" else pack
    model.model.layers[1].mlp = swap(model.model.layers[1].mlp, spec)
    with pytest.warns(UserWarning, match=r"save_pretrained of LlamaForCausalLM writes .* call its attach\(model\)"):
        model.save_pretrained(tmp_path)
    attach(model).save_pretrained(tmp_path)  # warnings are errors here
    assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(tmp_path)), logits(model))
    monkeypatch.setattr(swapping, "LISTENERS", [])
    with pytest.warns(UserWarning, match="save_pretrained of LlamaForCausalLM writes"):
        swap(llama(), spec).save_pretrained(tmp_path)


def test_a_state_dict_alone_does_not_warn(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(swapping, "LISTENERS", [])
    with warnings.catch_warnings(record=True) as warned:
        warnings.simplefilter("always")
        torch.save(pack(llama(), "int8").state_dict(), tmp_path / "state.pt")
    assert not [one for one in warned if "save_pretrained" in str(one.message)]


# --- bad input


def test_attach_refuses_what_it_cannot_describe() -> None:
    with pytest.raises(TypeError, match=r"attach: expected a transformers\.PreTrainedModel, got Linear"):
        attach(nn.Linear(2, 2))
    with pytest.raises(ValueError, match="expected layers of convert or pack, LlamaForCausalLM has none"):
        attach(llama())


REFUSED: dict[str, tuple[Callable[[], Any], str]] = {
    "neither": (lambda: FusePassConfig(), "expected pack or convert, got neither"),
    "both": (lambda: FusePassConfig("int8", convert="int8"), "expected pack or convert, got pack and convert"),
    "a format to pack": (
        lambda: FusePassConfig("fp8_e4m3"),
        "expected one of 'int8'.*formats .* are given as convert=",
    ),
    "an unknown format": (lambda: FusePassConfig(convert="fp9"), "unknown format 'fp9'"),
    "another version": (lambda: FusePassConfig("int8", version=2), "expected version 1, got 2: .* quantise it again"),
    "unknown keys": (
        lambda: FusePassConfig.from_dict({"quant_method": "fuse_pass", "version": 1, "pack": "int8", "bits": 4}),
        "unknown keys bits in a config of fuse_pass",
    ),
    "no version": (lambda: FusePassConfig.from_dict({"pack": "int8"}), "expected version 1, got a config without a"),
    "a field of a spec": (
        lambda: FusePassConfig.from_dict({"version": 1, "pack": {"name": "int8", "bits": 4}}),
        "FusePassConfig: pack: .*'bits'",
    ),
}


@pytest.mark.parametrize(("build", "message"), REFUSED.values(), ids=REFUSED.keys())
def test_a_bad_config_is_refused(build: Callable[[], Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        build()


def test_no_spec_is_refused() -> None:
    with pytest.raises(TypeError, match=r"expected a fuse_pass\.PackSpec or its name, got 8"):
        FusePassConfig(8)


def altered(folder: Path, **changes: Any) -> Path:
    """A saved model whose quantisation config is another."""
    path = folder / "config.json"
    config = json.loads(path.read_text())
    config["quantization_config"] |= changes
    path.write_text(json.dumps(config))
    return folder


def test_a_checkpoint_of_another_version_is_refused(tmp_path: Path) -> None:
    pack(llama(), "int8").save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="expected version 1, got 7"):
        AutoModelForCausalLM.from_pretrained(altered(tmp_path, version=7))


def test_a_checkpoint_of_another_architecture_is_refused(tmp_path: Path) -> None:
    pack(llama(), "int8").save_pretrained(tmp_path)
    layers = [{"kind": "packed", "spec": {"name": "int8"}, "names": ["model.norm"]}]
    with pytest.raises(ValueError, match=r"model\.norm was described as packed.*LlamaRMSNorm has no packed layer"):
        AutoModelForCausalLM.from_pretrained(altered(tmp_path, layers=layers))


def test_codes_of_another_spec_are_refused(tmp_path: Path) -> None:
    pack(llama(), "nf4", exclude="*embed*").save_pretrained(tmp_path)
    layers = json.loads((tmp_path / "config.json").read_text())["quantization_config"]["layers"]
    layers[0]["spec"]["name"] = "fp4"
    with pytest.raises(ValueError, match=r"packed_format: expected .*fp4.*, got .*nf4"):
        AutoModelForCausalLM.from_pretrained(altered(tmp_path, layers=layers))


def test_missing_codes_are_refused(tmp_path: Path) -> None:
    pack(llama(), "int8").save_pretrained(tmp_path)
    path = tmp_path / "model.safetensors"
    state = {key: value for key, value in load_file(path).items() if not key.startswith("lm_head")}
    save_file(state, path, metadata={"format": "pt"})
    with pytest.raises(ValueError, match=r"lm_head\.packed_format: expected"):
        AutoModelForCausalLM.from_pretrained(tmp_path)


@pytest.mark.integration  # two processes, that is 20 seconds
@pytest.mark.parametrize("spec", ["nf4", "llm_int8"])
def test_without_the_import_a_packed_file_is_no_float_model(spec: str, tmp_path: Path) -> None:
    """transformers names the method that it does not know, and raises at the first weight."""
    model = convert(llama(), spec) if spec == "llm_int8" else pack(llama(), spec)
    model.save_pretrained(tmp_path)
    result = python(
        f"from transformers import AutoModelForCausalLM as A; A.from_pretrained({str(tmp_path)!r})", check=False
    )
    assert "Unknown quantization type, got fuse_pass" in result.stderr
    assert re.search(r"RuntimeError: .*ignore_mismatched_sizes", result.stderr), result.stderr


def test_a_model_on_meta_is_not_saved(tmp_path: Path) -> None:
    with torch.device("meta"):
        model = pack(llama(), "int8")
    with pytest.raises(ValueError, match="expected a model with numbers, got one on the meta device"):
        model.save_pretrained(tmp_path)


@pytest.mark.integration
def test_without_transformers_the_import_says_what_to_install() -> None:
    result = python("import sys; sys.modules['transformers'] = None; import fuse_pass.integrations.transformers", False)
    assert "needs transformers 5 or newer: pip install 'fuse_pass[transformers]'" in result.stderr
