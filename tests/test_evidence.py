"""tests/evidence.py: against scipy, by brute force and by simulation of users who search, peek and stop."""
import math

import numpy as np
import pytest
from scipy import stats

import evidence
from evidence import MAX_SEEDS, MIN_SEEDS, Rate

RNG = np.random.default_rng


# ---------------------------------------------------------------------------------------------------------------------
# Probabilities

def test_crossing():
    """Against random walks."""
    walks = RNG(0).normal(size=(40000, MAX_SEEDS)).cumsum(axis=1) / np.sqrt(np.arange(1, MAX_SEEDS + 1))
    highest = np.abs(walks[:, MIN_SEEDS - 1:]).max(axis=1)
    for z in 2.0, 2.5, 2.77, 3.2:
        right = (highest >= z).mean()
        assert evidence.crossing(z) == pytest.approx(right, abs=4 * math.sqrt(right / 40000) + 1e-4)


def test_p_values_and_boundaries():
    for level in 0.5, 0.05, 0.05 / 16, 1e-9:
        assert evidence.p_value(evidence.boundary(level)) == pytest.approx(level, rel=1e-6)
        assert evidence.p_value(-evidence.boundary(level)) == pytest.approx(level, rel=1e-6)
    assert 2.6 < evidence.boundary(0.05) < 2.83 # Pocock's constant for 50 looks, of which two are left out
    assert 0.0 < evidence.p_value(math.inf) < evidence.p_value(20.0) < evidence.p_value(8.1) < evidence.p_value(7.9) < 1e-12


def test_holm():
    """Against the definition: the i-th of k sorted p-values is rejected while p (k - i) is below the level."""
    for seed in range(20):
        ps = (RNG(seed).uniform(size=6) ** 4).tolist()
        counts, rejecting = evidence.holm(ps, 0.05), True
        for i, at in enumerate(np.argsort(ps)):
            rejecting = rejecting and ps[at] * (6 - i) < 0.05
            assert (ps[at] * counts[at] < 0.05) == rejecting
    assert evidence.holm([0.01, None, 0.04], 0.05) == [2, 1, 1]
    assert evidence.holm([0.04, None, 0.03], 0.05) == [2, 1, 2]


def test_signs():
    """Of fair coins that are looked at after every throw, at most 5% are ever found unfair."""
    for won, lost in (0, 0), (3, 0), (8, 1), (5, 5):
        likelihood = math.factorial(won) * math.factorial(lost) / math.factorial(won + lost + 1) # of a uniform coin
        assert evidence.sign_test(won, lost) == pytest.approx(min(1.0, 0.5 ** (won + lost) / likelihood))
    throws = RNG(1).random((4000, MAX_SEEDS)) < 0.5
    ever = [any(evidence.sign_test(won, n - won) < 0.05 for n, won in enumerate(row.cumsum().tolist(), 1))
            for row in throws]
    assert 0.005 < np.mean(ever) < 0.05


# ---------------------------------------------------------------------------------------------------------------------
# The search

def search(loss, start=(-1.0, 0.0, 1.0), step=1.0, sd=0.0):
    """Runs next_rates to its end. loss(x, seed)."""
    found, wanted = {}, dict.fromkeys(start, 1)
    while wanted:
        for x, n in wanted.items():
            found[x] = [loss(x, seed) for seed in range(n)]
        wanted = evidence.next_rates(found, step, sd)
    return found


@pytest.mark.parametrize('best', [-2.6, -0.4, 0.1, 3.7])
def test_a_parabola_is_found(best):
    found = search(lambda x, seed: 1.5 + 0.04 * (x - best) ** 2)
    rate = evidence.best_rate(found, 1.0, 1e-3)
    assert rate.bracketed and abs(rate.x - best) <= 0.126 and sum(map(len, found.values())) <= 14
    assert sorted(map(len, found.values()))[-2:] == [3, 3]


def test_no_rate_is_searched_twice():
    """Steps that are no power of two reach the same rate in several ways."""
    for start in (1 / 3, 1, 3), (1, 3, 9), (1, 10, 100), (0.01, 0.1, 1), (0.3, 1, 2):
        start = [round(math.log2(x), 4) for x in start] # as compare.py does
        step = max(np.diff(start))
        for best in np.linspace(-6, 6, 25):
            found = search(lambda x, seed: (x - best) ** 2, start, step)
            assert min(np.diff(sorted(found))) > 0.05 * step


