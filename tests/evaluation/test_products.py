import pytest
import torch
from threadpoolctl import threadpool_info, threadpool_limits

from flowturbo.evaluation import products


@pytest.mark.parametrize("add", [products.add_products, products._add_panels])
@pytest.mark.parametrize("dimensions", [1, 7, 600])  # 600: more than one panel
def test_products_are_added_to_the_upper_triangle(add, dimensions):
    rows = torch.randn(50, dimensions, dtype=torch.float64)
    sums = torch.ones(dimensions, dimensions, dtype=torch.float64)
    add(sums, rows[:30])
    add(sums, rows[30:])
    torch.testing.assert_close(sums.triu(), (rows.T @ rows + 1).triu(), rtol=1e-12, atol=1e-12)


def test_the_threads_are_torchs():
    rows, found = torch.randn(500, 769, dtype=torch.float64), []
    for around in (1, 2):
        with threadpool_limits(around, user_api="blas"):
            sums = torch.zeros(769, 769, dtype=torch.float64)
            products.add_products(sums, rows)
            found.append(sums)
            assert {library["num_threads"] for library in threadpool_info() if library["user_api"] == "blas"} == {
                around
            }
    assert torch.equal(*found)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_inner_products_of_all_pairs(dtype):
    x = torch.randn(40, 30).T.to(dtype)  # in column order
    found = products.own_products(x, rest=-5)
    torch.testing.assert_close(found.triu(1), (x @ x.T).triu(1))
    assert (found.tril() == torch.full_like(found, -5).tril()).all()
    torch.testing.assert_close(products.pair_products(x, x[:7]), x @ x[:7].T)


@pytest.mark.parametrize("triangular", [True, False])
def test_congruence(triangular):
    root, matrix = torch.randn(2, 40, 40, dtype=torch.float64)
    root, matrix = root.tril() if triangular else root, matrix + matrix.T
    before = matrix.clone()
    found = products.congruence(root, matrix)
    torch.testing.assert_close(found.triu(), (root.T @ matrix @ root).triu(), rtol=1e-12, atol=1e-12)
    assert torch.equal(matrix, before)
