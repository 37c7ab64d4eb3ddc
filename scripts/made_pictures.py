"""Draw pictures that photographs hold little of, to train on beside them: made_pictures.py PHOTOGRAPHS OUT

Text, line art, windows of a program, flat colours and ramps, checkers and stripes, "dead leaves" (smooth shapes in
front of each other, sharp and out of focus), small things in rows, and saturated colours side by side, all at random;
and photographs out of focus, so that what a lens left soft stays soft. The same at each call.
"""

import argparse
from collections.abc import Callable
from itertools import pairwise, product
from pathlib import Path

import numpy as np
from originals import opened, pictures
from PIL import Image, ImageDraw, ImageFilter, ImageFont

SIDE, FINER = 512, 4  # pixels; lines are drawn finer and averaged
LETTERS = "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789.,:;!?()-+=/"

Random = np.random.Generator
Colour = tuple[int, int, int]


def colour(random: Random) -> Colour:
    """Often black, white or a grey, or saturated; else any."""
    kind = random.random()
    if kind < 0.3:
        return (int(random.choice([0, 255])),) * 3
    if kind < 0.45:
        return (int(random.integers(256)),) * 3
    levels = random.integers(0, 2, 3) * 255 if kind < 0.65 else random.integers(256, size=3)
    return int(levels[0]), int(levels[1]), int(levels[2])


def colours(random: Random) -> tuple[Colour, Colour]:
    """Two that can be told apart."""
    while True:
        a, b = colour(random), colour(random)
        if abs(sum(a) - sum(b)) > 120:
            return a, b


def words(random: Random, most: int) -> str:
    lengths = random.integers(1, 10, most)
    return " ".join("".join(random.choice(list(LETTERS), n)) for n in lengths)


def text(random: Random) -> Image.Image:
    ink, paper = colours(random)
    image = Image.new("RGB", (SIDE, SIDE), paper)
    draw, top = ImageDraw.Draw(image), 8
    while top < SIDE:
        size = 2 ** random.uniform(3.2, 6)
        draw.text((8, top), words(random, 30), ink, ImageFont.load_default(size))
        top += round(size * 1.4)
    return image


def line_art(random: Random) -> Image.Image:
    """Strokes of 0.4 to 1 of the contrast of two colours: a thin dark one and a wider faint one look alike at the low
    resolution, so both must occur."""
    strongest, paper = colours(random)
    side = SIDE * FINER
    image = Image.new("RGB", (side, side), paper)
    draw = ImageDraw.Draw(image)
    for _ in range(30):
        width = int(random.integers(FINER, 7 * FINER))
        (x, y), (u, v) = random.integers(0, side, (2, 2)).tolist()
        strength = random.uniform(0.4, 1)
        ink = tuple(round(p + strength * (s - p)) for s, p in zip(strongest, paper, strict=True))
        match int(random.integers(4)):
            case 0:
                draw.line((x, y, u, v), ink, width)
            case 1:
                draw.ellipse((min(x, u), min(y, v), max(x, u), max(y, v)), outline=ink, width=width)
            case 2:
                draw.polygon([tuple(p) for p in random.integers(0, side, (4, 2)).tolist()], outline=ink, width=width)
            case 3:
                draw.arc((min(x, u), min(y, v), max(x, u), max(y, v)), x % 360, y % 360, ink, width)
    return image.reduce(FINER)


def window(random: Random) -> Image.Image:
    ink, paper = colours(random)
    image = Image.new("RGB", (SIDE, SIDE), paper)
    draw = ImageDraw.Draw(image)
    for _ in range(30):
        left, top = random.integers(0, SIDE - 40, 2).tolist()
        right, bottom = left + int(random.integers(30, 300)), top + int(random.integers(16, 120))
        draw.rounded_rectangle(
            (left, top, right, bottom), int(random.integers(0, 12)), colour(random), ink, int(random.integers(0, 3))
        )
        draw.text((left + 6, top + 4), words(random, 3), ink, ImageFont.load_default(int(random.integers(11, 20))))
    return image


