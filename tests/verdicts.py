"""
What the runs of tests/compare.py say: a row for each arm, its verdict in one sentence, tables and pictures.

A verdict is better, worse, the same to within a margin, or cannot tell. The ± beside it is the one that decides, and p
the probability of such a difference without a cause: at any number of seeds, with the errors of the learning rates,
corrected for the number of arms. Where runs failed, ranks decide: a failure is worse than any loss.
"""
import math
from pathlib import Path
from statistics import mean, median

import evidence
from evidence import CLIFF, MAX_SEEDS, MIN_SEEDS

AA, CANNOT_TELL, LEVEL = 'A/A', 'cannot tell', 0.05


def factor(x):
    return float(f'{2 ** x:.4g}')


def judge(running, runs, unit, margin):
    """The rows of the table: each arm's runs, {seed: result}, and its difference from the first arm."""
    good = [{seed: r['loss'] for seed, r in found.items() if not r['failed']} for found in runs]
    searches = [[*arm.searched.values()] for arm in running]
    sd = evidence.run_sd([*map(dict.values, good)] + [group for found in searches for group in found])
    rows = [row_of(arm, found, sd) for arm, found in zip(running, runs)]
    differences = evidence.differences(good, [arm.rate for arm in running], searches)
    for row, found, difference in zip(rows[1:], runs[1:], differences):
        both = sorted(found.keys() & runs[0].keys())
        if any(found[s]['failed'] or runs[0][s]['failed'] for s in both): # ranks: a failure is worse than any loss
            ranks = [[math.inf if r[s]['failed'] else r[s]['loss'] for s in both] for r in (runs[0], found)]
            row['won'] = sum(b < a for a, b in zip(*ranks))
            row['lost'] = sum(b > a for a, b in zip(*ranks))
            row['p'] = evidence.sign_test(row['won'], row['lost'])
        elif difference and len(both) >= MIN_SEEDS:
            row['found'] = difference
            row |= dict(difference=difference.value, p=evidence.p_value(difference.z),
                        seeds_sd=math.sqrt(difference.seeds_variance), rate_sd=math.sqrt(difference.rate_variance))
        else:
            row['difference'] = mean(found[s]['loss'] - runs[0][s]['loss'] for s in both) if both else None
    family = [row for row in rows[1:] if row['arm'] != AA]
    counts = evidence.holm([row.get('p') for row in family], LEVEL)
    for row in rows[1:]:
        count = counts[family.index(row)] if row in family else 1
        row['family'] = count
        if row.get('p') is not None:
            row['p'] = min(1.0, row['p'] * count)
            row['e_value'] = 0.5 / math.sqrt(row['p']) # a valid one for any valid p (arXiv 1912.06116)
        found = row.pop('found', None)
        row['half'] = found and found.half(LEVEL / count)
        row['interval'] = found and [row['difference'] - row['half'], row['difference'] + row['half']]
        row['needed'] = found and found.seeds_needed(row['seeds'], LEVEL / count)
        row['word'] = word_of(row, margin)
        row['verdict'] = sentence(row, rows[0], unit)
    return rows


def word_of(row, margin):
    if row.get('won') is not None:
        return CANNOT_TELL if row['p'] >= LEVEL else 'better' if row['won'] > row['lost'] else 'worse'
    low, high = row['interval'] or (-math.inf, math.inf)
    if margin and -margin < low and high < margin:
        return f'the same to within {margin:g}'
    return 'better' if high < 0 else 'worse' if low > 0 else CANNOT_TELL


