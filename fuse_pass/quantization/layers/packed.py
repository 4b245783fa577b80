"""Layers that hold their weights in few bits, for inference: what all have in common, and the Linear."""

from __future__ import annotations

from typing import Any, ClassVar, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fuse_pass.inductor import private
from fuse_pass.ops.packed_dense import WEIGHT_ONLY, PackedWeight, packed_dense
from fuse_pass.quantization.packing import TABLES, Packed, PackSpec, packed
from fuse_pass.quantization.saving import warn_if_not_described


class PackedModule(nn.Module):
    """What `pack` puts in the place of a layer, and `unpack` takes away again."""

    def to_float(self) -> nn.Module:
        """The `torch.nn` layer with the real numbers that the codes stand for as its weights."""
        raise NotImplementedError

    @property
    def nbytes(self) -> int:
        """Memory of the packed weights and their scales, without biases."""
        raise NotImplementedError


class PackedParts(PackedModule):
    """A layer made of several packed Linear layers, its children.

    Attributes:
        plain_weights: names under which the `torch.nn` layer would save its weights; such a state dict is refused.
    """

    plain_weights: tuple[str, ...] = ()

    @property
    def nbytes(self) -> int:
        return sum(part.nbytes for part in self.children() if isinstance(part, PackedModule))

    def _load_from_state_dict(
        self, state_dict: dict[str, Any], prefix: str, local_metadata: Any, strict: bool, missing: Any, unexpected: Any,
        errors: list[str],
    ) -> None:  # fmt: skip
        plain = [name for name in self.plain_weights if f"{prefix}{name}" in state_dict]
        if plain:
            errors.append(_plain_weight(f"{prefix}{plain[0]}"))
            return
        super()._load_from_state_dict(state_dict, prefix, local_metadata, strict, missing, unexpected, errors)


def _plain_weight(name: str) -> str:
    return (
        f"{name}: this layer is packed and expects words and scale, got a plain weight; load it into the model before "
        "fuse_pass.pack"
    )


class PackedLayer(PackedModule):
    """What layers with a packed weight have in common.

    The weight is no Parameter. The state dict holds `words` (the packed codes), scales, and `packed_format` (uint8,
    JSON: what the codes stand for); `.to(dtype)` leaves these as they are.

    Args:
        content: what the codes stand for, as bytes.
        words: the packed codes.

    Attributes:
        follow_dtype: names of the buffers that `.to(dtype)` casts all the same.
    """

    follow_dtype: ClassVar[tuple[str, ...]] = ()

    words: Tensor
    scale: Tensor
    packed_format: Tensor
    table: Tensor | None

    def __init__(self, content: bytes, words: Tensor) -> None:
        super().__init__()
        self._content = content
        self.register_buffer("words", words)
        described = torch.frombuffer(bytearray(content), dtype=torch.uint8)
        self.register_buffer("packed_format", described.to(words.device))

    def real_weight(self) -> Tensor:
        """What the codes stand for, in the shape of the weight."""
        raise NotImplementedError

    def finish_loading(self) -> None:
        """For loaders that set buffers one by one, past `load_state_dict`: its check, and what no state dict holds.

        Raises:
            ValueError: codes of another format, or none that were loaded.
        """
        if self.packed_format.is_meta:
            raise ValueError("packed_format: expected the codes of a packed layer, got none")
        problem = self._problem_of(self.packed_format)
        if problem:
            raise ValueError(problem)
        self._fill_table()

    def _described(self, content: bytes) -> object:
        """What the bytes of `packed_format` say, for messages; ValueError where they say nothing."""
        raise NotImplementedError

    def _problem_of(self, packed_format: Tensor) -> str:
        """Why these bytes are not the ones that this layer has; empty if they are."""
        try:
            found = self._described(bytes(packed_format.cpu().tolist()))
            expected = self._described(self._content)
        except ValueError as error:
            return str(error)
        return (
            "" if found == expected else f"packed_format: expected {expected}, got {found}; pack the model by that spec"
        )

    def _register_table(self, name: str) -> None:
        """The values of the codes by their name in `TABLES`; none for an empty name."""
        self._table_name = name
        self.register_buffer("table", None, persistent=False)
        self._fill_table()

    def _fill_table(self) -> None:
        """Also after it lost its memory, as by `to_empty`."""
        if self._table_name:
            values = TABLES[self._table_name]
            self.table = torch.tensor(values, dtype=torch.float32, device="cpu").to(self.words.device)

    @property
    def nbytes(self) -> int:
        held = {**private.buffers_of(self), "packed_format": None, "table": None}
        return sum(buffer.nbytes for buffer in held.values() if buffer is not None)

    def _apply(self, fn: Any, recurse: bool = True) -> Self:
        """`.to()`, `.half()` and their like, except that scales and tables keep their dtype."""
        before = {name: buffer for name, buffer in private.buffers_of(self).items() if name not in self.follow_dtype}
        super()._apply(fn, recurse)
        for name, buffer in before.items():
            now = getattr(self, name)
            if buffer is not None and now.dtype is not buffer.dtype:
                setattr(self, name, buffer.to(now.device))
        return self

    def _save_to_state_dict(self, *args: Any, **kwargs: Any) -> None:
        warn_if_not_described(self)
        super()._save_to_state_dict(*args, **kwargs)

    def _load_from_state_dict(
        self, state_dict: dict[str, Any], prefix: str, local_metadata: Any, strict: bool, missing: Any, unexpected: Any,
        errors: list[str],
    ) -> None:  # fmt: skip
        content = state_dict.get(f"{prefix}packed_format")
        if content is not None:
            problem = self._problem_of(content)
            if problem:
                errors.append(f"{prefix}{problem}")
                return
        elif f"{prefix}weight" in state_dict:
            errors.append(_plain_weight(f"{prefix}weight"))
            return
        super()._load_from_state_dict(state_dict, prefix, local_metadata, strict, missing, unexpected, errors)
        self._fill_table()


