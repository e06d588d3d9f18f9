"""Randomness as a function: noise is a hash of what it is for, not the state of a generator.

`uniform(seed, Purpose.MASK, example, visit, position)` is the same number on one process and on eight, on CPU and GPU,
before and after a resume, and there is nothing to save. The hash is the finaliser of splitmix64 (Steele et al. 2014),
applied to one key after the other.
"""

import zlib
from enum import IntEnum, unique

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

_GOLDEN = 0x9E3779B97F4A7C15
_MULTIPLIERS = (0xBF58476D1CE4E5B9, 0x94D049BB133111EB)
_SHIFTS = (30, 27, 31)
_MASK64 = (1 << 64) - 1
_FEISTEL_ROUNDS = 12  # with 4, as is common for large domains, a permutation of 7 items is visibly uneven
_MOST_TABLED = 5  # half the bits of a domain whose rounds cost no more at once than one by one


@unique
class Purpose(IntEnum):
    """The use of a random number. Two purposes never share noise, so a new use needs a new purpose.

    Values are part of every run's results: a value that changes, changes what old seeds draw.
    """

    TIME = 1
    MASK = 2
    STAGE = 3
    REFILL = 4
    TARGET = 5
    ORDER = 6
    SHUFFLE = 7
    AUGMENT = 8
    SPLIT = 9
    GENERATE = 10
    INIT = 11
    DROPOUT = 12
    VALUE = 13
    CONFIDENCE = 14
    EVALUATE = 15
    BENCHMARK = 16
    REMASK = 17
    PROMPT = 18
    SELF_CONDITION = 19
    LOOPS = 20


Key = int | Int[Tensor, "..."]


def _signed(value: int) -> int:
    """Reads a 64-bit pattern as an int64, as tensors hold it."""
    value &= _MASK64
    return value - (1 << 64) if value >> 63 else value


def _mix_int(x: int) -> int:
    """Applies the finaliser of splitmix64 to a Python int, which does not overflow: equal to `_mix` bit for bit."""
    for shift, multiplier in zip(_SHIFTS, (*_MULTIPLIERS, 1), strict=True):
        x = ((x ^ (x >> shift)) * multiplier) & _MASK64
    return x


def _mix(x: Tensor) -> Tensor:
    """Applies the finaliser of splitmix64 to each entry of `x`, in place."""
    for shift, multiplier in zip(_SHIFTS, (*_MULTIPLIERS, 1), strict=True):
        # `>>` of an int64 copies the sign bit in from the left; the mask makes it the unsigned shift of the algorithm.
        x.bitwise_xor_((x >> shift).bitwise_and_((1 << (64 - shift)) - 1))
        if multiplier != 1:
            x.mul_(_signed(multiplier))  # int64 products wrap around
    return x


def _absorb(state: Key, key: Key) -> Key:
    """Returns the next state of the hash; an int for as long as all keys are ints."""
    if isinstance(state, int) and isinstance(key, int):
        return _mix_int(((state + _GOLDEN) & _MASK64) ^ (key & _MASK64))
    tensor = (_signed(state + _GOLDEN) if isinstance(state, int) else state + _signed(_GOLDEN)) ^ key
    assert isinstance(tensor, Tensor)
    return _mix(tensor)


def integer(seed: int, purpose: Purpose, *keys: int) -> int:
    """Returns a number in [0, 2^63), to seed something that has its own generator."""
    state: Key = 0
    for key in (seed, int(purpose), *keys):
        state = _absorb(state, key)
    assert isinstance(state, int)
    return state >> 1


def generator(seed: int, name: str, device: torch.device | str = "cpu") -> torch.Generator:
    """Makes the generator of the initial values of the parameter `name`: the same whatever else a model has."""
    return torch.Generator(device).manual_seed(integer(seed, Purpose.INIT, zlib.crc32(name.encode())))