def row_of(arm, runs, sd):
    """What is said of an arm alone. runs: {seed: result}; sd: the usual standard deviation of a run."""
    good = {seed: r for seed, r in runs.items() if not r['failed']}
    every = [r['loss'] for r in good.values()]
    row = dict(arm=arm.name, lr=arm.lr, learning_rate=arm.lr * arm.config['learning_rate'],
               bracketed=arm.rate.bracketed, searched=bool(arm.searched), seeds=len(runs),
               lr_losses={f'{factor(x):g}': [v if math.isfinite(v) else None for v in found]
                          for x, found in sorted(arm.searched.items())},
               losses=[r['loss'] for r in runs.values()], bits=[r['bits'] for r in runs.values()], leak=arm.leak,
               proof=arm.proof, failed=[r['failed'] for r in runs.values() if r['failed']], params=arm.params,
               flops=arm.flops, steps=arm.steps, dataset=arm.config['dataset'], settings=arm.told(),
               runs=len(runs) + sum(map(len, arm.searched.values())), curves=[r['curve'] for r in runs.values()])
    if every:
        low, high = median(every) - CLIFF * sd, median(every) + CLIFF * sd
        row['outliers'] = {seed: r['loss'] for seed, r in good.items() if sd and not low < r['loss'] < high}
        row['loss'] = mean(every)
        if all(r['bits'] for r in good.values()):
            row['bits_per_byte'] = mean(r['bits'] for r in good.values())
        broken = arm.rate.broken(mean(every), sd / math.sqrt(len(every)))
        row['broken_promise'] = arm.rate.loss if broken else None
        row['tokens_per_s'] = median(r['tokens_per_s'] for r in good.values())
        row['peak_memory'] = max(r['peak_memory'] or 0 for r in good.values()) or None
        row['seconds'] = median(r['curve'][-1][2] for r in good.values())
    return row


def seconds_to(loss, curves):
    """
    Mean time at which runs reach a loss, interpolated between evaluations; None if a run does not reach it, or if the
    evaluations are too few to say.
    """
    times = []
    for curve in curves:
        for (_, _, t0, l0), (_, _, t1, l1) in zip(curve, curve[1:]):
            if loss is not None and l1 <= loss and len(curve) > 10:
                times.append(t1 if l0 <= loss or l0 == l1 else t0 + (t1 - t0) * (l0 - loss) / (l0 - l1))
                break
        else:
            return None
    return mean(times) if times else None


def sentence(row, first, unit):
    """The verdict on an arm in words. first: the first arm's row."""
    notes = [f"causal: {row['proof']}" if not row['leak'] else 'NOT CAUSAL']
    for name, one in (('it', row), ('the first arm', first)):
        whose = '' if one is row else ' of the first arm'
        if one['failed']:
            notes.append(f"{len(one['failed'])} of {one['seeds']} runs{whose} failed: it {one['failed'][0]}")
        if one.get('outliers'):
            named = ', '.join(f'seed {s} ({loss:.4f})' for s, loss in one['outliers'].items())
            notes.append(f"outliers{whose}: {named}")
        if one.get('broken_promise') is not None:
            notes.append(f"{name} ended at {one['loss']:.4f}, but its search promised {one['broken_promise']:.4f}: the "
                         "rate may be at the edge of stability")
        if one['searched'] and not one['bracketed']:
            notes.append(f"the best learning rate{whose} is not bracketed")
    if not row['searched']:
        notes.append('learning rates were not searched')
    if row.get('won') is not None:
        found = f": a lower loss in {row['won']} of {row['won'] + row['lost']} seeds, where failed runs rank last"
    elif row['half'] is not None and row['word'] in ('better', 'worse'):
        found = f" by {abs(row['difference']):.4f} ± {row['half']:.4f} {unit}"
    elif row['half'] is not None:
        found = f": {plus_minus(row)} {unit}"
    elif row['difference'] is not None:
        few = f"{row['difference']:+.4f} {unit} is an anecdote, as below {MIN_SEEDS} seeds there is no interval"
        return '; '.join([f"{CANNOT_TELL}: {few}", *notes])
    else:
        return '; '.join([f"{CANNOT_TELL}: no pair of runs to compare", *notes])
    if row['word'] == CANNOT_TELL and row['half'] is not None:
        more = max(1, (row['needed'] or 0) - row['seeds'])
        notes.append('more seeds would not tell: the best rates are not known well enough'
                     if row['needed'] is None and row['rate_sd'] > row['seeds_sd'] else
                     f"{MAX_SEEDS} seeds would not tell, if it is that large" if row['needed'] is None else
                     f"about {more} more seed{'s' if more > 1 else ''} would tell, if it is that large")
    return f"{row['word']}{found}, p={row['p']:.2g}, {row['seeds']} seeds; " + '; '.join(notes)


