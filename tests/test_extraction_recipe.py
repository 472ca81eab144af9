"""The recipe's algebra, each step against numpy or what defines it."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from emovec.bank import BankError
from emovec.extraction.recipe import Recipe, contrast, derive, leading, project_out, unit, whiten, within


def stories(seed: int = 0, counts: tuple[int, ...] = (5, 9, 4), width: int = 12) -> tuple[list[Tensor], Tensor, Tensor, Tensor]:
    """Story means of each concept with a huge shared offset, and their sums, counts and scatter."""
    g = torch.Generator().manual_seed(seed)
    offset = torch.zeros(width, dtype=torch.float64)
    offset[3] = 5000.0  # as massive activations are
    rows = [torch.randn(count, width, generator=g, dtype=torch.float64) + offset + k for k, count in enumerate(counts)]
    everything = torch.cat(rows)
    return rows, torch.stack([row.sum(0) for row in rows]), torch.tensor(counts, dtype=torch.float64), everything.T @ everything


def test_the_contrast_is_against_the_mean_of_means() -> None:
    rows, sums, count, _ = stories()
    differences, grand = contrast(sums, count)
    assert torch.allclose(grand, torch.stack([row.mean(0) for row in rows]).mean(0))
    assert float(differences.sum(0).abs().max()) < 1e-9
    repeated = contrast(sums * torch.tensor([[1.0], [7.0], [1.0]]), count * torch.tensor([1, 7, 1]))[0]
    assert torch.allclose(repeated, differences), "a concept with more stories weighs no more"


def test_within_is_the_covariance_about_each_concepts_mean() -> None:
    rows, sums, count, scatter = stories()
    inside = np.concatenate([row.numpy() - row.numpy().mean(0) for row in rows])
    expected = inside.T @ inside / (len(inside) - len(rows))
    assert float((within(scatter, sums, count) - torch.as_tensor(expected)).abs().max()) < 1e-6


@pytest.mark.parametrize(("variance", "count"), [(0.5, 1), (0.6, 1), (0.61, 2), (0.9, 2), (0.91, 3), (1.0, 4)])
def test_leading_components_reach_the_share(variance: float, count: int) -> None:
    turned = torch.linalg.qr(torch.randn(4, 4, dtype=torch.float64))[0]
    covariance = turned @ torch.diag(torch.tensor([6.0, 3.0, 0.6, 0.4], dtype=torch.float64)) @ turned.T
    found = leading(covariance, variance)
    assert torch.allclose(found @ found.T, torch.eye(count, dtype=torch.float64), atol=1e-12)
    assert torch.allclose(found.abs(), turned.T[:count].abs(), atol=1e-10)


def test_what_is_projected_out_is_gone() -> None:
    components = torch.linalg.qr(torch.randn(8, 3, dtype=torch.float64))[0].T
    rows = torch.randn(5, 8, dtype=torch.float64)
    left = project_out(rows, components)
    assert float((left @ components.T).abs().max()) < 1e-12
    assert torch.allclose(project_out(left, components), left)


def test_whitened_readers() -> None:
    _, sums, count, scatter = stories()
    rows = contrast(sums, count)[0]
    directions, covariance = unit(rows)[0], within(scatter, sums, count)
    readers = whiten(rows, directions, covariance, 0.1)
    assert torch.allclose((readers * directions).sum(1), torch.ones(3, dtype=torch.float64))
    expected = rows @ torch.linalg.inv(0.9 * covariance + 0.1 * torch.diag(covariance.diagonal()))
    assert torch.allclose(readers / readers.norm(dim=1, keepdim=True), expected / expected.norm(dim=1, keepdim=True))


def test_whitened_readers_do_not_depend_on_the_scale_of_a_dimension() -> None:
    """A dimension in other units is read in other units, and all scores stay."""
    rows, sums, count, scatter = stories()
    scale = torch.ones(12, dtype=torch.float64)
    scale[5] = 100.0
    scores = []
    for units in (torch.ones_like(scale), scale):
        found = contrast(sums * units, count)[0]
        readers = whiten(found, unit(found)[0], within(scatter * units[:, None] * units, sums * units, count), 0.5)
        scores.append((rows[0] * units) @ (readers / (readers * found).sum(1, keepdim=True)).T)
    assert torch.allclose(scores[0], scores[1])


def test_readers_are_scaled_to_the_denoised_directions() -> None:
    _, sums, count, scatter = stories()
    neutral = torch.eye(12, dtype=torch.float64)
    neutral[3, 3] = 20.0  # the leading component
    derived = derive(Recipe(shrinkage=0.2), sums, count, scatter, neutral, torch.zeros(12))
    assert derived.components == 1
    assert derived.readers is not None
    assert float(derived.directions[:, 3].abs().max()) < 1e-12
    assert torch.allclose((derived.readers * derived.directions).sum(1), torch.ones(3, dtype=torch.float64))


def test_whitening_reads_with_less_spread() -> None:
    """Of all readers with <r, v> = 1, the whitened one varies least within a concept."""
    _, sums, count, scatter = stories(counts=(40, 40, 40))
    covariance = within(scatter, sums, count)
    rows = contrast(sums, count)[0]
    directions = unit(rows)[0]
    readers = whiten(rows, directions, covariance, 1e-6)
    spread, plain = ((which @ covariance * which).sum(1) for which in (readers, directions))
    assert bool((spread < plain).all())


def test_levelled_readers() -> None:
    """They do not see what all stories have in common as against ordinary text, and of such readers they vary least."""
    _, sums, count, scatter = stories(counts=(40, 40, 40))
    ordinary = torch.randn(12, dtype=torch.float64)
    common = contrast(sums, count)[1] - ordinary
    plain, level = (derive(Recipe(denoise=None, level=level), sums, count, scatter, ordinary=ordinary) for level in (False, True))
    assert plain.readers is not None
    assert level.readers is not None
    assert float((plain.readers @ common).abs().min()) > 1e-3
    assert float((level.readers @ common).abs().max()) < 1e-12
    assert torch.allclose((level.readers * level.directions).sum(1), torch.ones(3, dtype=torch.float64))
    shrunk = torch.lerp(within(scatter, sums, count), within(scatter, sums, count).diagonal().diag(), 0.5)
    unbounded = shrunk + 1e9 * torch.outer(common, common)
    limit = torch.linalg.solve(unbounded, contrast(sums, count)[0].T).T
    assert torch.allclose(level.readers, limit / (limit * level.directions).sum(1, keepdim=True), atol=1e-6)


def test_levelled_readers_of_stories_that_are_as_ordinary_text() -> None:
    _, sums, count, scatter = stories()
    plain, level = (
        derive(Recipe(denoise=None, level=level), sums, count, scatter, ordinary=contrast(sums, count)[1]).readers
        for level in (False, True)
    )
    assert plain is not None
    assert level is not None
    assert torch.equal(plain, level)


def test_a_reader_of_which_nothing_is_left() -> None:
    """Concepts that differ only in how far they are from ordinary text."""
    steps = torch.tensor([1.0, 2.0, 4.0], dtype=torch.float64)[:, None] * torch.eye(12, dtype=torch.float64)[2]
    scatter = steps.T @ steps + torch.eye(12, dtype=torch.float64)
    with pytest.raises(BankError, match="nothing is left of a reader"):
        derive(Recipe(denoise=None), steps * 2, torch.full((3,), 2.0), scatter * 2, ordinary=torch.zeros(12))


def test_sums_that_are_not_finite() -> None:
    _, sums, count, scatter = stories()
    sums[1, 2] = torch.nan
    with pytest.raises(BankError, match="activations are not finite"):
        derive(Recipe(denoise=None), sums, count, scatter)


def test_a_direction_of_which_nothing_is_left() -> None:
    _, sums, count, scatter = stories()
    with pytest.raises(BankError, match="nothing is left of a direction after 12 of 12 neutral components"):
        derive(Recipe(variance=1.0), sums, count, scatter, torch.eye(12, dtype=torch.float64))
    with pytest.raises(BankError, match="nothing is left of a direction after 0 of 12"):
        derive(Recipe(denoise=None), torch.ones(3, 12, dtype=torch.float64), torch.ones(3), scatter)
