"""What a training reads, and how it is judged on the way."""

from collections.abc import Callable, Generator, Iterator
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec, use_abstract_mesh

from models.errors import InputError
from utils.data import Batch, Source, batches
from utils.metrics import precision_metrics
from utils.sharding import batch_sharding, own_rows, to_device
from utils.state import TrainState
from utils.video import strip

Evaluate = Callable[[Any, Batch, jax.Array], tuple[dict[str, jax.Array], jax.Array]]


def read(cfg: Any, mesh: Mesh, source: Source, first: int) -> Generator[Batch, None, None]:
    """Batches of a training (`utils.train.TrainConfig`) from number `first` on, on the devices of the mesh."""
    how = {"num_workers": cfg.num_workers, "windows_per_clip": cfg.windows_per_clip}
    return _on_devices(cfg, mesh, lambda rows: batches(source, cfg.batch_size, cfg.seed, start=first, rows=rows, **how))


def _on_devices(
    cfg: Any, mesh: Mesh, stream_of: Callable[[np.ndarray], Iterator[Batch]]
) -> Generator[Batch, None, None]:
    sharding = batch_sharding(mesh)
    rows = own_rows(sharding, cfg.batch_size)
    return to_device(stream_of(rows), sharding, rows, cfg.batch_size)


class Validation:
    """Evaluates a state on the same batches each time."""

    def __init__(self, cfg: Any, mesh: Mesh, evaluate: Evaluate, source: Source):
        self.cfg, self.mesh, self.source = cfg, mesh, source
        root = jax.random.key(cfg.seed)

        def on_mesh(state: TrainState, batch: Batch, i: jax.Array) -> tuple[dict[str, jax.Array], jax.Array]:
            with use_abstract_mesh(mesh.abstract_mesh):
                return evaluate(state.best_model(), batch, jax.random.fold_in(root, i))

        self.evaluate = jax.jit(
            on_mesh,
            out_shardings=NamedSharding(mesh, PartitionSpec()),  # whole in every process, to be looked at
        )

    def __call__(self, state: TrainState) -> tuple[dict[str, float], np.ndarray]:
        """Means of the metrics as `val_<name>`, and a picture of the first batch, uint8 (H, W, C).

        Of a metric (B, T, 2), scores and what they were to find, all batches together give the average precision.
        """
        sums: dict[str, float] = {}
        ranked: dict[str, list[np.ndarray]] = {}
        clips = lambda rows: batches(self.source, self.cfg.batch_size, self.cfg.seed + 1, rows=rows)
        stream = _on_devices(self.cfg, self.mesh, clips)
        for i in range(self.cfg.val_batches):
            metrics, videos = self.evaluate(state, next(stream), np.int32(i))
            for name, value in metrics.items():
                if value.ndim:
                    ranked.setdefault(f"val_{name}", []).append(np.asarray(value))
                    continue
                sums[f"val_{name}"] = sums.get(f"val_{name}", 0.0) + float(value) / self.cfg.val_batches
            if i == 0:
                picture = strip(np.asarray(jax.device_get(videos) * 255 + 0.5).clip(0, 255).astype(np.uint8))
        for name, parts in ranked.items():
            sums |= precision_metrics(name, np.concatenate(parts))
        best = self.cfg.keep_best
        if best and best not in sums:
            raise InputError(f"`keep_best` {best}: a validation gives {', '.join(sums)}")
        return sums, picture