class PackedLinearLayer(PackedLayer):
    """What Linear layers with a packed weight have in common.

    Args:
        in_features: size of an input row.
        out_features: size of an output row.
        content: what the codes stand for, as bytes.
        words: the packed codes.
        bias: `[out_features]` or None; the same Parameter.
    """

    def __init__(
        self, in_features: int, out_features: int, content: bytes, words: Tensor, bias: nn.Parameter | None
    ) -> None:
        super().__init__(content, words)
        self.in_features, self.out_features = in_features, out_features
        self.bias = bias

    @torch.no_grad()
    def to_float(self) -> nn.Linear:
        """An `nn.Linear` with the real numbers that the codes stand for as its weight, and the same bias."""
        linear = nn.Linear(self.in_features, self.out_features, bias=False, device="meta")
        linear.weight = nn.Parameter(self.real_weight().to(torch.float32 if self.bias is None else self.bias.dtype))
        linear.bias = self.bias  # type: ignore[assignment]  # may be None
        return linear.train(self.training)

    def _check_input(self, x: Tensor) -> None:
        fits = x.dim() > 0 and x.is_floating_point() and x.shape[-1] == self.in_features
        if fits and x.device == self.words.device:
            return
        like = x.dtype if x.is_floating_point() else torch.float32
        F.linear(x, torch.zeros((), dtype=like, device=self.words.device).expand(self.out_features, self.in_features))
        raise RuntimeError(
            f"{type(self).__name__}: expected a floating-point x [..., {self.in_features}] on {self.words.device}, "
            f"got {x.dtype} {list(x.shape)} on {x.device}"
        )

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}"


class PackedLinear(PackedLinearLayer):
    """`[..., in_features] → [..., out_features]` by a weight of 8, 4, 2 or 1 bits; the formulas are in
    `fuse_pass.ops.packed_dense`.

    The weight is no Parameter: inputs and the bias get gradients (straight-through, so that adapters beside a packed
    model can be trained), the weight has none. `to_float()` gives an `nn.Linear` back.

    The state dict holds `words` (int32, the packed codes), `scale`, for some specs `shift`, `bias`, and
    `packed_format` (uint8, JSON: the spec and its version); `.to(dtype)` leaves all but the bias as they are.

    Args:
        in_features: size of an input row.
        out_features: size of an output row.
        spec: how the weight is packed.
        weight: the packed weight.
        bias: `[out_features]` or None; the same Parameter.
    """

    shift: Tensor | None

    def __init__(
        self, in_features: int, out_features: int, spec: PackSpec, weight: Packed, bias: nn.Parameter | None
    ) -> None:
        super().__init__(in_features, out_features, spec.to_bytes(), weight.words, bias)
        self.spec = spec
        # As the op takes them: Dynamo guards what it reads of a spec one by one, in every call.
        self._settings = (spec.kind, spec.bits, out_features)
        self.register_buffer("scale", weight.scale)
        self.register_buffer("shift", weight.shift)
        self._register_table(spec.table)

    @classmethod
    def of_weight(cls, weight: Tensor, spec: PackSpec, bias: nn.Parameter | None) -> Self:
        """A layer with a floating-point weight `[out_features, in_features]` packed, and the same bias Parameter.

        Raises:
            ValueError: see `packing.packed`.
        """
        out_features, in_features = weight.shape
        return cls(in_features, out_features, spec, packed(weight.detach(), spec), bias)

    @classmethod
    def from_float(cls, linear: nn.Linear, spec: PackSpec) -> Self:
        """A layer with the weight of `linear` packed, and the same bias Parameter.

        Raises:
            ValueError: see `packing.packed`.
        """
        return cls.of_weight(linear.weight, spec, linear.bias).train(linear.training)

    @property
    def is_weight_only(self) -> bool:
        """Whether inputs stay as they are, and are not rounded to integers."""
        return self.spec.kind == WEIGHT_ONLY

    @property
    def bits(self) -> int:
        """Of a packed code."""
        return self.spec.bits

    @property
    def is_integer(self) -> bool:
        """Whether codes stand for integers times a scale, and not for the values of another table."""
        return self.spec.table in ("", "int4")

    def real_weight(self) -> Tensor:
        return PackedWeight(*self._weight()).real(self.in_features)

    def _weight(self) -> tuple[Any, ...]:
        return self.words, self.scale, self.shift, self.table, *self._settings

    def forward(self, x: Tensor) -> Tensor:
        """In the dtype of x, whatever that of the bias is; raises what `nn.Linear` raises for anything else wrong."""
        self._check_input(x)
        return packed_dense(x, self._weight(), self.bias, self.spec.threshold)

    def _described(self, content: bytes) -> object:
        return PackSpec.from_bytes(content)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, {self.spec}"