# ---------------------------------------------------------------------------------------------------------------------
# Table and plots

def number(value, text):
    return '-' if value is None else text.format(value)


def plus_minus(row):
    return number(row.get('difference'), '{:+.4f}') + number(row.get('half'), ' ± {:.4f}').replace('-', '')


def markdown(lines):
    widths = [max(len(line[i]) for line in lines) for i in range(len(lines[0]))]
    text = ['| ' + ' | '.join(cell.ljust(w) for cell, w in zip(line, widths)) + ' |' for line in lines]
    text.insert(1, '|' + '|'.join('-' * (w + 2) for w in widths) + '|')
    return '\n'.join(text)


def short_table(rows):
    """For a terminal of 100 columns. Seconds are relative to the first arm's."""
    lines = [('arm', 'rate', 'loss', 'difference', 'p', 'seeds', 'seconds')]
    for row in rows:
        name = row['arm'] + (' (LEAKS)' if row['leak'] else '')
        ratio = row.get('seconds') and row['seconds'] / (rows[0].get('seconds') or math.nan)
        lines.append((name if len(name) <= 32 else name[:31] + '…', number(row.get('learning_rate'), '{:.2g}'),
                      number(row.get('loss'), '{:.4f}'), plus_minus(row), number(row.get('p'), '{:.2g}'),
                      number(row.get('seeds'), '{}'), number(ratio, '{:.2f}')))
    return markdown(lines)


def long_table(rows):
    """What the short one leaves out."""
    lines = [('arm', 'bits per byte', 'parameters', 'FLOPs a token', 'steps', 'runs', 'seconds', 'tokens/s',
              'peak memory', "seconds to first arm's loss")]
    for row in rows:
        if 'losses' in row:
            lines.append((
                row['arm'], number(row.get('bits_per_byte'), '{:.4f}'), f"{row['params']:,}",
                f"{row['flops'] / 1e6:.3g}M", f"{row['steps']:,}", f"{row['runs']}",
                number(row.get('seconds'), '{:.1f}'), number(row.get('tokens_per_s'), '{:,.0f}'),
                number(row.get('peak_memory') and row['peak_memory'] / 1e9, '{:.2f} GB'),
                number(seconds_to(rows[0].get('loss'), row['curves']), '{:.0f}')))
    return markdown(lines)


def about(rows, equal):
    """What the verdicts are about, in one paragraph."""
    first = rows[0]
    what = {'steps': 'steps', 'params': 'parameters and steps', 'flops': 'FLOPs', 'seconds': 'seconds'}[equal]
    return (f"At equal {what}. The ± and p are about seeds and about how well the best rate is known; they hold at any "
            f"number of seeds up to {MAX_SEEDS}, for all arms together, and for this: {Path(first['dataset']).name}, "
            f"{first['params'] / 1e6:.2f}M parameters, {first['steps']:,} steps.")


