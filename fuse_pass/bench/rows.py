"""The rows of `bench` that compare whole calls of a model: operations alone, transformers, reference models."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch

from fuse_pass.bench.models import BertEncoder, DropoutAddNorm, GPT2Decoder, SentenceEncoder, mlp
from fuse_pass.commands import sentence_encoder
from fuse_pass.commands.named_models import Example, example_of, reference_models
from fuse_pass.commands.sentences import SENTENCES

_BATCH = 4
_TIME = 128
_NAMES = {torch.float32: "fp32", torch.bfloat16: "bf16"}


@dataclass(frozen=True)
class Row:
    """One line of the benchmark.

    Attributes:
        name: what is measured, for instance `dropout_norm/2048x768/fp32/train`.
        build: the model with its inputs, on the CPU.
        train: forward and backward, or forward alone under `no_grad`.
        dtype: of parameters and inputs.
        autocast: the dtype of autocast around forward; None for no autocast.
        passes: how often memory as large as the first input must at least be read or written; None where that is
            taken from parameters, inputs and outputs.
        autotune: whether torch.compile with max-autotune takes part in inference; it takes minutes to compile models.
        is_reference: whether it is made of a reference model, which only a checkout has.
        prepack: whether fuse_pass may keep its weights packed, as torch.compile does with freezing.
        needs: modules without which there is no model.
    """

    name: str
    build: Callable[[], Example]
    train: bool
    dtype: torch.dtype = torch.float32
    autocast: torch.dtype | None = None
    passes: int | None = None
    autotune: bool = True
    is_reference: bool = False
    prepack: bool = False
    needs: tuple[str, ...] = ()

    @property
    def product_dtype(self) -> torch.dtype:
        """Of the matrix products."""
        return self.autocast or self.dtype


def _mode(train: bool, prepack: bool = False) -> str:
    return "train" if train else "infer" + "+prepack" * prepack


def _dropout_norm(prefix: str, rows: int, dim: int, dtype: torch.dtype, train: bool) -> Row:
    def build() -> Example:
        x, residual = (torch.randn(rows, dim, dtype=dtype, requires_grad=train) for _ in range(2))
        return Example(DropoutAddNorm(dim, 0.1).to(dtype), (x, residual))

    # Read x and the residual and write y; for training write the sum, and in backward read it with the gradient of y
    # and write those of x and of the residual.
    passes = 8 if train else 3
    return Row(f"{prefix}/{_NAMES[dtype]}/{_mode(train)}", build, train, dtype, passes=passes)


def _dense_act_dense(
    prefix: str, rows: int, dim: int, hidden: int, dtype: torch.dtype, train: bool, *, prepack: bool = False
) -> Row:
    def build() -> Example:
        return Example(mlp(dim, hidden).to(dtype), (torch.randn(rows, dim, dtype=dtype, requires_grad=train),))

    return Row(f"{prefix}/{_NAMES[dtype]}/{_mode(train, prepack)}", build, train, dtype, prepack=prepack)


def bert() -> Example:
    bert = reference_models().load("bert")
    config = dataclasses.replace(bert.BertConfig.base(), layers=4, positions=_TIME + 2)
    return Example(BertEncoder(bert.build(config)), bert.example_inputs(config, _BATCH))


def _gpt2() -> Example:
    gpt2 = reference_models().load("gpt2")
    config = dataclasses.replace(gpt2.GPT2Config.small(), layers=4, positions=_TIME + 2)
    return Example(GPT2Decoder(gpt2.build(config)), gpt2.example_inputs(config, _BATCH))


def _vit(batch: int = _BATCH) -> Example:
    vit = reference_models().load("vit")
    config = dataclasses.replace(vit.ViTConfig.base_16(), layers=4)
    return Example(vit.build(config), vit.example_inputs(config, batch))


def minilm(count: int) -> Callable[[], Example]:
    """all-MiniLM-L6-v2 on so many of the demo's sentences."""

    def build() -> Example:
        model, tokens = sentence_encoder.load(SENTENCES[:count])
        names = ("input_ids", "attention_mask", "token_type_ids")
        return Example(SentenceEncoder(model), tuple(tokens[name] for name in names))

    return build


def _transformer(name: str, build: Callable[[], Example]) -> tuple[Row, ...]:
    return (
        Row(f"{name}/fp32/infer", build, train=False, is_reference=True),
        Row(f"{name}/fp32/train", build, train=True, is_reference=True),
        Row(f"{name}/bf16-autocast/train", build, train=True, autocast=torch.bfloat16, is_reference=True),
    )


