"""Count wrongly labelled rows among those a selection keeps: CIFAR-10 with human labels.

    python eval/label_noise.py --embeddings FILE.npy --test_embeddings FILE.npy

Reads the folder of real data (DQ_TEST_DATA, default ../shared/data): CIFAR-10 and the labels of
CIFAR-10N (Wei et al. 2022, "Learning with Noisy Labels Revisited"), of which some are wrong. A
small net is trained on those labels, and its training dynamics say which rows are likely to be
wrong; strata are those labels too. For every selection, share of rows put last (noise ratio) and
keep ratio: the share of wrong labels among the kept rows, and at 10 % the test accuracy of a linear
probe on the embeddings that learns the kept labels. Beside them random selection, a mean of several
draws.
"""

import argparse
import json
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from measure import DATA, ROOT, fail, flags, need, save

sys.path[:0] = [str(ROOT)]
NET, SIDE, N_CLASSES = "small-cnn", 32, 10
LABELS = ("aggre_label", "random_label1", "worse_label")
KEEP_RATIOS, NOISE_RATIOS = (0.1, 0.3, 0.5), (0.0, 0.05, 0.1, 0.2, 0.3)
PROBED, PENALTY = 0.1, 250.0
"""Keep ratio at which the probe is fitted, and its penalty, as in eval/protocols.yaml."""


def main() -> None:
    """Measure, and write the results file."""
    parser = flags(__doc__, "label_noise")
    parser.add_argument("--embeddings", type=Path, required=True, help="Of the training rows.")
    parser.add_argument("--test_embeddings", type=Path, required=True, help="Of the test rows.")
    parser.add_argument("--labels", choices=LABELS, default=LABELS[0])
    parser.add_argument("--epochs", type=int, default=10, help="Of the net.")
    parser.add_argument("--draws", type=int, default=5, help="Of random, ccs and dual.")
    parser.add_argument("--work", type=Path, default=ROOT / "runs" / "label_noise")
    args = parser.parse_args()
    noisy = "cifar10_extras/cifar10n_train_labels.npz"
    need(noisy)
    for path in (args.embeddings, args.test_embeddings):
        if not path.is_file():
            fail(f"no file {path}")
    found = np.load(DATA / noisy)
    given, true = (found[name].astype(np.int64) for name in (args.labels, "clean_label"))
    started = time.perf_counter()
    dynamics = record(given, args.epochs, args.work / f"{args.labels}-{args.epochs}")
    about = {"labels": args.labels, "rows": len(given), "wrong": float((given != true).mean())}
    about |= {"net": NET, "epochs": args.epochs}
    about["dynamics_seconds"] = round(time.perf_counter() - started, 1)
    save(args.output, {**about, "lines": compare(args, dynamics, given, true)})


def record(labels: np.ndarray, n_epochs: int, folder: Path) -> np.ndarray:
    """Train the net on the labels, and give its dynamics, (epochs, n, 3); made once."""
    from harness.images import build_net

    from dq_multimodal.data.source import load_source
    from dq_multimodal.training.classify import ClassifierArguments, train_classifier
    from dq_multimodal.training.dynamics import FILE, Dynamics
    from dq_multimodal.training.pictures import Pictures, read_files
    from dq_multimodal.training.record import make_accelerator

    if not (folder / FILE).is_file():
        rows = load_source(str(DATA / "cifar10" / "train-*.parquet")).dataset
        pictures = Pictures(read_files(rows, "img"), labels, SIDE)
        settings = ClassifierArguments(num_train_epochs=n_epochs)
        recorder, net = Dynamics(folder), build_net(NET, N_CLASSES, SIDE)
        where = (make_accelerator(), folder)
        train_classifier(net, pictures, None, settings, *where, dynamics=recorder)
        recorder.finish({"net": NET})
    return np.load(folder / FILE)