def test_the_ends_of_a_search():
    for slope in 1.0, -1.0: # no best rate: extended up to a limit, and said
        found = search(lambda x, seed: slope * x)
        assert max(found) - min(found) == evidence.WIDEST and not evidence.best_rate(found, 1.0, 0.1).bracketed
    found = search(lambda x, seed: math.inf)
    assert min(found) < -5 and not evidence.best_rate(found, 1.0, 0.0).bracketed
    for start in range(0, 20000, 1000): # flat: hardly any rate gets three seeds
        found = search(lambda x, seed: 1.0 + 0.01 * RNG(start + int(100 * x) % 1000 + seed).normal())
        assert sum(map(len, found.values())) < 23 and sum(len(losses) >= 3 for losses in found.values()) <= 4


def test_a_cliff_is_no_winner():
    """Runs that fail above a rate, or one outlier among a rate's seeds."""
    found = search(lambda x, seed: math.inf if x > 0.3 else 1.5 + 0.04 * (x - 1) ** 2)
    rate = evidence.best_rate(found, 1.0, 0.01)
    assert rate.bracketed and -0.5 <= rate.x <= 0.0
    jump = search(lambda x, seed: 1.5 + 0.04 * (x - 0.8) ** 2 + 0.4 * (x > 0.6), sd=0.01) # a parabola would go on
    assert evidence.best_rate(jump, 1.0, 0.01).x <= 0.5
    outlier = lambda x, seed: 1.5 + 0.04 * x ** 2 - 0.02 * (x == 0) + (x == 0) * (seed == 1)
    found = search(outlier, sd=0.01)
    assert len(found[0.0]) == 3 and evidence.best_rate(found, 1.0, 0.01).x != 0.0
    found = search(lambda x, seed: 1.5 + 0.04 * x ** 2 + (x == 0.5) * (seed == 0), sd=0.01)
    assert len(found[0.5]) == 2 # a rise beside the best rate: of the rate, or of the run?


def test_the_cost_of_a_rate():
    """What a search says its rate may cost is what it costs, on average."""
    said, true = [], []
    for seed in range(150):
        rng, best = RNG(seed), RNG(seed + 1000).uniform(-1, 1)
        found = search(lambda x, _: 0.04 * (x - best) ** 2 + 0.012 * rng.normal(), sd=0.012)
        rate = evidence.best_rate(found, 1.0, 0.012)
        said.append(rate.excess)
        true.append(0.04 * (rate.x - best) ** 2)
    assert np.mean(said) == pytest.approx(np.mean(true), rel=0.5) and np.mean(true) < 0.002


def surprise(cost, found, sd):
    """How far the true cost of best_rate's rate is from what is said, in what is said to be its error."""
    rate = evidence.best_rate(found, 1.0, sd)
    return abs(cost(rate.x) - rate.excess) / rate.excess_sd


@pytest.mark.parametrize('best', np.linspace(-1, 1, 9))
def test_a_curve_may_be_steeper_on_one_side(best):
    for above in 1 / 3, 3:
        cost = lambda x: 0.04 * (x - best) ** 2 * (above if x > best else 1)
        assert surprise(cost, search(lambda x, seed: cost(x), sd=0.002), 0.002) < 0.6


@pytest.mark.parametrize('best', np.linspace(-1, 1, 9))
def test_an_outlier_does_not_move_the_curve(best):
    cost = lambda x: 0.04 * (x - best) ** 2
    found = search(lambda x, seed: cost(x), sd=0.01)
    for x in sorted(found, key=cost)[1:4]: # one of the runs beside the best rate
        assert surprise(cost, found | {x: [found[x][0] + 0.1, *found[x][1:]]}, 0.01) < 1.1


@pytest.mark.parametrize('distance', [0.3, 0.7, 1.5])
@pytest.mark.parametrize('above', [0.0, 0.4])
def test_an_edge_of_stability(above, distance):
    """Losses fall until the edge; beyond, runs end higher, on a valley of their own."""
    for edge in np.linspace(-2, 1, 13) + 0.05: # also below all rates of the start
        cost = lambda x: 0.04 * (x - edge - distance) ** 2 + (0.3 + above * (x - edge) if x > edge else 0.0)
        found = search(lambda x, seed: cost(x), sd=0.005)
        rate, reach = evidence.best_rate(found, 1.0, 0.005), cost(edge)
        assert edge - 0.6 < rate.x <= edge and rate.excess_sd < 0.03
        assert abs(cost(rate.x) - reach - rate.excess) < 2.5 * rate.excess_sd


