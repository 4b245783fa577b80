"""What a contender is asked to do on a row of the bench."""

from __future__ import annotations

from fuse_pass.bench.against.contender import FLOAT, INT4_WEIGHT_ONLY, INT8, INT8_WEIGHT_ONLY, Task
from fuse_pass.bench.packed import PACKED_ROWS, PackedRow
from fuse_pass.bench.rows import ROWS, Row, rows_of
from fuse_pass.commands.errors import CommandError
from fuse_pass.commands.named_models import Example

# Nobody else has weights of 1.58 bits; as ours, int8 rounds the inputs too.
_KINDS = {
    "int8": INT8,
    "b1.58": INT8,
    "int8_weight_only": INT8_WEIGHT_ONLY,
    "int4_weight_only": INT4_WEIGHT_ONLY,
}


def float_task(row: Row, example: Example, threads: int) -> Task:
    """Of a row that is measured without quantisation.

    Raises:
        CommandError: the row is about training, or autocast.
    """
    if row.train:
        raise CommandError("is for inference only")
    if row.autocast is not None:
        raise CommandError("knows no autocast")
    return Task(example, FLOAT, threads)


def packed_task(row: PackedRow, example: Example, threads: int) -> Task:
    """Of a row with packed weights; the example is the float model."""
    return Task(example, _KINDS[row.spec], threads)


def task_of(name: str, threads: int) -> Task:
    """By the name of a row, built anew; one of a user's model too."""
    for packed in PACKED_ROWS:
        if packed.name == name:
            return packed_task(packed, packed.models().plain, threads)
    own = rows_of(name.rpartition("/")[0]) if ":" in name else ()
    row = next(row for row in (*ROWS, *own) if row.name == name)
    built = row.build()
    return float_task(row, Example(built.model.train(row.train), built.args, built.kwargs), threads)
