"""Vectors as values in what numba compiles, for loops that its compiler would leave scalar: 8 or 16 numbers at a time.

A vector is read from and written to an address, `array.ctypes.data` plus bytes, which need not be aligned, and nothing checks it.
Any processor can compute them: LLVM divides vectors into as many registers as it takes. On x86, `multiplied_pairs` is one
instruction (pmaddwd) where there is AVX2.

numba keeps compiled loops by the file that they stand in: after a change here, change `winograd_loops`, too, or remove its cache.
"""

from __future__ import annotations

import operator

from llvmlite import ir
from numba import types
from numba.extending import intrinsic, lower_builtin, models, register_model, type_callable

LANE = {"int16": ir.IntType(16), "int32": ir.IntType(32), "float32": ir.FloatType()}


class Vector(types.Type):
    """So many numbers of one type."""

    def __init__(self, lane: str, lanes: int):
        self.lane = lane
        self.ir = ir.VectorType(LANE[lane], lanes)
        super().__init__(f"Vector({lane} x {lanes})")


@register_model(Vector)
class VectorModel(models.PrimitiveModel):
    def __init__(self, manager, kind):
        super().__init__(manager, kind, kind.ir)


HALVES, WORDS, FLOATS = Vector("int16", 16), Vector("int32", 8), Vector("float32", 8)


def _at(builder, address, kind):
    return builder.inttoptr(address, kind.as_pointer())


def _load(builder, address, kind):
    value = builder.load(_at(builder, address, kind))
    value.align = 1
    return value


def _reader(kind: Vector, widened: str | None = None):
    @intrinsic
    def read(typing, address):
        def make(context, builder, signature, arguments):
            if widened is None:
                return _load(builder, arguments[0], kind.ir)
            return getattr(builder, widened)(_load(builder, arguments[0], ir.VectorType(ir.IntType(8), kind.ir.count)), kind.ir)

        return kind(types.intp), make

    return read


halves, words, floats = map(_reader, (HALVES, WORDS, FLOATS))
halves_of_bytes, halves_of_signed_bytes = _reader(HALVES, "zext"), _reader(HALVES, "sext")


@intrinsic
def write(typing, vector, address):
    def make(context, builder, signature, arguments):
        builder.store(arguments[0], _at(builder, arguments[1], vector.ir)).align = 1
        return context.get_dummy_value()

    return types.void(vector, types.intp), make


@intrinsic
def write_pairs(typing, vector, address, step):
    """Two and two int16, so many bytes apart."""

    def make(context, builder, signature, arguments):
        pairs = builder.bitcast(arguments[0], WORDS.ir)
        for lane in range(8):
            address = builder.add(arguments[1], builder.mul(arguments[2], ir.Constant(arguments[2].type, lane)))
            pair = builder.extract_element(pairs, ir.Constant(LANE["int32"], lane))
            builder.store(pair, _at(builder, address, LANE["int32"])).align = 1
        return context.get_dummy_value()

    return types.void(HALVES, types.intp, types.intp), make


def _repeat(builder, number, kind):
    first = builder.insert_element(ir.Constant(kind, ir.Undefined), number, ir.Constant(LANE["int32"], 0))
    return builder.shuffle_vector(first, ir.Constant(kind, ir.Undefined), _lanes([0] * kind.count))


def _lanes(numbers):
    return ir.Constant(ir.VectorType(LANE["int32"], len(numbers)), numbers)


@intrinsic
def repeated_half(typing, number):
    """int16 -> the same in all lanes."""
    return HALVES(types.int16), lambda context, builder, signature, arguments: _repeat(builder, arguments[0], HALVES.ir)


@intrinsic
def repeated_pair(typing, address):
    """The two int16 there, eight times."""

    def make(context, builder, signature, arguments):
        pair = _load(builder, arguments[0], LANE["int32"])
        return builder.bitcast(_repeat(builder, pair, WORDS.ir), HALVES.ir)

    return HALVES(types.intp), make


@intrinsic
def no_words(typing):
    """Zeros."""
    return WORDS(), lambda context, builder, signature, arguments: ir.Constant(WORDS.ir, [0] * 8)


@intrinsic
def multiplied_pairs(typing, a, b):
    """(a0 b0 + a1 b1, a2 b2 + a3 b3, ...): int16 -> int32."""

    def make(context, builder, signature, arguments):
        wide = ir.VectorType(LANE["int32"], 16)
        products, nothing = builder.mul(*(builder.sext(one, wide) for one in arguments)), ir.Constant(wide, ir.Undefined)
        even, odd = (builder.shuffle_vector(products, nothing, _lanes(list(range(s, 16, 2)))) for s in (0, 1))
        return builder.add(even, odd)

    return WORDS(HALVES, HALVES), make


@intrinsic
def as_floats(typing, vector):
    return FLOATS(WORDS), lambda context, builder, signature, arguments: builder.sitofp(arguments[0], FLOATS.ir)


def _operator(function, integers, numbers):
    @type_callable(function)
    def of(context):
        return lambda a, b: a if isinstance(a, Vector) and a == b else None

    for kind, name in ((HALVES, integers), (WORDS, integers), (FLOATS, numbers)):

        @lower_builtin(function, kind, kind)
        def lower(context, builder, signature, arguments, name=name):
            return getattr(builder, name)(*arguments)


_operator(operator.add, "add", "fadd")
_operator(operator.sub, "sub", "fsub")
_operator(operator.mul, "mul", "fmul")
