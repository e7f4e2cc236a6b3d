"""Randomness as a pure function of (seed, stream, position), on any device.

A stateful generator gives different numbers after a resume, or on another number of ranks, unless its state is saved. Here a
number has a key instead: the run's seed, a named stream, the sample's global position (the number of samples that the run
consumed before it) and the element within the sample. So checkpoints need no random state, and a batch split over ranks draws
the numbers of the complete batch.

The 64-bit words come from SplitMix64's mixer (Steele, Lea, Flood, "Fast splittable pseudorandom number generators", OOPSLA
2014; constants of its variant 13) over hashed keys. Only integer operations and the correctly rounded float32 operations
+ - * / sqrt are used, one per torch kernel, so the result is bit-identical on every device and for every batch size; a vector
library's log or cos differs in the last bit between devices, and between a vectorised loop and its tail. (Do not compile these
functions: a compiler may contract a * b + c.) No function synchronises with the device.
"""

import math
from enum import IntEnum

import torch
from torch import Tensor

_MASK64 = (1 << 64) - 1
_GOLDEN = 0x9E3779B97F4A7C15
_MIX_1 = 0xBF58476D1CE4E5B9
_MIX_2 = 0x94D049BB133111EB


class Stream(IntEnum):
    """The purpose of a random number; purposes never share numbers.

    Append only: changing a value changes the runs of all seeds.
    """

    STUDENT_NOISE = 0
    SCORE_NOISE = 1
    SCORE_TIMESTEP = 2
    FAKE_NOISE = 3
    FAKE_TIMESTEP = 4
    GAN_NOISE = 5
    GAN_TIMESTEP = 6
    REAL_NOISE = 7
    REAL_TIMESTEP = 8
    DROPOUT = 9
    PAIRS = 10
    EVALUATION = 11
    TEACHER_NOISE = 12
    TEACHER_TIMESTEP = 13
    VAE_SAMPLE = 14
    AUGMENTATION = 15
    STEP_NOISE = 16
    STEP_INDEX = 17
    REDRAWN_NOISE = 18
    CONDITION_DROPOUT = 19
    REDRAWN_SAMPLES = 20
    READER_NOISE = 21
    READER_NOISE_STRENGTH = 22
    IMAGE_STARTS = 23
    IMAGE_START_STEP = 24
    GUIDANCE_NOISE = 25
    GUIDANCE_TIMESTEP = 26
    GUIDANCE_SCALE = 27
    NEGATIVE_PROMPT = 28
    NEGATIVE_SHARE = 29


