"""Scores of condensed sets by the package DD-Ranking itself, on the pictures of a bundle.

    pip install --no-deps ddranking==0.2.0; pip install kornia pandas
    python eval/dd_ranking.py SUITE --bundle DIR --task digits --selections dm dc

Its scorer of hard labels trains a ConvNet on a set and on random rows of the same number, each with
the best of five rates, and takes the best of the tested epochs. What of version 0.2.0 runs:

- `LabelRobustScoreHard` trains, on a CPU too and with numpy 2 (its metadata asks for numpy below
  2), with two of its functions replaced. Its loader knows CIFAR-10 and others only, which it
  downloads: here it gives the pictures of a bundle, under the name of CIFAR-10. The function that
  writes its results fails, because scores are listed twice: here it writes nothing. All rows are
  trained on once, by its settings for CIFAR-10, and not in every evaluation.
- Its label-robust scores are not those of its paper: it puts percent where the formula has shares
  (arXiv:2505.13300), so that they leave [0, 1]. Here they are made from its HLR and IOR.
- `LabelRobustScoreSoft` and `AugmentationRobustScore` do not run: both draw random rows by a call
  that lacks an argument (`class_map`), and need checkpoints of teachers, which are not in the
  package. So soft labels have the scores that condensed_tables.py makes of our own cells.
"""

import tempfile
from pathlib import Path
from typing import Any

import numpy as np
from condensed_tables import rank
from harness.bundle import Bundle
from harness.suite import BASELINE, PER_CLASS, read_suite
from measure import fail, flags, save

NAME, FULL = "CIFAR10", "1.0"
"""The name under which the package has settings, and the size of all rows."""


def main() -> None:
    """Score the sets and write what came out."""
    parser = flags(__doc__ or "", "dd_ranking")
    parser.add_argument("suite", help="Name in eval/suites, or a .yaml file.")
    parser.add_argument("--bundle", type=Path, required=True, help="What `prepare` wrote.")
    parser.add_argument("--task", default="digits")
    parser.add_argument("--images_per_class", type=int, default=10)
    parser.add_argument("--selections", nargs="+", required=True)
    parser.add_argument("--depth", type=int, default=3, help="Convolutions of its ConvNet.")
    parser.add_argument("--epochs", type=int, default=300)
    parser.add_argument("--evaluations", type=int, default=1, help="Draws of the set to score.")
    args = parser.parse_args()
    try:
        from ddranking.metrics import hard_label
    except ImportError as error:
        fail(f"{error}: pip install --no-deps ddranking==0.2.0, and kornia and pandas")
    suite, bundle = read_suite(args.suite), Bundle(args.bundle)
    if unknown := set(args.selections) - set(suite.selections):
        fail(f"no selection {', '.join(sorted(unknown))} in {suite.name}")
    pictures = Pictures(bundle, args.task)
    model = f"ConvNet-{args.depth}"
    hard_label.get_dataset = lambda *_: pictures.describe()
    hard_label.save_results = lambda *_: None
    settings = hard_label.REAL_DATA_TRAINING_CONFIG
    settings.setdefault(f"{NAME}-{model}", settings[f"{NAME}-ConvNet-3"])

    def make_scorer(folder: str) -> Any:
        return hard_label.LabelRobustScoreHard(
            dataset=NAME,
            ipc=args.images_per_class,
            model_name=model,
            data_aug_func="none",
            lr_scheduler="cosineannealing",
            num_eval=1,
            im_size=pictures.size,
            num_epochs=args.epochs,
            num_workers=0,
            device="cpu",
            random_data_path=folder,
            save_path=f"{folder}/scores.csv",
        )

    lines = []
    with tempfile.TemporaryDirectory() as folder:
        whole, _ = make_scorer(folder)._compute_hard_label_metrics_helper(
            None, None, None, None, mode="real"
        )
        hard_label.REAL_DATA_ACC_CACHE[f"{NAME}-{model}"] = whole
        for name in args.selections:
            scores = []
            for draw in range(args.evaluations):
                images, labels = pictures.read(name, f"{args.images_per_class}{PER_CLASS}", draw)
                found = make_scorer(folder).compute_metrics(images, hard_labels=labels)
                recovery = found["hard_label_recovery_mean"]
                improvement = found["improvement_over_random_mean"]
                score = {"hlr": recovery, "ior": improvement, "lrs": rank(improvement, recovery)}
                scores.append({key: float(value) for key, value in score.items()})
            lines.append(
                {"selection": name, "images_per_class": args.images_per_class, "scores": scores}
            )
    about = {
        "task": args.task,
        "model": model,
        "epochs": args.epochs,
        "accuracy_of_all": float(whole),
    }
    save(args.output, {**about, "lines": lines})


class Pictures:
    """The pictures of a task in a bundle, as the package reads them: normalised, with classes."""

    def __init__(self, bundle: Bundle, task: str) -> None:
        import torch

        arrays = (
            f"{task}/{part}/{what}" for part in ("train", "test") for what in ("images", "labels")
        )
        self.train, self.classes, self.test, self.test_classes = map(bundle.array, arrays)
        lines = bundle.table(f"{task}/selections").to_pylist()
        self.lines = {(x["selection"], x["keep"], x["draw"]): x for x in lines}
        if (BASELINE, FULL, 0) not in self.lines:
            fail(f"the bundle has no cell of all rows of {task}: {BASELINE} at keep_ratios [1.0]")
        self.size = self.train.shape[1:3]
        self.rows = np.array(self.lines[BASELINE, FULL, 0]["rows"])
        pixels = torch.tensor(self.train[self.rows]).float() / 255
        self.mean, self.spread = pixels.mean((0, 1, 2)), pixels.std((0, 1, 2))

    def normalise(self, images: np.ndarray) -> Any:
        """Give (n, 3, h, w) float32 of mean 0 and deviation 1 over all rows."""
        import torch

        pixels = torch.tensor(images).float() / 255
        return ((pixels - self.mean) / self.spread).permute(0, 3, 1, 2).contiguous()

    def read(self, selection: str, keep: str, draw: int) -> tuple[Any, Any]:
        """Give the images and classes of a selection."""
        import torch

        if (selection, keep, draw) not in self.lines:
            fail(f"the bundle has no {selection} at {keep}, draw {draw}")
        rows = np.array(self.lines[selection, keep, draw]["rows"])
        return self.normalise(self.train[rows]), torch.tensor(self.classes[rows])

    def describe(self) -> tuple[Any, ...]:
        """Give what the package's loader of data sets gives."""
        import torch
        from ddranking.utils.data import TensorDataset

        test = TensorDataset(self.normalise(self.test), torch.tensor(self.test_classes))
        labels = [int(x) for x in self.classes[self.rows]]
        train = Rows(self.normalise(self.train[self.rows]), labels)
        names = {k: k for k in range(int(self.classes.max()) + 1)}
        mean, spread = self.mean.tolist(), self.spread.tolist()
        about = (3, self.size, mean, spread, len(names))
        return (*about, train, test, test, names, names)


class Rows:
    """Training rows: images with whole numbers as classes, as torchvision's data sets give them."""

    def __init__(self, images: Any, labels: list[int]) -> None:
        self.images, self.labels = images, labels

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, row: int) -> tuple[Any, int]:
        return self.images[row], self.labels[row]


if __name__ == "__main__":
    main()
