"""
The statistics of tests/compare.py: what runs with different seeds and learning rates say about the difference of arms.

A run's loss is taken to be the arm's best loss + what its learning rate costs + an effect of the seed, which all arms
share + noise of its own. The search of rates estimates the second; the verdict's fresh seeds estimate the rest.
"""
import functools
import math
from dataclasses import dataclass
from statistics import mean, median

import numpy as np
from scipy import stats

MIN_SEEDS, MAX_SEEDS = 3, 50 # p-values hold for looks at these many: of two runs that agree, both may be outliers
FINALISTS, FINAL_SEEDS = 2, 3 # the best rates of a search are tried with several seeds
WIDEST = 8 # octaves of a search
CLIFF = 5.0 # standard deviations: noise alone gives three seeds at one rate such a range with 0.1%
TAILS = 3 # degrees of freedom of a searched run's noise: some are outliers
SKEWS = 1 / 3, 1, 3 # how much steeper a curve of losses may be above the best rate than below it
PRIOR_RUNS = 4 # as how many runs the pooled variance counts beside an arm's own
PRIOR_PAIRS = 8 # and zero beside the measured covariance of arms within a seed

# ---------------------------------------------------------------------------------------------------------------------
# The search of learning rates. x is a rate's log2; found is {x: losses of its seeds}, inf where a run failed

@functools.cache
def chi2_median(df):
    return float(stats.chi2.median(df))


def run_sd(groups):
    """Standard deviation between seeds: the median over groups of runs that differ in nothing else; 0 if unknown."""
    groups = [[*group] for group in groups]
    sds = [np.std(g, ddof=1) / chi2_median(len(g) - 1) ** 0.5 * (len(g) - 1) ** 0.5 for g in groups
           if len(g) > 1 and np.isfinite(g).all()]
    return float(median(sds)) if sds else 0.0


def score(losses, sd):
    """The mean loss at a rate; inf at a cliff, where a run failed or is an outlier."""
    return math.inf if math.inf in losses or sd and max(losses) - min(losses) > CLIFF * sd else mean(losses)


def next_rates(found, step, sd=0.0):
    """
    {x: seeds} that the search still needs; {} at its end. First whole steps, until the best rate has a worse one above
    and two below: losses beyond an edge of stability can have a valley of their own. Then half steps around it, then
    three seeds at the two best, then another one beside the best where a sudden rise may be an outlier's.
    """
    scores = {x: score(losses, sd) for x, losses in found.items()}
    order = sorted(scores, key=lambda x: (scores[x], x)) # if all fail, the lowest
    best, low, high = order[0], min(found), max(found)
    if high - low < WIDEST and (best == high or best - low < 1.99 * step):
        return {high + step if best == high else low - step: 1}
    beside = [next((ran for ran in found if abs(ran - x) < step / 100), x) # but for rounding, x may have run
              for x in (best - step / 2, best + step / 2)]
    half = {x: 1 for x in beside if low < x < high and x not in found}
    finals = {x: FINAL_SEEDS for x in order[:FINALISTS] if len(found[x]) < FINAL_SEEDS and math.isfinite(scores[x])}
    if sum(len(losses) >= FINAL_SEEDS for losses in found.values()) > FINALISTS:
        half = finals = {} # the best changed twice: rates are hardly different
    rises = {x: 2 for x in beside if sd and len(found.get(x, ())) == 1
             and CLIFF * sd < scores[x] - scores[best] < math.inf}
    return half or finals or rises


@dataclass
class Rate:
    """The result of a search: where the verdict runs, and what it may lose there to the best rate."""
    x: float
    loss: float = math.inf # that the search promises there
    error: float = 0.0 # of this promise
    excess: float = 0.0 # expected loss above that of the best rate within reach
    excess_sd: float = 0.0
    bracketed: bool = True

    def broken(self, loss, error):
        """By how much a mean loss with this standard error is worse than promised, beyond two standard errors."""
        return max(0.0, loss - self.loss - 2 * math.hypot(self.error, error))