def normal(seed: int, stream: int, positions: Tensor, shape: tuple[int, ...]) -> Tensor:
    """Standard normal numbers, one block per position, by the Box-Muller transform.

    Args:
        seed: the run's seed, any int (its lowest 64 bits count).
        stream: what the numbers are used for.
        positions: (B,), int64; their device is the result's.
        shape: shape of one sample's block; another shape draws other numbers.

    Returns:
        (B, *shape), float32; absolute values are at most 6.7, the limit of 32 bits.

    Raises:
        ValueError: unless positions are (B,) int64.
    """
    count = math.prod(shape)
    words = _words(seed, stream, positions, (count + 1) // 2)
    radius = _sqrt_minus_two_log((words >> 32) & 0xFFFFFFFF)
    cosine, sine = _unit_circle(words & 0xFFFFFFFF)
    values = torch.cat([radius * cosine, radius * sine], dim=1)
    return values[:, :count].reshape(len(positions), *shape)


def uniform(seed: int, stream: int, positions: Tensor, shape: tuple[int, ...] = ()) -> Tensor:
    """Uniform numbers in [0, 1), multiples of 2^-24, one block per position.

    Args:
        seed: the run's seed, any int (its lowest 64 bits count).
        stream: what the numbers are used for.
        positions: (B,), int64; their device is the result's.
        shape: shape of one sample's block; a longer block starts with the numbers of a shorter one.

    Returns:
        (B, *shape), float32.

    Raises:
        ValueError: unless positions are (B,) int64.
    """
    words = _words(seed, stream, positions, math.prod(shape))
    return (((words >> 40) & 0xFFFFFF).to(torch.float32) * 2.0**-24).reshape(len(positions), *shape)


def integers(seed: int, stream: int, positions: Tensor, low: int, high: int) -> Tensor:
    """Uniform integers in [low, high), one per position.

    Args:
        seed: the run's seed, any int (its lowest 64 bits count).
        stream: what the numbers are used for.
        positions: (B,), int64; their device is the result's.
        low: smallest result.
        high: one more than the largest result, as in torch.randint; high - low is at most 2^31.

    Returns:
        (B,), int64. The probability of a value is off by at most (high - low) / 2^32: 2e-7 for 1000 timesteps.

    Raises:
        ValueError: for an empty or too wide range, or unless positions are (B,) int64.
    """
    if not 0 < high - low <= 1 << 31:
        raise ValueError(f"integers needs low < high, at most 2^31 apart, got low {low} and high {high}.")
    words = _words(seed, stream, positions, 1).squeeze(1)
    return low + ((((words >> 32) & 0xFFFFFFFF) * (high - low)) >> 32)


def fingerprint_values(values: Tensor) -> Tensor:
    """Hashes each sample's values, for use as a position where only the values are known.

    Args:
        values: (B, ...), float; compared as float32, bit for bit.

    Returns:
        (B,), int64: equal for equal values; collisions have probability 2^-64.
    """
    bits = values.detach().float().contiguous().view(torch.int32).flatten(1).to(torch.int64)
    elements = torch.arange(1, bits.shape[1] + 1, device=bits.device, dtype=torch.int64)
    # Hashed before summation, since a sum of plain bits is invariant to swapped elements. int64 sums wrap around, so their
    # order does not matter.
    return _mix(_mix(bits ^ _mix(elements)[None, :]).sum(dim=1))


def _words(seed: int, stream: int, positions: Tensor, count: int) -> Tensor:
    """`count` 64-bit words per position: (B, count), int64."""
    if positions.ndim != 1 or positions.dtype != torch.int64:
        raise ValueError(f"positions must be (B,) int64, got {tuple(positions.shape)} {positions.dtype}.")
    key = _mix_int(_mix_int((seed + _GOLDEN) & _MASK64) + _GOLDEN * (int(stream) + 1))
    samples = _mix(positions * _signed(_GOLDEN) + _signed(key))
    elements = torch.arange(1, count + 1, device=positions.device, dtype=torch.int64)
    # Elements are hashed before they are combined with the sample's key. With key + element * GOLDEN, as in plain
    # SplitMix64, two samples whose keys are a few GOLDENs apart would be shifted copies of each other.
    return _mix(samples[:, None] ^ _mix(elements * _signed(_GOLDEN))[None, :])


def _mix(words: Tensor) -> Tensor:
    words = (words ^ _shift_right(words, 30)) * _signed(_MIX_1)
    words = (words ^ _shift_right(words, 27)) * _signed(_MIX_2)
    return words ^ _shift_right(words, 31)


def _mix_int(word: int) -> int:
    word &= _MASK64
    word = ((word ^ (word >> 30)) * _MIX_1) & _MASK64
    word = ((word ^ (word >> 27)) * _MIX_2) & _MASK64
    return word ^ (word >> 31)


def _shift_right(words: Tensor, bits: int) -> Tensor:
    """Logical right shift; torch's >> on int64 is arithmetic."""
    return (words >> bits) & ((1 << (64 - bits)) - 1)


def _signed(word: int) -> int:
    word &= _MASK64
    return word - (1 << 64) if word >> 63 else word


def _sqrt_minus_two_log(bits: Tensor) -> Tensor:
    """sqrt(-2 log u) for u = (bits + 1) / 2^32 in (0, 1]; bits int64 in [0, 2^32)."""
    pattern = (bits + 1).to(torch.float32).view(torch.int32)
    # u 2^32 = m 2^e with m in [sqrt(1/2), sqrt(2)): 0x3F3504F3 is the bit pattern of sqrt(1/2).
    e = (pattern - 0x3F3504F3) >> 23
    m = (pattern - (e << 23)).view(torch.float32)
    # log m = 2 artanh s = 2 (s + s^3/3 + s^5/5 + ...), |s| < 0.172: the first term left out is below 1e-9.
    s = (m - 1.0) / (m + 1.0)
    square = s * s
    series = square * (1 / 9) + 1 / 7
    series = series * square + 1 / 5
    series = series * square + 1 / 3
    log_m = (s * square * series + s) * 2.0
    return torch.sqrt(((32 - e).to(torch.float32) * math.log(2.0) - log_m) * 2.0)


def _unit_circle(bits: Tensor) -> tuple[Tensor, Tensor]:
    """(cos, sin) of an angle: the upper two of 32 bits are its quadrant, the rest lies in [-pi/4, pi/4)."""
    quadrant = bits >> 30
    angle = ((bits & 0x3FFFFFFF) - (1 << 29)).to(torch.float32) * (math.pi / 2 * 2.0**-30)
    square = angle * angle
    # Taylor series about 0; on [-pi/4, pi/4] the first terms left out are below 2e-9.
    sine = square * (1 / 362880) - 1 / 5040
    sine = sine * square + 1 / 120
    sine = sine * square - 1 / 6
    sine = sine * square * angle + angle
    cosine = square * (-1 / 3628800) + 1 / 40320
    cosine = cosine * square - 1 / 720
    cosine = cosine * square + 1 / 24
    cosine = cosine * square - 1 / 2
    cosine = cosine * square + 1.0
    odd = (quadrant & 1).bool()
    cosine_sign = (1 - 2 * (((quadrant + 1) >> 1) & 1)).to(torch.float32)
    sine_sign = (1 - 2 * (quadrant >> 1)).to(torch.float32)
    return torch.where(odd, sine, cosine) * cosine_sign, torch.where(odd, cosine, sine) * sine_sign
