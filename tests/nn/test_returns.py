import pytest
import torch

from worldloom.nn.returns import lambda_return

F64 = torch.float64
N, L, DISC = 3, 6, 0.9


def given(seed=0):
    rng = torch.Generator().manual_seed(seed)
    reward, boot = torch.randn(2, N, L, dtype=F64, generator=rng).unbind()
    return torch.zeros(N, L, dtype=F64), torch.zeros(N, L, dtype=F64), reward, boot


def test_lambda_one_is_the_discounted_sum_and_the_last_bootstrap():
    last, term, reward, boot = given()
    result = lambda_return(last, term, reward, boot, DISC, 1.0)
    for t in range(L - 1):
        steps = range(t + 1, L)
        expected = sum(DISC ** (k - t - 1) * reward[:, k] for k in steps)
        expected = expected + DISC ** (L - 1 - t) * boot[:, -1]
        torch.testing.assert_close(result[:, t], expected)


def test_lambda_zero_is_one_step():
    last, term, reward, boot = given()
    result = lambda_return(last, term, reward, boot, DISC, 0.0)
    torch.testing.assert_close(result, reward[:, 1:] + DISC * boot[:, 1:])


@pytest.mark.parametrize("lam", [0.0, 0.3, 0.95, 1.0])
def test_any_lambda_is_the_weighted_sum_of_n_step_returns(lam):
    last, term, reward, boot = given()
    result = lambda_return(last, term, reward, boot, DISC, lam)

    def n_step(t, n):
        gained = sum(DISC**k * reward[:, t + 1 + k] for k in range(n))
        return gained + DISC**n * boot[:, t + n]

    for t in range(L - 1):
        longest = L - 1 - t
        expected = lam ** (longest - 1) * n_step(t, longest)
        for n in range(1, longest):
            expected = expected + (1 - lam) * lam ** (n - 1) * n_step(t, n)
        torch.testing.assert_close(result[:, t], expected)


def test_a_termination_cuts_all_that_follows():
    last, term, reward, boot = given()
    term[:, 3] = last[:, 3] = 1
    result = lambda_return(last, term, reward, boot, DISC, 0.95)
    torch.testing.assert_close(result[:, 2], reward[:, 3])
    reward[:, 4:], boot[:, 3:] = 99.0, -99.0
    again = lambda_return(last, term, reward, boot, DISC, 0.95)
    torch.testing.assert_close(again[:, :3], result[:, :3])


def test_a_truncation_bootstraps_fully_and_forgets_the_next_episode():
    last, term, reward, boot = given()
    last[:, 3] = 1
    result = lambda_return(last, term, reward, boot, DISC, 0.95)
    torch.testing.assert_close(result[:, 2], reward[:, 3] + DISC * boot[:, 3])
    reward[:, 4:], boot[:, 4:] = 99.0, -99.0
    again = lambda_return(last, term, reward, boot, DISC, 0.95)
    torch.testing.assert_close(again[:, :3], result[:, :3])


def test_half_a_termination_discounts_by_half():
    last, term, reward, boot = given()
    halves = lambda_return(last, term + 0.5, reward, boot, DISC, 0.95)
    expected = lambda_return(last, term, reward, boot, DISC / 2, 0.95)
    torch.testing.assert_close(halves, expected)


def test_the_first_row_counts_for_nothing_and_rows_are_independent():
    last, term, reward, boot = given()
    result = lambda_return(last, term, reward, boot, DISC, 0.95)
    for x in (last, term, reward, boot):
        x[:, 0] = 5.0
        x[1:] = 7.0
    again = lambda_return(last, term, reward, boot, DISC, 0.95)
    torch.testing.assert_close(again[0], result[0], rtol=0.0, atol=0.0)