# ---------------------------------------------------------------------------------------------------------------------
# Differences

def lots(n, correlation, seed=0):
    """Two arms' losses with n seeds, correlated within a seed."""
    own, shared = RNG(seed).normal(size=(2, n)), RNG(seed + 1000).normal(size=n)
    noise = math.sqrt(correlation) * shared + math.sqrt(1 - correlation) * own
    return [dict(enumerate(1.5 + 0.01 * row)) for row in noise]


def difference(losses, rates=(Rate(0.0), Rate(0.0)), searches=((), ())):
    return evidence.differences(losses, rates, searches)[0]


def test_pairs_and_no_pairs():
    """With many seeds, the error is that of a paired test if the arms share their luck, and of Welch's if not."""
    for correlation, tolerance in (0.0, 0.05), (0.9, 0.2): # a covariance is drawn towards zero
        first, second = losses = lots(400, correlation)
        a, b = np.array([*first.values()]), np.array([*second.values()])
        found = difference(losses)
        right = stats.ttest_rel(b, a) if correlation else stats.ttest_ind(b, a, equal_var=False)
        assert found.value == pytest.approx(b.mean() - a.mean())
        assert found.value / math.sqrt(found.seeds_variance) == pytest.approx(right.statistic, rel=tolerance)
        low, high = right.confidence_interval(1 - 2 * stats.norm.sf(evidence.boundary(0.05)))
        assert found.half(0.05) == pytest.approx((high - low) / 2, rel=tolerance)


def test_the_first_arm_may_have_more_seeds():
    first, second = lots(6, 0.0)
    few = difference([{s: first[s] for s in range(3)}, {s: second[s] for s in range(3)}])
    more = difference([first, {s: second[s] for s in range(3)}])
    assert more.seeds_variance < 0.95 * few.seeds_variance


def test_what_a_rate_may_cost_is_in_the_interval():
    losses = lots(10, 0.0)
    plain, unsure = difference(losses), difference(losses, (Rate(0.0), Rate(0.0, excess=0.03, excess_sd=0.02)))
    assert unsure.value == pytest.approx(plain.value - 0.03) and unsure.half(0.05) > 0.02 * evidence.boundary(0.05)
    assert unsure.seeds_needed(10, 0.05) is None # however many


def test_a_broken_promise_widens_the_interval():
    losses = lots(10, 0.0) # near 1.5
    plain = difference(losses)
    for promises in (1.5, 1.3), (1.3, 1.5):
        broken = difference(losses, [Rate(0.0, loss=loss, error=0.01) for loss in promises])
        assert broken.value == plain.value and 0.15 < broken.rate_variance ** 0.5 < 0.2
    assert difference(losses, [Rate(0.0, loss=1.49, error=0.01)] * 2).rate_variance == 0.0
    assert Rate(0.0, math.inf).broken(1.5, 0.0) == 0.0 # all failed: nothing was promised
    # of runs that spike at an edge, by the usual noise: their own is so wide that it would hide the broken promise
    spiking, calm = [1.5, 1.5, 1.7, 1.51, 1.69, 1.5], [1.5, 1.51, 1.49]
    found = difference([dict(enumerate(spiking)), dict(enumerate(calm))], [Rate(0.0, loss=1.5), Rate(0.0)],
                       ([calm], [calm]))
    usual = evidence.run_sd([spiking, calm, calm, calm])
    assert found.rate_variance == pytest.approx((np.mean(spiking) - 1.5 - 2 * usual / 6 ** 0.5) ** 2)


def test_runs_at_a_cliff_do_not_widen_the_interval():
    losses, best = lots(3, 0.0), [1.5, 1.51, 1.49]
    narrow = difference(losses, searches=([best, [1.5]], [best])).half(0.05)
    assert difference(losses, searches=([best, [1.5], [1.5, 1.49, 1.8], [1.6, math.inf]], [best])).half(0.05) == narrow
    assert difference(losses, searches=([best, [1.5], [1.5, 1.47, 1.53]], [best])).half(0.05) != narrow
    wild = [[1.4, 1.5, 1.6], [1.55, 1.45, 1.52], [1.41, 1.6, 1.5]] # an arm with more noise, not three cliffs
    assert difference(losses, searches=([best], wild)).half(0.05) > 3 * difference(losses, searches=([best], [])).half(0.05)


