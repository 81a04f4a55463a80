#!/usr/bin/env python3
"""Draws the table of `cargo bench --bench users`: tokens a second of all users together.

    cargo bench --bench users | scripts/plot_users.py docs/users.svg
"""

import sys

SERIES = [(1, "ggraft, an adapter for each", "#0b6e4f"), (3, "libllama, one model", "#c8553d"), (5, "libllama, a LoRA for each", "#6c6c6c")]
WIDTH, HEIGHT, LEFT, RIGHT, TOP, BOTTOM = 640, 360, 60, 190, 24, 48


def rows(lines):
    """Users and speeds of the rows that begin with a number."""
    for line in lines:
        cells = [cell.strip() for cell in line.strip().strip("|").split("|")]
        if line.startswith("|") and cells[0].isdigit():
            yield int(cells[0]), [float(cells[column]) for column, _, _ in SERIES]


def main():
    if len(sys.argv) != 2:
        sys.exit(__doc__)
    table = list(rows(sys.stdin))
    if len(table) < 2:
        sys.exit("no table with users and speeds in standard input")
    users = [n for n, _ in table]
    most = max(max(speeds) for _, speeds in table) * 1.08
    x = {n: LEFT + i * (WIDTH - LEFT - RIGHT) / (len(users) - 1) for i, n in enumerate(users)}
    y = lambda speed: HEIGHT - BOTTOM - speed / most * (HEIGHT - TOP - BOTTOM)
    step = next(s for s in (5, 10, 20, 25, 50, 100, 200, 500, 1000, 10**9) if most / s <= 7)
    out = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" font-family="sans-serif" font-size="12">',
        f'<rect width="{WIDTH}" height="{HEIGHT}" fill="white"/>',
    ]
    for speed in range(0, int(most) + 1, step):
        out.append(f'<line x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y(speed):.1f}" y2="{y(speed):.1f}" stroke="#ddd"/>')
        out.append(f'<text x="{LEFT - 8}" y="{y(speed) + 4:.1f}" text-anchor="end">{speed}</text>')
    for n in users:
        out.append(f'<text x="{x[n]:.1f}" y="{HEIGHT - BOTTOM + 18}" text-anchor="middle">{n}</text>')
    out.append(f'<text x="{(LEFT + WIDTH - RIGHT) / 2}" y="{HEIGHT - 8}" text-anchor="middle">users who write at the same time</text>')
    out.append(f'<text x="{LEFT}" y="{TOP - 8}">tokens a second, all together</text>')
    for i, (_, name, colour) in enumerate(SERIES):
        points = " ".join(f"{x[n]:.1f},{y(speeds[i]):.1f}" for n, speeds in table)
        out.append(f'<polyline points="{points}" fill="none" stroke="{colour}" stroke-width="2"/>')
        out.extend(f'<circle cx="{x[n]:.1f}" cy="{y(speeds[i]):.1f}" r="3" fill="{colour}"/>' for n, speeds in table)
        last = table[-1]
        out.append(f'<text x="{WIDTH - RIGHT + 8}" y="{y(last[1][i]) + 4:.1f}" fill="{colour}">{name}</text>')
    out.append("</svg>\n")
    with open(sys.argv[1], "w", encoding="utf-8") as file:
        file.write("\n".join(out))


main()