class Curves:
    """
    What losses y at rates u say about curves level + c (u - minimum)^2 that may be up to 3 times as steep on one side.
    Each minimum and skew has the c and level of least squares, and is as likely as it makes the losses.
    """
    def __init__(self, u, y, sd, step):
        u, y = np.array(u), np.array(y)
        scale = 0.8 * sd or np.ptp(y) / 20 or 1.0 # with 0.8, Student's t says about as much of a mean as normal noise
        self.minimum, self.skew = (g.reshape(-1, 1) for g in np.meshgrid(np.linspace(-1.5, 1.5, 61) * step, SKEWS))

        def average(values):
            return (weights * values).sum(axis=1, keepdims=True) / weights.sum(axis=1, keepdims=True)
        places, rest = self.shape(u), np.zeros((len(self.skew), len(u)))
        for _ in range(8): # each time outliers weigh less
            weights = 1 / (1 + rest ** 2 / TAILS)
            level, centred = average(y), places - average(places)
            spread = average(centred ** 2) + 1e-9 * step ** 4
            self.c = np.maximum(0.0, average(centred * (y - level)) / spread)
            rest = (y - level - self.c * centred) / scale
        self.level = level - self.c * average(places)
        fit = -(TAILS + 1) / 2 * np.log1p(rest ** 2 / TAILS).sum(axis=1)
        self.likely = np.exp(fit - fit.max()) / np.exp(fit - fit.max()).sum()
        # with all of c's own variance verdicts are too careful, with none too bold: see tests/studies.py verdict
        self.c_variance = scale ** 2 / 2 / (weights.sum(axis=1, keepdims=True) * spread + step ** 4 / 100)

    def shape(self, x):
        return (x - self.minimum) ** 2 * np.where(x > self.minimum, self.skew, 1.0)

    def loss(self, x):
        """The loss at x: mean and standard deviation of the curves."""
        losses = (self.level + self.c * self.shape(x))[:, 0]
        loss = self.likely @ losses
        return float(loss), math.sqrt(self.likely @ (losses - loss) ** 2)


def best_rate(found, step, sd):
    """
    Where the verdict runs: at most half a step from the best rate that ran, by the Curves through the runs within a
    step of it. They end at an edge, which lies anywhere between a rate that ran well and the next, where runs fail, are
    outliers, or lose more than the curves say; what is beyond is out of reach.
    """
    scores = {x: score(losses, sd) for x, losses in found.items()}
    best = min(scores, key=lambda x: (scores[x], x))
    if math.isinf(scores[best]):
        return Rate(best, math.inf, excess_sd=sd, bracketed=False)
    failing = [x - best for x in found if math.isinf(scores[x])]
    low = max((x for x in failing if x < 0), default=-math.inf)
    edge = min((x for x in failing if x > 0), default=math.inf)
    u, y = [], []
    for x, losses in sorted((x - best, losses) for x, losses in found.items() if abs(x - best) < 1.01 * step):
        if x > 0 and sd and x < edge:
            loss, error = Curves(u, y, sd, step).loss(x)
            edge = x if mean(losses) > loss + CLIFF * math.hypot(sd, error) else edge
        if x >= edge:
            break
        good = [loss for loss in losses if math.isfinite(loss)]
        u, y = u + [x] * len(good), y + good
    curves = Curves(u, y, sd, step)
    grid = np.arange(-2, 3) * step / 4
    at = min(grid[(u[0] <= grid) & (grid <= u[-1]) & (low < grid)], key=lambda x: curves.loss(x)[0])
    loss, error = curves.loss(at)
    edges = np.linspace(u[-1], edge, 9) if edge < 1.01 * step else np.array([math.inf])
    fall = curves.shape(at) - curves.shape(np.minimum(curves.minimum, edges)) # (curves, edges)
    excess = (curves.likely @ (curves.c * fall)).mean()
    variance = (curves.likely @ ((curves.c * fall - excess) ** 2 + curves.c_variance * fall ** 2)).mean()
    return Rate(float(best + at), loss, math.hypot(error, sd / math.sqrt(len(u))), float(excess), math.sqrt(variance),
                bracketed=min(found) < best < max(found))


