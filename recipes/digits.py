"""Write the digits that scikit-learn carries as an image dataset: 1,797 grey pictures of 8 x 8.

    python recipes/digits.py --output_dir runs/demo-images/data

Real images without a network: train.parquet (the first 1,437 rows) and test.parquet (the last
360), columns image (PNG) and label.
"""

import argparse
from pathlib import Path

TRAIN_ROWS = 1437


def main() -> None:
    """Read the digits, write the two files."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output_dir", type=Path, required=True)
    args = parser.parse_args()

    import numpy as np
    from datasets import ClassLabel, Dataset, Features, Image
    from PIL import Image as Pictures
    from sklearn.datasets import load_digits

    found = load_digits()
    pixels = np.round(found.images * (255 / 16)).astype(np.uint8)
    features = Features({"image": Image(), "label": ClassLabel(names=[str(k) for k in range(10)])})
    args.output_dir.mkdir(parents=True, exist_ok=True)
    for name, rows in (("train", slice(TRAIN_ROWS)), ("test", slice(TRAIN_ROWS, None))):
        images = [Pictures.fromarray(picture) for picture in pixels[rows]]
        columns = {"image": images, "label": found.target[rows].tolist()}
        path = args.output_dir / f"{name}.parquet"
        temporary = path.with_name(path.name + ".tmp")
        Dataset.from_dict(columns, features=features).to_parquet(temporary)
        temporary.replace(path)


if __name__ == "__main__":
    main()
