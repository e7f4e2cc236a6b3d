"""Counter-based randomness: distribution, independence, addressing, pinned values."""

import math

import numpy as np
import pytest
import torch

from sdxs_lightning.core.seeding import Stream, _words, integers, normal, uniform

POSITIONS = torch.arange(512)
SHAPE = (4, 16, 16)
COUNT = 512 * 4 * 16 * 16


PINNED_NORMAL = [
    [1.6190836429595947, 0.04892745241522789, -0.36211061477661133],
    [-0.7994884252548218, -0.6785198450088501, -0.057163529098033905],
    [-0.645215630531311, 1.3591846227645874, -1.9733439683914185],
]
PINNED_UNIFORM = [0.9978318810462952, 0.9597561359405518, 0.3212173581123352]
PINNED_INTEGERS = [342, 486, 232]


def correlation(a: torch.Tensor, b: torch.Tensor) -> float:
    return float(torch.corrcoef(torch.stack([a.flatten(), b.flatten()]))[0, 1])


def reference_words(seed: int, stream: int, positions: list[int], count: int) -> np.ndarray:
    """The documented construction in numpy's unsigned arithmetic, where torch has only signed."""
    golden = np.uint64(0x9E3779B97F4A7C15)

    def mix(z: np.ndarray) -> np.ndarray:
        z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        mixed: np.ndarray = z ^ (z >> np.uint64(31))
        return mixed

    with np.errstate(over="ignore"):
        key = mix(np.array(seed % 2**64, dtype=np.uint64) + golden)
        key = mix(key + golden * np.uint64(stream + 1))
        samples = mix(np.array([p % 2**64 for p in positions], dtype=np.uint64) * golden + key)
        elements = mix(np.arange(1, count + 1, dtype=np.uint64) * golden)
        return mix(samples[:, None] ^ elements[None, :])