def test_degrees_of_freedom():
    """Shrinkage counts as much as runs do in each arm, and no more than all runs have in the difference."""
    assert difference(lots(3, 0.0)).df <= 4 < difference(lots(3, 0.0), searches=([[1.0, 1.01, 1.02]], [])).df <= 6
    assert difference(lots(50, 0.0)).df > 80


def test_nothing_to_say():
    assert evidence.differences([{1: 1.0}, {1: 2.0}], [Rate(0.0)] * 2, [(), ()]) == [None]
    assert evidence.differences([{1: 1.0, 2: 1.1}, {}], [Rate(0.0)] * 2, [(), ()]) == [None]
    same = difference([{1: 1.0, 2: 1.0, 3: 1.0}] * 2)
    assert same.value == 0.0 and evidence.p_value(same.z) == pytest.approx(1.0)


def test_power():
    """As many seeds as are said to be needed tell the difference in four of five comparisons."""
    typical = [difference(lots(20, 0.0, seed)) for seed in range(30)]
    for d in typical:
        d.value = 0.01 # one standard deviation of a run
    needed, found = round(np.median([d.seeds_needed(20, 0.05) or MAX_SEEDS for d in typical])), 0
    for seed in range(200):
        first, second = lots(needed, 0.0, seed)
        d = difference([first, {s: loss + 0.01 for s, loss in second.items()}])
        found += abs(d.z) > evidence.boundary(0.05)
    assert 0.7 < found / 200 < 0.9


def test_slopes():
    x, lines = [1.0, 2.0, 3.0], [[1.0, 1.2, None], [2.0, 2.1, 5.0], [3.0, 3.3, 5.0]]
    slope, half = evidence.slope(x, lines)
    assert slope == pytest.approx((1.0 + 1.05) / 2) and half == pytest.approx(12.706 * 0.05 / 2, rel=1e-3)
    assert evidence.slope(x, [[1.0], [2.0], [3.0]]) == (None, None)


# ---------------------------------------------------------------------------------------------------------------------
# What users do: two arms that are equal at their best rates

def verdicts(seed, looks, noise, edge=math.inf):
    """
    (|z| at each look, the old test's p at each look): of the whole procedure, on one invented pair of arms. Half of
    the runs that are `edge` octaves above the best rate end 0.2 nats higher.
    """
    rng, found, losses, at_grid = RNG(seed), [], [{}, {}], [{}, {}]
    best = rng.uniform(-1.5, 1.5, size=2)

    def run(arm, x):
        spike = 0.2 * (edge < math.inf and x - best[arm] - edge > 0.15 * rng.logistic())
        return 0.04 * (x - best[arm]) ** 2 + 0.012 * noise(rng) + spike
    found = [search(lambda x, _: run(arm, x), sd=0.012) for arm in (0, 1)]
    sd = evidence.run_sd(group for f in found for group in f.values())
    rates = [evidence.best_rate(f, 1.0, sd) for f in found]
    octaves = [min((-2.0, -1.0, 0.0, 1.0, 2.0), key=lambda x: run(arm, x)) for arm in (0, 1)] # as one seed has it
    z, p = [], []
    for n in range(1, max(looks) + 1):
        for arm in (0, 1):
            losses[arm][n], at_grid[arm][n] = run(arm, rates[arm].x), run(arm, octaves[arm])
        if n in looks:
            z.append(abs(difference(losses, rates, [[*f.values()] for f in found]).z))
            p.append(stats.ttest_rel(*([*arm.values()] for arm in at_grid)).pvalue)
    return z, p


NORMAL = lambda rng: rng.normal()


@pytest.mark.parametrize('noise, edge', [
    (NORMAL, math.inf), (lambda rng: rng.standard_t(3) / math.sqrt(3), math.inf),
    (lambda rng: rng.normal() * (10 if rng.random() < 0.1 else 1), math.inf), (NORMAL, -0.5)],
    ids=['normal', 't3', 'outliers', 'an edge of stability'])
def test_false_verdicts(noise, edge):
    """Nobody who searches rates and adds seeds until it is significant gets more than 5%, however late he stops."""
    looks = [3, 4, 5, 7, 10, 14, 20]
    found = [verdicts(seed, looks, noise, edge) for seed in range(150)]
    ever = np.mean([max(z) > evidence.boundary(0.05) for z, _ in found])
    assert ever <= 0.05 + 2.5 * math.sqrt(0.05 * 0.95 / 150)
    assert np.mean([min(p) < 0.05 for _, p in found]) > 0.12 # of the test before: pairs, at the best of a grid
