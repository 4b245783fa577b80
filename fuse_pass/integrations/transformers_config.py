"""`FusePassConfig`: what transformers reads and writes of us in config.json."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from typing import Any, Self

from torch import nn

from fuse_pass.integrations.transformers_api import QuantizationConfigMixin, register_quantization_config
from fuse_pass.numerics.formats import Format
from fuse_pass.numerics.spec import QuantSpec, spec_of
from fuse_pass.numerics.spec_as_dict import spec_as_dict, spec_from_dict
from fuse_pass.quantization.convert import LLM_INT8, convert
from fuse_pass.quantization.description import Groups, describe
from fuse_pass.quantization.names import Names
from fuse_pass.quantization.pack import pack
from fuse_pass.quantization.packing import PackSpec

METHOD = "fuse_pass"
# Another number where a config of before would be read wrongly.
VERSION = 1


@register_quantization_config(METHOD)
class FusePassConfig(QuantizationConfigMixin):
    """What `from_pretrained(…, quantization_config=…)` makes of a float model; what config.json says of a saved one.

    `FusePassConfig("int4_weight_only")` gives what `fuse_pass.pack(model, "int4_weight_only")` would, bit for bit, and
    `FusePassConfig(convert="fp8_e4m3")` what `fuse_pass.convert` would: fake quantisation, to train or to study.

    Args:
        pack: a `PackSpec` or its name, as of `fuse_pass.pack`.
        convert: a `QuantSpec`, a format, its name, or "llm_int8", as of `fuse_pass.convert`; instead of `pack`.
        include: name patterns of the layers that are meant, by default all.
        exclude: name patterns of the layers that stay as they are. Without `include` and `exclude` those that
            transformers' own quantizers leave: the output layer, and embeddings that share their weight with it.
            `exclude=()` leaves none.
        layers: what `describe` says of a model that was quantised before; written by `save_pretrained`.
        version: of this config.

    Raises:
        ValueError: both or neither of `pack` and `convert` (and no `layers`), an unknown spec, another version.
        TypeError: a spec that is none.
    """

    def __init__(
        self,
        pack: PackSpec | str | None = None,
        *,
        convert: QuantSpec | Format | str | None = None,
        include: Names | None = None,
        exclude: Names | None = None,
        layers: Groups | None = None,
        version: int = VERSION,
    ) -> None:
        if version != VERSION:
            raise ValueError(
                f"FusePassConfig: expected version {VERSION}, got {version!r}: the model was saved by another release "
                "of fuse_pass; quantise it again"
            )
        given = [
            name for name, value in (("pack", pack), ("convert", convert), ("layers", layers)) if value is not None
        ]
        if len(given) != 1:
            raise ValueError(f"FusePassConfig: expected pack or convert, got {' and '.join(given) or 'neither'}")
        self.quant_method = METHOD
        self.version = version
        self.pack = _pack_spec(pack)
        self.convert = convert if convert is None or convert == LLM_INT8 else spec_of(convert)
        self.include, self.exclude = _listed(include), _listed(exclude)
        self.layers = layers

    @classmethod
    def from_dict(cls, config_dict: Mapping[str, Any], return_unused_kwargs: bool = False, **kwargs: Any) -> Any:
        """The config that `to_dict` wrote.

        Raises:
            ValueError: keys that it does not write, or an unknown spec.
        """
        given = {**config_dict, **kwargs}
        given.pop("quant_method", None)
        unknown = given.keys() - {"pack", "convert", "include", "exclude", "layers", "version"}
        if unknown:
            raise ValueError(f"FusePassConfig: unknown keys {', '.join(sorted(unknown))} in a config of fuse_pass")
        if "version" not in given:
            raise ValueError(f"FusePassConfig: expected version {VERSION}, got a config without a version")
        if isinstance(given.get("pack"), Mapping):
            given["pack"] = _pack_spec_from(given["pack"])
        if isinstance(given.get("convert"), Mapping):
            given["convert"] = spec_from_dict(given["convert"])
        config = cls(**given)
        return (config, {}) if return_unused_kwargs else config

    def to_dict(self) -> dict[str, Any]:
        """For config.json; without what was not given."""
        described: dict[str, Any] = {
            "pack": None if self.pack is None else asdict(self.pack),
            "convert": spec_as_dict(self.convert) if isinstance(self.convert, QuantSpec) else self.convert,
            "include": self.include,
            "exclude": self.exclude,
            "layers": self.layers,
        }
        given = {name: value for name, value in described.items() if value is not None}
        return {"quant_method": self.quant_method, "version": self.version, **given}

    @classmethod
    def of(cls, model: nn.Module) -> Self:
        """What `convert` and `pack` made of a model.

        Raises:
            ValueError: nothing.
        """
        layers = describe(model)
        if not layers:
            raise ValueError(f"FusePassConfig: expected layers of convert or pack, {type(model).__name__} has none")
        return cls(layers=layers)

    def apply_to(self, model: nn.Module, left_out: Names) -> None:
        """Packs or converts a float model in place; all but `left_out` where the config names no layers."""
        exclude = left_out if self.include is None and self.exclude is None else self.exclude
        if self.pack is not None:
            pack(model, self.pack, include=self.include, exclude=exclude, inplace=True)
        else:
            convert(model, self.convert, include=self.include, exclude=exclude, inplace=True)


def _listed(names: Names | None) -> list[str] | None:
    return None if names is None else [names] if isinstance(names, str) else list(names)


def _pack_spec(spec: PackSpec | str | None) -> PackSpec | None:
    if spec is None or isinstance(spec, PackSpec):
        return spec
    if not isinstance(spec, str):
        raise TypeError(f"FusePassConfig: pack: expected a fuse_pass.PackSpec or its name, got {spec!r}")
    try:
        return PackSpec(spec)
    except ValueError as error:
        raise ValueError(f"FusePassConfig: {error}; formats of fake quantisation are given as convert=") from error


def _pack_spec_from(fields: Mapping[str, Any]) -> PackSpec:
    try:
        return PackSpec(**fields)
    except TypeError as error:
        raise ValueError(f"FusePassConfig: pack: {error}") from error
