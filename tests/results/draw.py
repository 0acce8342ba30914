"""
Draws architecture.svg, the README's picture: a block with its mixer, and the causal UNet. No package is needed:

    python tests/results/draw.py

The page behind the picture may be white or dark: text stands in colored boxes, or is a gray that shows on both.
"""
from pathlib import Path

GRAY, INK = '#7d8590', '#1f2328'
BLUE, GREEN, ORANGE, PALE = '#a9cdfb', '#a6dfb3', '#ffc285', '#dfe3e8'
WIDTH, HEIGHT = 880, 500
shapes = []


def text(x, y, words, size=14, color=GRAY, anchor='middle', weight='normal'):
    shapes.append(f'<text x="{x}" y="{y}" font-size="{size}" fill="{color}" text-anchor="{anchor}" '
                  f'font-weight="{weight}">{words}</text>')


def box(x, y, width, height, words, fill, dashed=False):
    """A box with its middle at (x, y)."""
    edge = f'stroke="#b35900" stroke-width="2" stroke-dasharray="6 4"' if dashed else f'stroke="{GRAY}"'
    shapes.append(f'<rect x="{x - width / 2:g}" y="{y - height / 2:g}" width="{width}" height="{height}" rx="6" '
                  f'fill="{fill}" {edge}/>')
    text(x, y + 5, words, color=INK)


def line(points, color=GRAY, arrow=True, width=1.5):
    """Straight lines through the points; the arrow is drawn by hand, since not every viewer knows SVG's markers."""
    path = ' '.join(f'{x:g},{y:g}' for x, y in points)
    shapes.append(f'<polyline points="{path}" fill="none" stroke="{color}" stroke-width="{width}"/>')
    if arrow:
        (x0, y0), (x, y) = points[-2:]
        length = ((x - x0) ** 2 + (y - y0) ** 2) ** 0.5
        u, v = (x - x0) / length, (y - y0) / length # the direction
        corners = [(x, y), (x - 8 * u + 4 * v, y - 8 * v - 4 * u), (x - 8 * u - 4 * v, y - 8 * v + 4 * u)]
        shapes.append(f'<polygon points="{" ".join(f"{a:.1f},{b:.1f}" for a, b in corners)}" fill="{color}"/>')


def plus(x, y):
    shapes.append(f'<circle cx="{x}" cy="{y}" r="10" fill="{PALE}" stroke="{GRAY}"/>')
    text(x, y + 5, '+', 16, INK)


def block(y):
    """x + mixer(norm(x)), then x + mlp(norm(x)), from left to right."""
    text(20, y - 72, 'A block', 16, anchor='start', weight='bold')
    text(32, y + 5, 'x')
    parts = ((120, 100, 'LayerNorm', PALE), (250, 100, 'time-mixing', PALE), (384, 110, 'your mixer', ORANGE),
             (480, 20, '+', None), (580, 100, 'LayerNorm', PALE), (710, 100, 'MLP', GREEN), (804, 20, '+', None))
    for start, end in (56, 480), (510, 804): # the two residual connections
        line([(start, y), (start, y - 48), (end, y - 48), (end, y - 11)])
    end = 42 # of what is drawn so far
    for x, width, words, fill in parts:
        line([(end, y), (x - width / 2, y)])
        if words == '+':
            plus(x, y)
        else:
            box(x, y, width, 56 if fill == ORANGE else 36, words, fill, dashed=fill == ORANGE)
        end = x + width / 2
    line([(end, y), (850, y)])
    text(250, y + 33, 'optional', 12)
    text(384, y + 50, 'attention, gmlp, mlp_mixer, synthesizer, container, or a class of your own')


def unet(y):
    """Eight tokens, merged two by two into four, and back."""
    rows, left, step = (y + 40, y + 126, y + 212), 240, 78
    text(20, y, 'The causal UNet (unet_layers), here with a factor of 2', 16, anchor='start', weight='bold')
    at = [left + step * t for t in range(8)]
    for row, words in zip(rows, ('blocks at full length', 'blocks at half length', 'blocks at full length')):
        text(20, row + 5, words, anchor='start')
    for i in range(4): # coarse token i is made from the tokens that end at 2i, and serves 2i and 2i + 1
        color, width = ('#e8590c', 2.5) if i == 2 else (GRAY, 1.5)
        for t in ([2 * i - 1] if i else []) + [2 * i]:
            line([(at[t], rows[0] + 16), (at[2 * i] - 5 * (t % 2), rows[1] - 16)], color, width=width)
        for t in (2 * i, 2 * i + 1):
            line([(at[2 * i] + 5 * (t % 2), rows[1] + 16), (at[t], rows[2] - 16)], color, width=width)
        box(at[2 * i], rows[1], 44, 32, f'{2 * i - 1}, {2 * i}' if i else '0', ORANGE if i == 2 else GREEN)
    for t in range(8):
        box(at[t], rows[0], 44, 32, t, BLUE)
        box(at[t], rows[2], 44, 32, t, BLUE)
    line([(at[7] + 22, rows[0]), (at[7] + 54, rows[0]), (at[7] + 54, rows[2]), (at[7] + 23, rows[2])])
    plus(at[7] + 54, rows[1])
    text(at[7] + 38, rows[1] + 5, 'skip', 13, anchor='end')
    text(20, rows[2] + 46, 'A pair is merged once its second token is there, and serves that position and the next.',
         anchor='start')
    text(20, rows[2] + 67, 'No arrow points to the left: no position sees a later token.', anchor='start')


block(105)
unet(206)
head = (f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" width="{WIDTH}" height="{HEIGHT}" '
        'font-family="-apple-system, Segoe UI, Helvetica, Arial, sans-serif" role="img">\n'
        '<title>A block with the slot of its mixer, and the causal UNet</title>\n')
(Path(__file__).parent / 'architecture.svg').write_text(head + '\n'.join(shapes) + '\n</svg>\n', encoding='utf-8')
