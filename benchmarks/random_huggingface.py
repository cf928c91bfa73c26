"""Writes a Hugging Face directory with random weights of a published shape, to time conversions:

python -m benchmarks.random_huggingface gemma-2b DEST --shards 3
/usr/bin/time -v python convert_weights.py DEST CHECKPOINT
"""

import argparse
import json
import math
from pathlib import Path

import ml_dtypes
import numpy as np
from safetensors.numpy import save_file

from gemma_jax import PRESETS, random_model
from gemma_jax.benchmark.peer import huggingface_fields
from gemma_jax.checkpoint.huggingface import table

POSITIONS = 8192  # that config.json names; they change no weight


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("preset", choices=[n for n, c in PRESETS.items() if c.family == "gemma"])
    parser.add_argument("dest", type=Path)
    parser.add_argument("--shards", type=int, default=3)
    options = parser.parse_args()
    config = PRESETS[options.preset]
    random_model.write_hugging_face(options.dest)  # for its tokenizer
    (options.dest / "model.safetensors").unlink()
    fields = huggingface_fields(config, POSITIONS)
    (options.dest / "config.json").write_text(json.dumps(fields))

    tensors = [pair for e in table(config) for pair in zip(e.names, e.shapes, strict=True)]
    share = sum(math.prod(shape) for _, shape in tensors) / options.shards
    rng, homes, done = np.random.default_rng(0), {}, 0
    shards: list[dict[str, tuple[int, ...]]] = [{} for _ in range(options.shards)]
    for name, shape in tensors:
        shards[min(int(done / share), options.shards - 1)][name] = shape
        done += math.prod(shape)
    for i, shard in enumerate(shards):
        file = f"model-{i + 1:05}-of-{options.shards:05}.safetensors"
        homes |= dict.fromkeys(shard, file)
        arrays = {
            name: (0.02 * rng.standard_normal(shape, np.float32)).astype(ml_dtypes.bfloat16)
            for name, shape in shard.items()
        }
        save_file(arrays, options.dest / file, metadata={"format": "pt"})
    index = {"metadata": {"total_size": 2 * done}, "weight_map": homes}
    (options.dest / "model.safetensors.index.json").write_text(json.dumps(index))


if __name__ == "__main__":
    main()
