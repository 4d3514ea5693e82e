"""Measure what selections by pictures, by words and by both keep of rows with both.

    python eval/joint_coverage.py

Data: easy-VQA (38,575 questions on 4,000 pictures) and the 1,000 pictures of Flickr8k with five
captions, as rows of a picture with all five and as rows of a picture with one. The selections are
those of eval/suites/vqa_small.yaml, at its keep ratios; means are over draws. Of each line:

- distance: mean over all rows of 1 - cosine to the nearest kept row, of pictures and of words;
- kept: shares of the distinct pictures, texts, (text, answer) pairs and answers that are kept;
- answers: share of the rarest among the kept rows, and the entropy of all in bits.

`cosines` are mean and standard deviation of those of two rows, drawn with replacement.
"""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from harness.prepare import QuestionTask, folder_of, hash_files
from harness.suite import Cell, read_suite
from measure import flags, save

SUITE, PROTOCOL = "vqa_small", "vqa_features"
TASKS = (
    *("easy_vqa_unlabelled", "easy_vqa_shuffled", "easy_vqa"),
    *("flickr8k", "flickr8k_captions"),
)
RATIOS = (0.05, 0.2)
DRAWS = 5
BLOCK = 2048
"""Rows whose cosines are held at a time."""


def main() -> None:
    """Measure all tasks, and write the results file."""
    parser = flags(__doc__ or "", "joint_coverage")
    parser.add_argument("--work", type=Path, default=Path("runs") / "bench")
    args = parser.parse_args()
    save(args.output, {"tasks": {name: measure_task(name, args.work) for name in TASKS}})


def measure_task(name: str, work: Path) -> dict[str, Any]:
    """Measure all selections of a task."""
    suite = read_suite(SUITE)
    asked = [
        Cell(name, selection, keep, PROTOCOL, "", draw, 0)
        for keep in RATIOS
        for selection in suite.selections
        for draw in range(DRAWS)
    ]
    task = QuestionTask(replace(suite, cells=asked), name, folder_of(suite, name, work))
    rows = Rows.read(task)
    found: dict[tuple[float, str], list[dict[str, float]]] = {}
    for line in task.choose_all():
        key = (float(line["keep"]), line["selection"])
        found.setdefault(key, []).append(rows.measure(line["rows"]))
    lines = []
    for (keep, selection), draws in found.items():
        means = {key: float(np.mean([draw[key] for draw in draws])) for key in draws[0]}
        name = selection.replace("questions", "texts")
        lines.append({"keep_ratio": keep, "selection": name, "draws": len(draws), **means})
    return {"rows": task.n_rows, **rows.count(), "cosines": rows.spread(), "lines": lines}


class Rows:
    """The rows of a task: unit vectors, and codes of what is the same.

    Args:
        image: (n, d) vectors of the pictures.
        text: (n, k) vectors of the texts.
        codes: Of each row, (n,): which picture, text, pair of text and answer, and answer it has.
    """

    def __init__(self, image: np.ndarray, text: np.ndarray, codes: dict[str, np.ndarray]) -> None:
        self.codes = {key: np.unique(code, return_inverse=True)[1] for key, code in codes.items()}
        self.vectors = {}
        for key, half in (("pictures", image), ("texts", text)):
            _, first = np.unique(self.codes[key], return_index=True)
            norms = np.linalg.norm(half[first], axis=1, keepdims=True)
            self.vectors[key] = half[first] / np.where(norms > 0, norms, 1)

    @classmethod
    def read(cls, task: QuestionTask) -> "Rows":
        """Read the rows of a task."""
        rows = task.source.dataset
        texts = np.array([*map(str, rows[task.text_column])])
        codes = {"pictures": hash_files(rows, task.image_column), "texts": texts}
        if column := task.spec.get("label_column"):
            answers = np.array([*map(str, rows[column])])
            codes |= {"pairs": np.char.add(texts, answers), "answers": answers}
        return cls(*task.halves, codes)

    def count(self) -> dict[str, int]:
        """Count what is distinct."""
        return {key: int(code.max()) + 1 for key, code in self.codes.items()}

    def spread(self) -> dict[str, list[float]]:
        """Give mean and deviation of the cosines of two rows, of pictures and of texts."""
        found = {}
        for key, vectors in self.vectors.items():
            share = np.bincount(self.codes[key]) / len(self.codes[key])
            cosines = vectors @ vectors.T
            mean = float(share @ cosines @ share)
            square = float(share @ np.square(cosines, out=cosines) @ share)
            found[key] = [mean, max(0.0, square - mean**2) ** 0.5]
        return found

    def measure(self, kept: np.ndarray) -> dict[str, float]:
        """Measure the kept rows; see the top of this file."""
        found = {}
        for key, vectors in self.vectors.items():
            code = self.codes[key]
            nearest = distances(vectors, vectors[np.unique(code[kept])])
            found[f"distance of {key}"] = float(nearest[code].mean())
        for key, code in self.codes.items():
            found[f"kept of {key}"] = len(np.unique(code[kept])) / (int(code.max()) + 1)
        if "answers" in self.codes:
            answers = self.codes["answers"]
            share = np.bincount(answers[kept], minlength=int(answers.max()) + 1) / len(kept)
            there = share[share > 0]
            found["smallest answer"] = float(share.min())
            found["entropy of answers"] = float(-(there * np.log2(there)).sum())
        return found


def distances(rows: np.ndarray, kept: np.ndarray) -> np.ndarray:
    """Give 1 - cosine of each unit vector to the nearest kept one, (n,)."""
    parts = [rows[k : k + BLOCK] @ kept.T for k in range(0, len(rows), BLOCK)]
    return 1 - np.concatenate([part.max(axis=1) for part in parts])


if __name__ == "__main__":
    main()
