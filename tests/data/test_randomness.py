import numpy as np
import pytest
import torch

from flowturbo.data.randomness import keyed_generator, keyed_noise


def draw(seed, index, stream=0):
    return tuple(keyed_generator(seed, index, stream).random(4))


def test_every_key_has_its_own_draws():
    keys = [(s, i, k) for s in (0, 1, 2, 2**32, 2**64 - 1) for i in (0, 1, 2, 2**32, 2**63) for k in (0, 1, 2**63)]
    assert len({draw(*key) for key in keys}) == len(keys)
    assert [draw(*key) for key in keys] == [draw(*key) for key in keys]


def test_draws_are_those_of_philox_for_ever():
    """Frozen: samples made with an older version must be found again."""
    reference = np.random.Generator(np.random.Philox(key=[5, 6], counter=[0, 0, 0, 7]))
    assert draw(5, 6, 7) == tuple(reference.random(4))


def test_noise_row_depends_on_its_index_alone():
    rows = keyed_noise(3, [4, 9, 2**40], (2, 3))
    assert rows.shape == (3, 2, 3)
    assert rows.dtype == torch.float32
    for k, index in enumerate((4, 9, 2**40)):
        assert torch.equal(rows[k], keyed_noise(3, [index], (2, 3))[0])
    assert torch.equal(keyed_noise(3, range(4, 10), (2, 3))[5], rows[1])
    assert keyed_noise(3, [], (2, 3)).shape == (0, 2, 3)


def test_noise_is_normal_and_neighbours_are_independent():
    rows = keyed_noise(0, range(2000), (50,)).double()
    assert abs(rows.mean()) < 0.02  # 6 standard errors of 1e5 draws
    assert abs(rows.var() - 1) < 0.03
    assert abs(rows.pow(4).mean() - 3) < 0.2
    assert abs((rows[1:] * rows[:-1]).mean()) < 0.02
    assert abs((rows * keyed_noise(1, range(2000), (50,))).mean()) < 0.02
    assert abs((rows * keyed_noise(0, range(2000), (50,), stream=1)).mean()) < 0.02


@pytest.mark.parametrize("name", ["seed", "index", "stream"])
@pytest.mark.parametrize("value", [-1, 2**64])
def test_keys_outside_64_bits_are_refused(name, value):
    with pytest.raises(ValueError, match=f"^{name} {value} must lie"):
        keyed_generator(**{"seed": 0, "index": 0, "stream": 0, name: value})
