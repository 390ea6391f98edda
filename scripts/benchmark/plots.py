"""plots - charts as SVG, without a library."""
from xml.sax.saxutils import escape

WIDTH, LEFT, RIGHT, TOP = 760, 150, 70, 56
ROW, BAR = 28, 16
COLOURS = ("#4477aa", "#66ccee", "#ee6677", "#ccbb44", "#228833", "#aa3377", "#777777", "#222222")


def bars(title, unit, rows, legend=()):
    """Horizontal bars: rows of (label, [value of each segment], (least, greatest) or None)."""
    greatest = max([sum(values) for _, values, _ in rows] + [span[1] for *_, span in rows if span])
    scale = (WIDTH - LEFT - RIGHT) / (greatest or 1)
    parts = [heading(title, unit), *key(legend)]
    for number, (label, values, span) in enumerate(rows):
        top, left = TOP + number * ROW, LEFT
        parts.append(text(LEFT - 8, top + 13, label, "end"))
        for colour, value in zip(COLOURS, values):
            parts.append(f'<rect x="{left:.1f}" y="{top}" width="{value * scale:.1f}" height="{BAR}" fill="{colour}"/>')
            left += value * scale
        end = left
        if span:
            least, most = (LEFT + bound * scale for bound in span)
            parts.append(stroke([(least, top + BAR / 2), (most, top + BAR / 2)], "#222222"))
            parts += [stroke([(x, top + 4), (x, top + BAR - 4)], "#222222") for x in (least, most)]
            end = max(left, most)
        parts.append(text(end + 6, top + 13, f"{sum(values):.3g}"))
    return document(parts, TOP + len(rows) * ROW + 12)


def lines(title, across, up, series, least=0.0):
    """Series of (label, [(x, y)]) in one frame whose vertical axis begins at `least`; what is below lies on it."""
    height, bottom = 380, 330
    points = [point for _, row in series for point in row]
    right, most = max(x for x, _ in points), max(y for _, y in points) * 1.05

    def place(x, y):
        y = max(y, least)
        return LEFT + x / right * (WIDTH - LEFT - RIGHT), bottom - (y - least) / (most - least) * (bottom - TOP)

    parts = [heading(title, up), *key([label for label, _ in series])]
    parts.append(stroke([place(0, most), place(0, least), place(right, least)], "#222222"))
    for step in range(5):
        x, y = right * step / 4, least + (most - least) * step / 4
        parts.append(text(place(x, least)[0], bottom + 18, f"{x:.3g}", "middle"))
        parts.append(text(LEFT - 8, place(0, y)[1] + 4, f"{y:.3g}", "end"))
    parts.append(text((LEFT + WIDTH - RIGHT) / 2, bottom + 38, across, "middle"))
    for colour, (_, row) in zip(COLOURS, series):
        parts.append(stroke([place(x, y) for x, y in row], colour, 2))
    return document(parts, height)


def key(labels):
    """A square of each colour with what it stands for, in one row."""
    parts, left = [], LEFT
    for colour, label in zip(COLOURS, labels):
        parts.append(f'<rect x="{left}" y="32" width="10" height="10" fill="{colour}"/>')
        parts.append(text(left + 14, 41, label))
        left += 28 + 7 * len(label)
    return parts


def heading(title, unit):
    return text(12, 20, f"{title}, {unit}", size=14)


def text(x, y, content, anchor="start", size=12):
    return f'<text x="{x:.1f}" y="{y:.1f}" font-size="{size}" text-anchor="{anchor}">{escape(content)}</text>'


def stroke(points, colour, width=1):
    path = " ".join(f"{x:.1f},{y:.1f}" for x, y in points)
    return f'<polyline points="{path}" fill="none" stroke="{colour}" stroke-width="{width}"/>'


def document(parts, height):
    return "\n".join(
        [
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height}" '
            f'width="{WIDTH}" height="{height}" font-family="sans-serif" fill="#222222">',
            f'<rect width="{WIDTH}" height="{height}" fill="#ffffff"/>',
            *parts,
            "</svg>\n",
        ]
    )