def _few_tokens() -> Iterator[Row]:
    """So many layers that every call reads its weights from memory anew."""
    for tokens, (dtype, name), prepack in itertools.product((1, 8, 64), _NAMES.items(), (False, True)):
        if tokens == 1 and prepack:  # a single row is never prepacked
            continue

        def build(tokens: int = tokens, dtype: torch.dtype = dtype) -> Example:
            bert = reference_models().load("bert")
            config = dataclasses.replace(bert.BertConfig.base(), layers=6, positions=tokens + 2)
            return Example(BertEncoder(bert.build(config)).to(dtype), bert.example_inputs(config, 1))

        mode = _mode(train=False, prepack=prepack)
        yield Row(f"few/{tokens}/{name}/{mode}", build, train=False, dtype=dtype, is_reference=True, prepack=prepack)


def _reference(name: str, batch: int, prefix: str) -> tuple[Row, ...]:
    def build() -> Example:
        module = reference_models().load(name)
        return Example(module.build(), module.example_inputs(batch=batch))

    return tuple(
        Row(f"{prefix}/{name}/{_mode(train)}", build, train, autotune=False, is_reference=True)
        for train in (False, True)
    )


def _operations() -> tuple[Row, ...]:
    kinds = [(dtype, train) for dtype in _NAMES for train in (False, True)]
    blocks = [(dtype, *mode) for dtype in _NAMES for mode in ((False, False), (False, True), (True, False))]
    return (
        *(_dropout_norm(f"dropout_norm/{rows}x768", rows, 768, *kind) for rows in (2048, 8192) for kind in kinds),
        *(
            _dense_act_dense(f"dense_act_dense/{rows}x768x3072", rows, 768, 3072, dtype, train, prepack=prepack)
            for rows in (512, 4096)
            for dtype, train, prepack in blocks
        ),
    )


def _tiny() -> tuple[Row, ...]:
    modes = (False, True)
    return (
        *(_dropout_norm("tiny/dropout_norm/1x32", 1, 32, torch.float32, train) for train in modes),
        *(_dense_act_dense("tiny/dense_act_dense/1x32x128", 1, 32, 128, torch.float32, train) for train in modes),
        *_reference("bert", 1, "tiny"),
    )


def _served() -> Iterator[Row]:
    """What is rather left to a runtime for inference: few rows, one image, sentences."""
    for (rows, dtype), prepack in itertools.product(
        ((1, torch.float32), (4, torch.float32), (16, torch.float32), (16, torch.bfloat16)), (False, True)
    ):
        yield _dense_act_dense(f"mlp/{rows}", rows, 768, 3072, dtype, False, prepack=prepack)
    for prepack in (False, True):
        mode = _mode(train=False, prepack=prepack)
        for count in (1, 40):
            yield Row(
                f"minilm/{count}/fp32/{mode}", minilm(count), False, autotune=False, prepack=prepack,
                needs=sentence_encoder.NEEDS,
            )  # fmt: skip
        yield Row(f"vit_1/fp32/{mode}", lambda: _vit(1), False, autotune=False, is_reference=True, prepack=prepack)


# Names of models/, so that the list of rows can be had where that folder is not.
REFERENCE_MODELS = (
    "bert", "classifier", "convnext", "gpt2", "gru_seq2seq", "llama", "lstm_lm", "mlp_mixer", "resnet", "t5", "vit",
    "whisper",
)  # fmt: skip

ROWS: tuple[Row, ...] = (
    *_operations(),
    *_transformer("bert", bert),
    *_transformer("gpt2", _gpt2),
    *_transformer("vit", _vit),
    *_few_tokens(),
    *_served(),
    *_tiny(),
    *(row for name in REFERENCE_MODELS for row in _reference(name, 8, "models")),
)


def rows_of(name: str) -> tuple[Row, ...]:
    """Evaluation and training of the user's own `package.module:function`.

    Raises:
        CommandError: there is no such function, or it does not return a model with its inputs.
    """
    example = example_of(name)
    dtype = next((p.dtype for p in example.model.parameters() if p.is_floating_point()), torch.float32)
    return tuple(Row(f"{name}/{_mode(train)}", lambda: example, train, dtype) for train in (False, True))