def smooth(random: Random) -> Image.Image:
    """Patches that are flat or go from one colour to another."""
    levels = np.zeros((SIDE, SIDE, 3))
    for _ in range(12):
        top, left = random.integers(0, SIDE - 64, 2)
        height, width = random.integers(64, SIDE, 2)
        patch = levels[top : top + height, left : left + width]
        y, x = np.mgrid[: patch.shape[0], : patch.shape[1]] / SIDE
        slopes = random.normal(0, 150, (2, 3)) * (random.random() < 0.6)
        patch[:] = colour(random) + y[..., None] * slopes[0] + x[..., None] * slopes[1]
    return Image.fromarray(levels.clip(0, 255).round().astype(np.uint8))


def checkers(random: Random) -> Image.Image:
    """Checkers, stripes and diagonals of some pixels, in patches."""
    image = np.zeros((SIDE, SIDE, 3), np.uint8)
    y, x = np.mgrid[:SIDE, :SIDE]
    for top in range(0, SIDE, SIDE // 4):
        for left in range(0, SIDE, SIDE // 4):
            a, b = colours(random)
            across, along = random.integers(1, 13, 2)
            odd = [(y // across + x // across) % 2, (x // across) % 2, (y // across) % 2, ((x + y) // along) % 2]
            patch = np.where(odd[int(random.integers(4))][..., None], a, b).astype(np.uint8)
            image[top : top + SIDE // 4, left : left + SIDE // 4] = patch[: SIDE // 4, : SIDE // 4]
    return Image.fromarray(image)


def leaves(random: Random) -> Image.Image:
    """Shapes of all sizes in front of each other, the further the softer: the edges of photographs, without their grain
    (the "dead leaves" model)."""
    finer = 3
    side, around = SIDE * finer, np.linspace(0, 2 * np.pi, 96, endpoint=False)
    middle, spread = random.uniform(30, 225, 3), random.uniform(15, 90)
    image = Image.new("RGB", (side, side), tuple(middle.astype(int)))
    for blur, count in ((random.uniform(4, 16), 150), (random.uniform(0, 4), 200), (None, random.integers(50, 800))):
        draw = ImageDraw.Draw(image)
        for _ in range(count):
            radius = min(24 / random.random() ** 0.8, side / 4)  # few are large
            if random.random() < 0.7:
                waves = random.normal(0, 0.5, (5, 2)) / np.arange(1, 6)[:, None] ** 1.5
                angles, turns = around, np.outer(np.arange(1, 6), around)
                distances = radius * (1 + waves[:, 0] @ np.cos(turns) + waves[:, 1] @ np.sin(turns)).clip(0.1)
            else:  # with corners
                angles = np.sort(random.uniform(0, 2 * np.pi, 5))
                distances = radius * random.uniform(0.4, 1, 5)
            shape = np.stack([np.cos(angles), np.sin(angles) * random.uniform(0.05, 1)], 1) * distances[:, None]
            lean = random.uniform(0, np.pi)
            turn = np.array([[np.cos(lean), np.sin(lean)], [-np.sin(lean), np.cos(lean)]])
            outline = (shape @ turn + random.uniform(0, side, 2)).ravel().tolist()
            fill = (middle + spread * (random.normal() + random.normal(0, 0.4, 3))).clip(0, 255).astype(int)
            draw.polygon(outline, tuple(fill))
        if blur is not None:
            soft = image.reduce(finer).filter(ImageFilter.GaussianBlur(blur))
            image = soft.resize((side, side), Image.Resampling.BILINEAR)
    light = Image.fromarray(random.uniform(0.6, 1.2, (4, 4)).astype(np.float32)).resize((SIDE, SIDE))
    small = np.asarray(image.resize((SIDE, SIDE), Image.Resampling.LANCZOS), dtype=np.float64)
    return Image.fromarray((small * np.asarray(light)[..., None]).clip(0, 255).round().astype(np.uint8))


def rows(random: Random) -> Image.Image:
    """Small things in rows, seen aslant and bent: bricks, tiles, windows, weave, beads, seeds, down to where a low
    resolution can hardly tell one from the next."""
    finer = 3
    y, x = np.mgrid[: SIDE * finer, : SIDE * finer] / (SIDE * finer) - 0.5
    lean, spacing = random.uniform(0, 2 * np.pi), 2 ** random.uniform(2, 4.3) / SIDE
    u, v = np.cos(lean) * x - np.sin(lean) * y, np.sin(lean) * x + np.cos(lean) * y
    distance = 1 + random.uniform(0, 1) * v
    u, v = u / distance, v / distance * random.uniform(0.5, 2)
    waves, bend = random.uniform(1, 12, 4), random.uniform(0, 0.02)
    u, v = u + bend * np.sin(waves[0] * v + waves[1]), v + bend * np.sin(waves[2] * u + waves[3])
    u, v = u / spacing, v / spacing
    u += random.choice([0, 0.5, random.random()]) * (np.floor(v) % 2)  # as bricks, or one above the other

    thing = (np.floor(u) * 7919 + np.floor(v) * 104729).astype(np.int64) % 4096  # each with its place and its light
    right, down = (random.uniform(-0.5, 0.5, (2, 4096)) * random.choice([0, 0.15, 0.3]))[:, thing]
    u, v = (u % 1 - 0.5 - right) * 2, (v % 1 - 0.5 - down) * 2  # from its middle
    power, size = random.choice([1, 2, 2, 4, 16]), random.uniform(0.45, 1.05, 2)
    outwards = np.abs(u / size[0]) ** power + np.abs(v / size[1]) ** power  # 1 at its edge
    ground, lit = np.array(colours(random), dtype=float)
    ground = lit * random.uniform(0, 0.6) if random.random() < 0.5 else ground  # in their shadow
    light = random.normal(0, random.uniform(0, 60), (4096, 1)) + random.normal(0, random.uniform(0, 20), (4096, 3))
    shade = random.choice([0, 0.5, 1]) * (outwards + random.uniform(-1, 1) * u).clip(0, 1)[..., None]
    shaded = (lit + light[thing]) * (1 - shade) + ground * shade
    levels = np.where(outwards[..., None] < 1, shaded, ground).clip(0, 255).round().astype(np.uint8)
    return Image.fromarray(levels).reduce(finer)


def posters(random: Random) -> Image.Image:
    """Flat colours side by side, most of them saturated; their edges hard or smooth."""
    finer = int(random.choice([1, FINER]))
    side = SIDE * finer
    image = Image.new("RGB", (side, side))
    draw = ImageDraw.Draw(image)

    def fill() -> Colour:
        if random.random() < 0.3:
            return colour(random)
        levels = random.choice([0, 255], 3) + random.integers(-50, 51, 3) * (random.random() < 0.5)
        return tuple(levels.clip(0, 255).tolist())

    across, down = (np.r_[0, np.sort(random.integers(0, side, random.integers(2, 16))), side] for _ in range(2))
    for (left, right), (top, bottom) in product(pairwise(across.tolist()), pairwise(down.tolist())):
        draw.rectangle((left, top, right, bottom), fill())
    for _ in range(random.integers(0, 12)):
        x, y, radius = (random.uniform(0, 1, 3) * (side, side, side / 4)).tolist()
        if random.random() < 0.5:
            draw.ellipse((x - radius, y - radius, x + radius, y + radius), fill())
        else:
            corners = random.normal((x, y), radius, (int(random.integers(3, 6)), 2))
            draw.polygon(corners.ravel().tolist(), fill())
    return image.reduce(finer)


KINDS: list[Callable[[Random], Image.Image]] = [text, line_art, window, smooth, checkers, leaves, rows, posters]

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("photographs", type=Path)
parser.add_argument("out", type=Path)
parser.add_argument("--each", type=int, default=30, help="pictures of a kind")
options = parser.parse_args()

options.out.mkdir(parents=True, exist_ok=True)
for nth, kind in enumerate(KINDS, 1):
    for number in range(options.each):
        kind(np.random.default_rng([nth, number])).save(options.out / f"{kind.__name__}_{number}.png")
photographs = pictures(options.photographs)
for number, path in enumerate(photographs[:: max(1, len(photographs) // options.each)][: options.each]):
    random = np.random.default_rng([0, number])
    soft = opened(path).filter(ImageFilter.GaussianBlur(2 ** random.uniform(1, 3)))
    left, top = (max(0, int(random.integers(side - SIDE + 1))) if side > SIDE else 0 for side in soft.size)
    soft.crop((left, top, min(left + SIDE, soft.width), min(top + SIDE, soft.height))).save(
        options.out / f"out_of_focus_{number}.png"
    )
