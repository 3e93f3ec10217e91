"""Several workers on loopback give the losses of one device, and survive each other."""

import json

import numpy as np
import pytest
import tensorflow as tf

from tests import loopback
from tests.conftest import write_png_folder


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("workers")
    write_png_folder(folder / "pictures", per_class=15)
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("count", [2, pytest.param(3, marks=pytest.mark.skip("in the full list"))])
def test_workers_give_the_losses_of_one_device(folder, tmp_path, count):
    check_workers(folder, tmp_path, count, ["image", "climb"])


def check_workers(folder, out, count, names) -> dict[str, float]:
    """Train cases with workers and with one device, and compare; the largest difference of losses by case."""
    workers = loopback.start_all(count, ["-m", "tests.loopback", str(out / "found"), str(folder), *names])
    try:
        alone = {name: loopback.train_case(name, folder, tf.distribute.get_strategy()) for name in names}
        assert [worker.wait(timeout=400) for worker in workers] == [0] * count
    finally:
        for worker in workers:
            worker.kill()
    chief, *others = (json.loads((out / f"found.{number}.json").read_text()) for number in range(count))
    for other in others:
        assert other == chief
    for name in names:
        one, found = alone[name], chief[name]
        assert one["train"] % count != 0 or count == 3
        assert found["decisions"] == one["decisions"]
        np.testing.assert_allclose(found["losses"], one["losses"], atol=1e-5, rtol=0)
        np.testing.assert_allclose(found["accuracies"], one["accuracies"], atol=1e-6)
        np.testing.assert_allclose(found["cka"], one["cka"], atol=1e-4)
        np.testing.assert_allclose(found["logits"], one["logits"], atol=1e-4)
    return {name: float(np.abs(np.subtract(chief[name]["losses"], alone[name]["losses"])).max()) for name in names}
