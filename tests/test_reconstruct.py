"""prune.reconstruct: next to the best weights under its mask, by least squares, row by row."""
import pytest
import torch

from prune import Pattern, magnitude_mask, reconstruct, tiles


def layer_and_inputs(seed=0, out=12, columns=16, tokens=300):
    """A dense weight, correlated inputs of the dense model, and what the pruned one reads in their place."""
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(out, columns, generator=generator)
    mixing = torch.randn(columns, columns, generator=generator, dtype=torch.float64) / torch.arange(1, columns + 1)
    dense = mixing @ torch.randn(columns, tokens, generator=generator, dtype=torch.float64)
    return weight, dense, dense + 0.3 * torch.randn(dense.shape, generator=generator, dtype=torch.float64)


def least_squares(weight, mask, dense, inputs):
    """Row by row the weights under a mask whose outputs on `inputs` are next to the dense ones: normal equations."""
    found = torch.zeros(weight.shape, dtype=torch.float64)
    for row, keep, aim in zip(found, mask, weight.double() @ dense):
        row[keep] = torch.linalg.lstsq(inputs[keep].T, aim[:, None]).solution[:, 0]
    return found


def output_error(weight, original, dense, inputs):
    return float((original.double() @ dense - weight.double() @ inputs).square().sum())


@pytest.mark.parametrize("pattern, sparsity", [(Pattern(), 0.7), (Pattern(1, 4), 0.5), (Pattern(4, 1), 0.5),
                                               (Pattern(keep=2, group=4), 0.5)])
def test_reconstruction_is_next_to_the_best_under_its_mask(pattern, sparsity):
    """And far better than the mask of least magnitudes with the weights left as they are."""
    for seed in range(3):
        weight, dense, inputs = layer_and_inputs(seed)
        found, mask = reconstruct(weight, inputs @ inputs.T, dense @ inputs.T, sparsity, pattern)
        plain = magnitude_mask(weight, sparsity, pattern)
        assert found.dtype == weight.dtype and torch.equal(found != 0, mask) and int(mask.sum()) == int(plain.sum())
        assert bool((tiles(mask, pattern).sum((1, 3)) % (pattern.rows * pattern.columns) == 0).all())
        if pattern.group:
            assert bool((mask.view(-1, 4).sum(1) == 2).all())
        error, best, magnitude = (output_error(each, weight, dense, inputs) for each in (
            found, least_squares(weight, mask, dense, inputs), weight * plain))
        assert best <= error < 1.2 * best and error < 0.85 * magnitude


def test_reconstruction_of_everything_is_the_regression_on_what_is_read():
    weight, dense, inputs = layer_and_inputs()
    found, mask = reconstruct(weight, dense @ dense.T, dense @ dense.T, 0.0)
    assert bool(mask.all()) and torch.allclose(found, weight, atol=1e-4)
    found, _ = reconstruct(weight, inputs @ inputs.T, dense @ inputs.T, 0.0)
    best = least_squares(weight, torch.ones_like(weight, dtype=torch.bool), dense, inputs)
    assert output_error(found, weight, dense, inputs) < 1.2 * output_error(best, weight, dense, inputs)
    assert output_error(found, weight, dense, inputs) < 0.98 * output_error(weight, weight, dense, inputs)


@pytest.mark.parametrize("size", [0.0, 1e-9])
def test_weights_of_an_input_that_is_hardly_ever_there_do_not_grow(size):
    """Else they would wreck the outputs as soon as training moves that input."""
    weight, dense, inputs = layer_and_inputs()
    dense[3], inputs[3] = size * dense[3], size * inputs[3]
    found, mask = reconstruct(weight, inputs @ inputs.T, dense @ inputs.T, 0.5)
    assert int((~mask).sum()) == weight.numel() // 2 and bool(found.isfinite().all())
    assert float(found[:, 3].abs().max()) <= 1.01 * float(weight[:, 3].abs().max())