def draw(rows, folder, unit):
    """Draws curves.png, learning_rates.png and differences.png."""
    from matplotlib.figure import Figure
    shown = [row for row in rows if row.get('curves') and any(row['curves'])]
    if not shown: # all failed
        return
    figure = Figure(figsize=(15, 4.5), layout='constrained')
    for axes, (label, scale_of) in zip(figure.subplots(1, 3, sharey=True), {
            'tokens': lambda row, point: point[1], 'FLOPs': lambda row, point: point[1] * row['flops'],
            'seconds of training': lambda row, point: point[2]}.items()):
        for i, row in enumerate(shown):
            whole = [curve for curve, loss in zip(row['curves'], row['losses']) if loss is not None]
            points = [step for step in zip(*whole)][1:] # the first is the untrained network
            x = [mean(scale_of(row, point) for point in step) for step in points]
            y = [[point[3] for point in step] for step in points]
            axes.plot(x, [mean(v) for v in y], color=f'C{i}', label=row['arm'])
            axes.fill_between(x, [min(v) for v in y], [max(v) for v in y], color=f'C{i}', alpha=0.2, linewidth=0)
        axes.set(xlabel=label, xscale='log')
        axes.grid(alpha=0.3, which='both')
    figure.axes[0].set_ylabel(f'validation loss, {unit} (band: all seeds)')
    figure.axes[0].legend()
    figure.savefig(folder / 'curves.png', dpi=120)
    if any(row['lr_losses'] for row in shown):
        figure = Figure(figsize=(6, 4.5), layout='constrained')
        axes = figure.subplots()
        for row in shown:
            points = [(float(f), mean(found)) for f, found in row['lr_losses'].items() if None not in found]
            axes.plot(*zip(*points) if points else ([], []), marker='o', label=row['arm'])
        axes.set(xlabel="factor of the config's learning rate", ylabel=f'validation loss, {unit}', xscale='log')
        axes.legend()
        axes.grid(alpha=0.3)
        figure.savefig(folder / 'learning_rates.png', dpi=120)
    compared = [row for row in shown if row.get('half') is not None]
    if compared:
        figure = Figure(figsize=(7, 1 + 0.4 * len(compared)), layout='constrained')
        axes = figure.subplots()
        axes.errorbar([row['difference'] for row in compared], range(len(compared)), fmt='o',
                      xerr=[row['half'] for row in compared])
        axes.axvline(0, color='gray', linewidth=0.8)
        axes.set_yticks(range(len(compared)), [row['arm'] for row in compared])
        axes.invert_yaxis()
        axes.set_xlabel(f'difference to the first arm, {unit} (left is better)')
        axes.grid(alpha=0.3)
        figure.savefig(folder / 'differences.png', dpi=120)


def trend(name, points, unit):
    """
    How an arm's difference from the first one changes: a sentence, the slope and its ±. points: (label, x, row, first
    arm's row), x the log of size or length.
    """
    points = [(label, x, row, first) for label, x, row, first in points if row.get('difference') is not None]
    gaps = ', '.join(f"{plus_minus(row)} at {label}" for label, _, row, _ in points)
    slope, half = evidence.slope([x for _, x, _, _ in points], [
        [None if None in (a, b) else b - a for a, b in zip(first['losses'], row['losses'])]
        for _, _, row, first in points])
    if half is None:
        return f"{name}: {gaps or 'no differences'}", None, None
    changes = f"it changes by {slope:+.4f} ± {half:.4f} for {unit}" if abs(slope) > half else 'no trend is certain'
    return f"{name}: {gaps}; {changes}", slope, half


def trends(tables, horizons):
    """Lines on how differences change with size (--scale) and with length (--horizons), and the numbers."""
    rows_of = [rows for _, rows in tables]
    found = [trend(f"{row['arm']} by n_embd", [
        (w, math.log10(rows[0]['flops'] * rows[0]['steps']), rows[i], rows[0]) for w, rows in tables],
        'ten times the FLOPs')
             for i, row in enumerate(rows_of[0][1:], 1) if len(tables) > 1]
    found += [trend(f"{row['arm']} by steps", [(h, math.log2(h), row['at'][h], rows[0]['at'][h]) for h in horizons],
                    'twice the steps') for rows in rows_of for row in rows[1:] if 'at' in row]
    return [line for line, _, _ in found], [dict(about=line.partition(':')[0], slope=slope, half=half)
                                            for line, slope, half in found]