def bits(seed: int, purpose: Purpose, *keys: Key) -> Int[Tensor, "..."]:
    """Returns 64 pseudo-random bits, as int64, for each entry of the broadcast `keys`, of which one is a tensor."""
    state: Key = 0
    for key in (seed, int(purpose), *keys):
        state = _absorb(state, key)
    if isinstance(state, int):
        raise TypeError("bits: at least one key must be a tensor; use integer() for a single number")
    return state


def has_float64(device: torch.device) -> bool:
    """True if tensors on `device` can be float64; on a Mac's GPU they cannot."""
    return device.type != "mps"


def widest(device: torch.device) -> torch.dtype:
    """Returns the widest number format of `device`: float64, or fp32."""
    return torch.float64 if has_float64(device) else torch.float32


def wide(x: Tensor) -> Float[Tensor, "..."]:
    """Converts `x` to the widest number format of its device."""
    return x.to(widest(x.device))


def uniform(seed: int, purpose: Purpose, *keys: Key) -> Float[Tensor, "..."]:
    """Returns uniform numbers in [0, 1), in `widest`, for each entry of the broadcast `keys`.

    In fp32 they are those in float64, cut to 24 bits.
    """
    drawn = bits(seed, purpose, *keys)
    # As many bits as the mantissa holds, so that 1 is never reached by rounding.
    count = 53 if has_float64(drawn.device) else 24
    return _upper(drawn, count).to(widest(drawn.device)) * 2.0**-count


def _upper(drawn: Int[Tensor, "..."], count: int) -> Int[Tensor, "..."]:
    return (drawn >> (64 - count)) & ((1 << count) - 1)


def gumbel(seed: int, purpose: Purpose, *keys: Key) -> Float[Tensor, "..."]:
    """Returns standard Gumbel numbers, in `widest`, with all of their tails: cut, they lower a sampler's temperature.

    `-log(-log(u))` needs 53 bits of u near 1, which fp32 has of 1 - u alone: there it is `-log(-log1p(-(1 - u)))`.
    """
    drawn = _upper(bits(seed, purpose, *keys), 53)
    if has_float64(drawn.device):
        return -torch.log(-torch.log(drawn.double() * 2.0**-53 + 2.0**-54))  # u inside (0, 1)
    u, rest = ((each.float() + 0.5) * 2.0**-53 for each in (drawn, (1 << 53) - 1 - drawn))
    return -torch.log(-torch.where(u < 0.5, u.log(), torch.log1p(-rest)))


def may_be_below(limit: Float[Tensor, "..."], seed: int, purpose: Purpose, *keys: Key) -> Bool[Tensor, "..."]:
    """True wherever the exponential number exp(-gumbel(seed, purpose, *keys)) is below `limit`, and seldom elsewhere.

    It takes no logarithm: -ln(u) is at least 1 - u, of which these are the upper 24 bits, as many as fp32 holds.
    """
    rest = bits(seed, purpose, *keys).bitwise_not_().bitwise_right_shift_(40).bitwise_and_((1 << 24) - 1)
    return rest.float() < limit * 2.0**24


def permute(index: Int[Tensor, "..."], size: int, seed: int, purpose: Purpose, *keys: Key) -> Int[Tensor, "..."]:
    """Maps `index` by a keyed random permutation of range(size), without building the permutation.

    A Feistel network on the smallest even number of bits that holds `size`, applied again until the result lies below
    `size` (cycle walking: Black and Rogaway 2002). `keys` are ints or broadcast with `index`.
    """
    half = max(1, ((size - 1).bit_length() + 1) // 2)
    low = (1 << half) - 1

    def rounds(x: Tensor) -> Tensor:
        left, right = x >> half, x & low
        for i in range(_FEISTEL_ROUNDS):
            left, right = right, left ^ (bits(seed, purpose, *keys, i, right) & low)
        return (left << half) | right

    # In a small domain all rounds are run once for all of it, however often it walks.
    is_small = half <= _MOST_TABLED and all(isinstance(key, int) for key in keys)
    table = rounds(torch.arange(4**half, device=index.device)) if is_small else None
    step = rounds if table is None else lambda x: table[x]
    out = step(index)
    while (outside := out >= size).any():
        out = torch.where(outside, step(out), out)
    return out