# ---------------------------------------------------------------------------------------------------------------------
# Probabilities that hold at every look

def crossing(z):
    """P(|S_n| >= z sqrt(n) for an n from MIN_SEEDS to MAX_SEEDS), S a random walk of standard normal steps."""
    if z > 8:
        return 2 * MAX_SEEDS * stats.norm.sf(z) # an upper bound
    h = 0.05
    x = np.arange(-math.ceil((z * math.sqrt(MAX_SEEDS) + 9) / h), math.ceil((z * math.sqrt(MAX_SEEDS) + 9) / h) + 1) * h
    step = stats.norm.pdf(np.arange(-180, 181) * h) * h
    density, crossed = stats.norm.pdf(x, scale=math.sqrt(MIN_SEEDS)) * h, 0.0
    for n in range(MIN_SEEDS, MAX_SEEDS + 1):
        if n > MIN_SEEDS:
            density = np.convolve(density, step, 'same')
        out = np.clip((np.abs(x) - z * math.sqrt(n)) / h + 0.5, 0.0, 1.0) # the part of each cell that is outside
        crossed += density @ out
        density *= 1 - out
    return min(1.0, float(crossed))


@functools.cache
def crossings():
    z = np.linspace(0.0, 8.0, 161)
    return z, np.log([crossing(v) for v in z])


def p_value(z):
    """The probability that noise alone brings |z| this high at any look; never zero."""
    (table, logs), z = crossings(), min(abs(z), 37.0) # beyond, floating point knows no smaller probability
    return float(np.exp(np.interp(z, table, logs)) if z <= 8 else crossing(z))


def boundary(level):
    """The |z| that noise alone exceeds at some look with this probability."""
    table, logs = crossings()
    return float(np.interp(-math.log(level), -logs, table))


def holm(ps, level):
    """
    By how much each p-value must be multiplied, as one of several (Holm 1979): the smallest by their number, the next
    by one less while they stay below the level. None counts as no test.
    """
    counts, left = [1] * len(ps), sum(p is not None for p in ps)
    for i in sorted((i for i, p in enumerate(ps) if p is not None), key=lambda i: ps[i]):
        counts[i] = left
        left -= int(ps[i] * left < level)
    return counts


def sign_test(won, lost):
    """p-value of a fair coin that holds at every look: the inverse of a likelihood ratio with a uniform prior."""
    return min(1.0, (won + lost + 1) * math.comb(won + lost, won) / 2 ** (won + lost))


# ---------------------------------------------------------------------------------------------------------------------
# Differences

@dataclass
class Difference:
    """An arm's best loss minus the first arm's, with the error of seeds and rates."""
    value: float
    seeds_variance: float
    rate_variance: float
    df: float

    @property
    def z(self):
        """The difference in standard deviations, as the normal distribution would have it."""
        t = self.value / np.sqrt(self.seeds_variance + self.rate_variance)
        return np.copysign(stats.norm.isf(stats.t.sf(abs(t), self.df)), t)

    def half(self, level):
        """Half the width of the interval that misses the truth at some look with this probability."""
        t = stats.t.isf(stats.norm.sf(boundary(level)), self.df)
        return t * np.sqrt(self.seeds_variance + self.rate_variance)

    def seeds_needed(self, n, level, power=0.8):
        """How many seeds would tell this difference with this power, when these are n; None: no number would."""
        wanted = self.value / (boundary(level) + stats.norm.isf(1 - power))
        room = wanted ** 2 - self.rate_variance
        needed = self.seeds_variance * n / room if room > 0 else math.inf
        return math.ceil(needed) if needed <= MAX_SEEDS else None


