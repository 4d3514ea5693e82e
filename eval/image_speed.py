"""Images a second through the embedding stage, against the bare model on decoded pixels.

    python eval/image_speed.py

Both are measured by turns in one run, on the same rows: the stage reads files, decodes, scales,
looks, and saves; the bare model looks at arrays that are ready. GradCAM++ maps are measured the
same way. Reads the folder of real data (DQ_TEST_DATA,
default ../shared/data).
"""

import statistics
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
from measure import DATA, flags, need, save, save_untrained, timed

from dq_multimodal.adapters.image import ImageAdapter
from dq_multimodal.data.source import load_source
from dq_multimodal.stages.embedding import FILE, embed_rows

BATCH = 64


def main() -> None:
    """Measure every pair of data and model, and write."""
    parser = flags(__doc__, "image_speed")
    parser.add_argument("--rounds", type=int, default=5)
    args = parser.parse_args()
    need("cifar10/test-*.parquet", "flickr8k_1k.parquet")
    cifar, photographs = str(DATA / "cifar10/test-*.parquet"), str(DATA / "flickr8k_1k.parquet")
    cases = [
        ("CIFAR-10, 32 px", cifar, 768, "resnet18", 32),
        ("CIFAR-10, 32 px", cifar, 8192, "resnet10-narrow", 32),
        ("photographs, 224 px", photographs, 128, "resnet18", 224),
    ]
    lines = [measure(*case, rounds=args.rounds) for case in cases]
    for line in lines:
        print({key: value for key, value in line.items() if key != "rounds"})
    save(args.output, {"batch_size": BATCH, "lines": lines})


def measure(
    name: str, path: str, n_rows: int, model: str, size: int, *, rounds: int
) -> dict[str, Any]:
    """Time stage, bare model and maps by turns."""
    from dq_multimodal.patches.attribution import GradCamPlusPlus

    dataset = load_source(path).dataset
    dataset = dataset.select(range(min(n_rows, len(dataset))))
    with tempfile.TemporaryDirectory() as folder:
        checkpoint = Path(folder) / "model"
        save_untrained(model, size, checkpoint)
        adapter = ImageAdapter(dataset, None, "none", str(checkpoint))
        starts = range(0, len(dataset), BATCH)
        batches = [
            adapter.load(np.arange(start, min(start + BATCH, len(dataset))))[0][0]
            for start in starts
        ]
        adapter.model.look(batches[0])
        found: dict[str, list[float]] = {"stage": [], "model": [], "maps": []}
        for _ in range(rounds):
            found["model"].append(timed(lambda: [adapter.model.look(b) for b in batches]))
            found["stage"].append(timed(lambda: embed_rows(adapter, Path(folder), BATCH)))
            (Path(folder) / FILE).unlink()
            with GradCamPlusPlus(adapter.model.net) as explain:
                found["maps"].append(
                    timed(lambda: [explain(adapter.model.to_input(b)) for b in batches])
                )
    rates = {key: len(dataset) / statistics.median(seconds) for key, seconds in found.items()}
    shares = [m / s for m, s in zip(found["model"], found["stage"], strict=True)]
    return {
        "data": name,
        "model": model,
        "rows": len(dataset),
        "images_per_second": {key: round(rate, 1) for key, rate in rates.items()},
        "share_of_model_rate": round(statistics.median(shares), 3),
        "maps_share_of_model_rate": round(rates["maps"] / rates["model"], 3),
        "rounds": {key: [round(s, 3) for s in seconds] for key, seconds in found.items()},
    }


if __name__ == "__main__":
    main()