def reference_normal(seed: int, stream: int, positions: list[int], count: int) -> np.ndarray:
    words = reference_words(seed, stream, positions, (count + 1) // 2)
    low, high = (
        (words & np.uint64(0xFFFFFFFF)).astype(np.float64),
        (words >> np.uint64(32)).astype(np.float64),
    )
    radius = np.sqrt(-2 * np.log((high + 1) / 2**32))
    angle = 2 * math.pi * (low / 2**32) - math.pi / 4
    return np.concatenate([radius * np.cos(angle), radius * np.sin(angle)], axis=1)[:, :count]


@pytest.mark.parametrize("seed", [0, 1, -1, 2**63 + 12345])
def test_equals_a_float64_reference(seed: int) -> None:
    positions = [0, 1, 7, 10**12, 2**62]
    tensor = torch.tensor(positions)
    got = normal(seed, Stream.GAN_NOISE, tensor, (2000,)).double().numpy()
    expected = reference_normal(seed, Stream.GAN_NOISE, positions, 2000)
    # u is rounded to float32 before its logarithm: within 3e-8 of 1, that is 2.5e-4 of radius.
    np.testing.assert_allclose(got, expected, rtol=0, atol=3e-4)
    assert np.abs(got - expected).mean() < 1e-6
    words = reference_words(seed, Stream.DROPOUT, positions, 100)
    got_uniform = uniform(seed, Stream.DROPOUT, tensor, (100,)).double().numpy()
    np.testing.assert_array_equal(got_uniform, (words >> np.uint64(40)).astype(np.float64) / 2**24)


def test_pinned_values() -> None:
    # Whoever changes these changes the noise of every run, every pair and every evaluation. The comparison is
    # exact: only correctly rounded operations are used, so all devices and torch versions agree.
    positions = torch.tensor([0, 1, 10**9])
    assert normal(0, Stream.STUDENT_NOISE, positions, (3,)).tolist() == PINNED_NORMAL
    assert uniform(7, Stream.DROPOUT, positions).tolist() == PINNED_UNIFORM
    assert integers(7, Stream.FAKE_TIMESTEP, positions, 0, 1000).tolist() == PINNED_INTEGERS
    assert [int(stream) for stream in Stream][:12] == list(range(12))
    assert Stream.EVALUATION == 11


def test_normal_moments() -> None:
    noise = normal(0, Stream.STUDENT_NOISE, POSITIONS, SHAPE)
    assert noise.shape == (512, *SHAPE)
    assert noise.dtype == torch.float32
    assert noise.isfinite().all()
    error = 1 / math.sqrt(COUNT)
    # Five standard errors: Var(x) = 1, Var(x^2) = 2, Var(x^3) = 15, Var(x^4) = 96.
    for power, mean, variance in ((1, 0, 1), (2, 1, 2), (3, 0, 15), (4, 3, 96)):
        assert noise.double().pow(power).mean().item() == pytest.approx(
            mean, abs=5 * error * math.sqrt(variance)
        )
    for threshold in (0.5, 1.0, 2.0, 3.0):
        expected = math.erfc(threshold / math.sqrt(2))
        share = (noise.abs() > threshold).double().mean().item()
        assert share == pytest.approx(expected, abs=5 * error * math.sqrt(expected))


def test_uniform_moments_and_range() -> None:
    values = uniform(3, Stream.AUGMENTATION, POSITIONS, (1000,)).double()
    assert values.min() >= 0
    assert values.max() < 1
    assert values.mean().item() == pytest.approx(1 / 2, abs=5 / math.sqrt(12 * values.numel()))
    assert values.var().item() == pytest.approx(1 / 12, abs=5 * math.sqrt(1 / 180 / values.numel()))
    assert uniform(3, Stream.AUGMENTATION, POSITIONS).shape == (512,)


def test_integers_are_even_and_reach_both_ends() -> None:
    values = integers(0, Stream.SCORE_TIMESTEP, torch.arange(100_000), 20, 30)
    counts = torch.bincount(values, minlength=30)
    assert values.dtype == torch.int64
    assert counts[:20].sum() == 0
    assert len(counts) == 30
    chi_square = ((counts[20:] - 10_000) ** 2 / 10_000).sum().item()
    assert chi_square < 33.7  # 9 degrees of freedom, one in 10,000


def test_streams_seeds_positions_and_elements_are_independent() -> None:
    noise = normal(0, Stream.STUDENT_NOISE, POSITIONS, SHAPE)
    bound = 5 / math.sqrt(COUNT)
    for other in Stream:
        if other != Stream.STUDENT_NOISE:
            assert abs(correlation(noise, normal(0, other, POSITIONS, SHAPE))) < bound
    for seed in (1, 2, -1, 1 << 40):
        assert abs(correlation(noise, normal(seed, Stream.STUDENT_NOISE, POSITIONS, SHAPE))) < bound
    for shift in (1, 2, 32, 511):
        shifted = normal(0, Stream.STUDENT_NOISE, POSITIONS + shift, SHAPE)
        assert abs(correlation(noise[shift:].clone(), shifted[shift:])) < 5 / math.sqrt(noise[shift:].numel())
        assert torch.equal(noise[shift:], shifted[: 512 - shift])
    flat = noise.reshape(512, -1)
    for lag in (1, 2, 16, 256, 512):
        assert abs(correlation(flat[:, :-lag], flat[:, lag:])) < 1.5 * bound
    # The two halves of Box-Muller share a radius: squares would show a wrong angle.
    assert abs(correlation(flat[:, :512] ** 2, flat[:, 512:] ** 2)) < 1.5 * bound


def test_no_number_repeats_over_positions_and_streams() -> None:
    # Of 2^64 words a repeat among 300,000 would be a fault of the addressing, not chance.
    words = torch.cat(
        [_words(seed, stream, torch.arange(150), 100) for seed in (0, 1) for stream in range(5)]
    )
    assert len(words.unique()) == words.numel()


@pytest.mark.parametrize("cut", [1, 2, 3, 5, 8])
def test_a_split_batch_equals_the_complete_one_to_the_last_bit(cut: int) -> None:
    positions = torch.arange(1000, 1013)
    for shape in ((4, 16, 16), (3, 5, 7), (1,), ()):
        complete = normal(5, Stream.FAKE_NOISE, positions, shape)
        parts = [normal(5, Stream.FAKE_NOISE, part, shape) for part in (positions[:cut], positions[cut:])]
        assert torch.equal(complete, torch.cat(parts))
    complete = uniform(5, Stream.DROPOUT, positions)
    assert torch.equal(complete[cut:], uniform(5, Stream.DROPOUT, positions[cut:]))
    drawn = integers(5, Stream.GAN_TIMESTEP, positions, 0, 1000)
    assert torch.equal(drawn[cut:], integers(5, Stream.GAN_TIMESTEP, positions[cut:], 0, 1000))


def test_the_global_random_state_is_neither_read_nor_moved() -> None:
    with torch.random.fork_rng(devices=[]):
        drawn = []
        for seed in (98, 99):
            torch.manual_seed(seed)
            state = torch.get_rng_state()
            drawn.append(normal(0, Stream.PAIRS, POSITIONS[:4], SHAPE))
            assert torch.equal(state, torch.get_rng_state())
    assert torch.equal(drawn[0], drawn[1])


def test_refusals() -> None:
    with pytest.raises(ValueError, match=r"positions must be \(B,\) int64, got \(2,\) torch.float32"):
        normal(0, Stream.PAIRS, torch.zeros(2), (1,))
    with pytest.raises(ValueError, match=r"positions must be \(B,\) int64, got \(\)"):
        uniform(0, Stream.PAIRS, torch.tensor(3))
    with pytest.raises(ValueError, match="integers needs low < high, .* got low 5 and high 5"):
        integers(0, Stream.PAIRS, POSITIONS, 5, 5)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_the_gpu_draws_the_same_bits() -> None:
    on_cpu = normal(0, Stream.EVALUATION, POSITIONS, SHAPE)
    on_gpu = normal(0, Stream.EVALUATION, POSITIONS.cuda(), SHAPE)
    assert torch.equal(on_cpu, on_gpu.cpu())