def compare(
    args: argparse.Namespace, dynamics: np.ndarray, given: np.ndarray, true: np.ndarray
) -> list[dict[str, Any]]:
    """Give a line for every selection, noise ratio and keep ratio."""
    from dq_multimodal.config import CompressConfig
    from dq_multimodal.core import difficulty
    from dq_multimodal.core.bins import Bins
    from dq_multimodal.stages.marks import Marks
    from dq_multimodal.stages.ordering import bin_by_method, bins_kind, order_by_method, weigh_rows

    embeddings, n_rows = np.load(args.embeddings), len(given)
    probe = make_probe(embeddings, np.load(args.test_embeddings), given)
    scores = {name: getattr(difficulty, name)(dynamics) for name in ("aum", "confidence", "dual")}
    cad = difficulty.difficulty_weights("cad", difficulty.cad(dynamics))
    marks = replace(Marks(), **{name: found.astype(np.float32) for name, found in scores.items()})
    hard = replace(marks, difficulty=cad.astype(np.float32))
    zeros = np.zeros(n_rows, dtype=np.int64)
    no_bins = Bins(zeros, zeros, np.full(n_rows, np.nan), given)
    kinds: list[tuple[str, Any, Marks]] = [
        ("random", "random", marks),
        ("coverage", "coverage", marks),
        ("coverage, cad", "coverage", hard),
        ("ccs", "ccs", marks),
    ]
    lines = []
    for noise_ratio in NOISE_RATIOS:
        for name, method, known in kinds:
            given_too = {"dynamics": "dynamics.npy", "noise_ratio": noise_ratio}
            request = CompressConfig("cifar10", method=method, **given_too)
            bins, kind = no_bins, bins_kind(request.method)
            if kind != "none":
                bins, known = bin_by_method(embeddings, given, kind, request, known)
            n_draws = 1 if request.method == "coverage" else args.draws
            for keep_ratio in KEEP_RATIOS:
                wrong, accuracy = [], []
                for seed in range(n_draws):
                    request = replace(request, seed=seed)
                    place = order_by_method(bins, request, None, known)
                    is_kept = place < round(keep_ratio * n_rows)
                    weights = weigh_rows(bins, request, known, is_kept)
                    wrong.append((given != true)[is_kept].mean())
                    if keep_ratio == PROBED:
                        accuracy.append(probe(is_kept, weights))
                line = {"selection": name, "noise_ratio": noise_ratio, "keep_ratio": keep_ratio}
                line |= {"wrong": float(np.mean(wrong))}
                line |= {"accuracy": float(np.mean(accuracy))} if accuracy else {}
                lines.append(line | {"draws": n_draws})
                print(json.dumps(lines[-1]), file=sys.stderr)
    return lines


def make_probe(train: np.ndarray, test: np.ndarray, labels: np.ndarray) -> Any:
    """Give the function from kept rows and their weights to the test accuracy in percent."""
    import torch
    from harness.probe import fit

    from dq_multimodal.data.columns import read_classes
    from dq_multimodal.data.source import load_source

    mean, deviation = train.mean(axis=0, dtype=np.float64), train.std(axis=0, dtype=np.float64)
    rows, tests = (torch.from_numpy((part - mean) / deviation) for part in (train, test))
    source = load_source(str(DATA / "cifar10" / "test-*.parquet")).dataset
    targets, wanted = torch.from_numpy(labels), read_classes(source, "label")[0]

    def accuracy(is_kept: np.ndarray, weights: np.ndarray | None) -> float:
        kept = torch.from_numpy(np.flatnonzero(is_kept))
        given = np.ones(len(kept)) if weights is None else weights[is_kept]
        settings = {"penalty": PENALTY, "tolerance": 1e-3, "max_iterations": 1000}
        found = fit(rows[kept], targets[kept], torch.from_numpy(given).double(), **settings)
        scores = torch.addmm(found.bias, tests, found.matrix)
        return 100 * float((scores.argmax(dim=1).numpy() == wanted).mean())

    return accuracy


if __name__ == "__main__":
    main()
