"""Images per second of Graft's input pipeline against a bare one: `python -m tests.benchmarks.input_pipeline`.

500 x 375 JPEG photographs (made from `textures` photographs' tiles, so that they compress as photographs do) to 224 px,
batch 32. Bare is `map(decode_jpeg + the same crop and resize).batch(32)`; Graft's reads any format, checks headers and
scales. Both sides alternate in one process; the median of the rounds counts.
"""

from __future__ import annotations

import argparse
import pathlib
import sys
import tempfile
import time

import numpy as np

from tests.benchmarks.picture import save_result

COUNT, BATCH, SIDE = 960, 32, 224


def write_photographs(folder: pathlib.Path) -> list[str]:
    """JPEG files of 500 x 375 pixels, quality 90, in colour."""
    from PIL import Image

    from models import offline

    tiles = [Image.open(path) for path in sorted((offline.image_data_folder("textures") / "train").rglob("*.png"))]
    random, paths = np.random.default_rng(0), []
    for index in range(COUNT):
        picture = Image.new("RGB", (500, 375))
        for x in range(0, 500, 48):
            for y in range(0, 375, 48):
                picture.paste(tiles[random.integers(len(tiles))].convert("RGB"), (x, y))
        paths.append(str(folder / f"{index:04}.jpg"))
        picture.save(paths[-1], quality=90)
    return paths


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--json", help="file to which the result is added")
    options = parser.parse_args()
    rounds = options.rounds
    import pyarrow as pa
    import tensorflow as tf

    from models.backbone import ImagePreprocess
    from models.inputs import inspect_images, resize_image
    from pipelines.data import dataset, image_loader

    preprocess = ImagePreprocess((SIDE, SIDE), mean=(127.0,) * 3, deviation=(128.0,) * 3)
    with tempfile.TemporaryDirectory() as folder:
        paths = write_photographs(pathlib.Path(folder))
        table = pa.table({"path": paths, "label": [0] * COUNT, "weight": pa.array([1.0] * COUNT, pa.float32())})

        def bare():
            def load(path):
                return resize_image(tf.io.decode_jpeg(tf.io.read_file(path), channels=3), preprocess)

            return tf.data.Dataset.from_tensor_slices(paths).map(load, tf.data.AUTOTUNE).batch(BATCH).prefetch(2)

        kinds = {fact["plain"] for fact in inspect_images(paths)}  # as `load_images` finds out before every run
        load = image_loader(preprocess, 255, plain=kinds.pop() if len(kinds) == 1 else "")
        sides = {
            "bare": bare,
            "graft": lambda: dataset(table, load, class_count=2, batch_size=BATCH, training=True),
        }
        rates = {name: [] for name in sides}
        for number in range(rounds + 1):
            for name in list(sides) if number % 2 else list(sides)[::-1]:
                started = time.perf_counter()
                for _ in sides[name]():
                    pass
                if number:  # the first round warms up
                    rates[name].append(COUNT / (time.perf_counter() - started))
    for name, values in rates.items():
        print(f"{name:6} {np.median(values):7.0f} images per second ({', '.join(f'{v:.0f}' for v in values)})")
    if options.json:
        save_result(options.json, "input_pipeline", {name: float(np.median(values)) for name, values in rates.items()})
    print(f"Graft's pipeline reaches {np.median(rates['graft']) / np.median(rates['bare']):.0%} of the bare one")
    return 0


if __name__ == "__main__":
    sys.exit(main())