def noise(losses, searches, sd):
    """
    (variance, its degrees of freedom) of each arm's runs, shrunk towards what is usual among the arms. Runs at a cliff
    say nothing about the verdict's, which are never there.
    """
    squares, df = [], []
    for runs, found in zip(losses, searches):
        own = max(sd, run_sd([runs.values(), *found])) # an arm with more noise has no cliff for it
        groups = [list(runs.values()), *(group for group in found if math.isfinite(score(group, own)))]
        groups = [group for group in groups if len(group) > 1]
        squares.append(sum(np.var(g) * len(g) for g in groups))
        df.append(sum(len(g) - 1 for g in groups))
    squares, df = np.array(squares), np.array(df)
    own = df > 0
    if not own.any():
        return None
    usual = np.median(squares[own] / [chi2_median(n) for n in df[own]]) if own.sum() > 2 else squares.sum() / df.sum()
    # not zero, where all runs are equal
    return np.maximum((PRIOR_RUNS * usual + squares) / (PRIOR_RUNS + df), 1e-18), PRIOR_RUNS + df


def shared(table, variances):
    """Covariance of two arms with the same seed, shrunk towards zero. Negative luck counts, against a bias."""
    known = np.isfinite(table)
    counts = known.sum(axis=1, keepdims=True)
    rest = np.where(known, table - np.nansum(table, axis=1, keepdims=True) / np.maximum(1, counts), 0.0)
    products, pairs = np.triu(rest @ rest.T, 1).sum(), np.maximum(0, np.triu(1 * known @ known.T, 1) - 1).sum()
    limit = 0.9 * variances.min()
    return float(np.clip(products / (pairs + PRIOR_PAIRS), -limit / len(table), limit))


def differences(losses, rates, searches):
    """
    The Difference of each arm but the first from the first; None for an arm of few runs, or if nothing has a spread.
    losses: {seed: loss} of each arm; rates: their Rates; searches: their losses at searched rates, lists by rate.
    """
    sd = run_sd(group for runs, found in zip(losses, searches) for group in (runs.values(), *found))
    found = noise(losses, searches, sd)
    if found is None:
        return [None] * (len(losses) - 1)
    variances, df = found
    seeds = sorted(set().union(*losses))
    table = np.array([[runs.get(seed, math.nan) for seed in seeds] for runs in losses])
    covariance = shared(table, variances)
    # generalized least squares. A seed's inverse covariance is diagonal but for a product (Woodbury's identity)
    precision = np.isfinite(table) / (variances - covariance)[:, None]
    seed_share = precision * (covariance / (1 + covariance * precision.sum(axis=0)))
    information = np.diag(precision.sum(axis=1)) - seed_share @ precision.T
    sums = precision * np.nan_to_num(table)
    error = np.linalg.pinv(information) # of the means
    means = error @ (sums.sum(axis=1) - seed_share @ sums.sum(axis=0))
    result = []
    for a in range(1, len(losses)):
        if min(len(losses[0]), len(losses[a])) < MIN_SEEDS:
            result.append(None)
            continue
        value = means[a] - rates[a].excess - means[0] + rates[0].excess
        parts = np.array([variances[0] / len(losses[0]), variances[a] / len(losses[a])])
        freedom = parts.sum() ** 2 / (parts ** 2 / df[[0, a]]).sum() # Satterthwaite's
        # what a broken promise costs may be the rate's fault; by the usual noise, as the arm's own may come of it
        rate_variance = sum(rates[b].excess_sd ** 2 + rates[b].broken(means[b], sd / len(losses[b]) ** 0.5) ** 2
                            for b in (0, a))
        result.append(Difference(float(value), float(error[a, a] + error[0, 0] - 2 * error[a, 0]), float(rate_variance),
                                 float(min(freedom, (df - PRIOR_RUNS).sum())))) # no more than all runs have
    return result


def slope(x, lines):
    """Mean slope over seeds of their differences, lines[i][seed] at x[i], and the half-width of its 95% t-interval."""
    whole = [line for line in zip(*lines) if None not in line]
    if len(x) < 2 or len(whole) < 2:
        return None, None
    slopes = [stats.linregress(x, line).slope for line in whole]
    return float(np.mean(slopes)), float(stats.t.isf(0.025, len(slopes) - 1) * stats.sem(slopes))
