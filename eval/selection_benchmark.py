"""Seconds, peak memory and picks of the selection: ours, and what others do, on the same rows.

    python eval/selection_benchmark.py [--kind bins|coverage] [--peers FOLDER]

`bins` is the greedy of graph cut into 10 bins: ours against the greedy with a matrix of all pairs
as it was published, against a plain closed-form greedy, and against apricot and submodlib.
`coverage` is the full order of all rows by facility location, cosines below 0 counted as 0: ours,
apricot and submodlib. `pip install --no-deps --target FOLDER apricot-select numba llvmlite
submodlib-py` puts the libraries beside the package.

Rows: MiniLM embeddings of Alpaca (alpaca_minilm_f16.npy in DQ_TEST_DATA), its first n; beyond
52,002 random mixtures of pairs of them; and made-up rows in 10 classes, or of 8 directions. Every
line is a process of its own, one after the other; what numba compiles is not timed. Where other
work shares the cores, `cpu_seconds` compare and `seconds` do not. `as_ours` is the share of the
rows with our bin and rank, or of the first 10 % of the order with our rank.
"""

import json
import sys
from collections.abc import Callable
from functools import cache, partial
from pathlib import Path
from typing import Any

import numpy as np
from measure import DATA, PIECE, RESULTS, flags, gauge, need, run_piece, save
from numpy import ndarray

N_BINS, SEED, REAL = 10, 0, 52_002
SIZES = {"bins": (2_000, 4_000, 8_000, 11_495, 26_000, REAL), "coverage": (2_000, 5_000)}
TIE_WIDTH = 1e-9
"""Gains closer than this times the rows of the pool are a tie, which the lowest row number wins."""
EXTRAPOLATED = ("n-by-n", "n-by-n, float32")
Line = dict[str, Any]
Work = Callable[[ndarray, ndarray | None, str], ndarray]
"""Rows, strata and similarity -> (n, 2) bin and rank of every row, or (n,) the order of all."""


def main() -> None:
    """Measure every method on every set of rows, or, in a process of its own, one of them."""
    if sys.argv[1:2] == [PIECE]:
        print(json.dumps(measure(json.loads(sys.argv[2]))))
        return
    parser = flags(__doc__, "selection_benchmark")
    parser.set_defaults(output=None)
    add = parser.add_argument
    add("--kind", choices=SIZES, default="bins")
    add("--peers", type=Path, help="Folder with apricot and submodlib.")
    add("--up_to", type=int, default=10**7, help="Rows, to leave out larger sets.")
    add("--exact_up_to", type=int, default=4 * REAL, help="Rows of ours, not in parts.")
    add("--matrix_up_to", type=int, default=8_000, help="Rows of n-by-n.")
    add("--closed_up_to", type=int, default=11_495, help="Rows of closed form.")
    add("--peers_up_to", type=int, default=5_000, help="Rows of the libraries.")
    args = parser.parse_args()
    need("alpaca_minilm_f16.npy")
    name = "selection_benchmark" if args.kind == "bins" else "coverage_benchmark"
    lines = []
    for data, n_rows, method, similarity in plan(args):
        line = {"method": method, "data": data, "rows": n_rows, "similarity": similarity}
        peers = str(args.peers.resolve()) if method in ("apricot", "submodlib") else None
        lines.append(line | run_piece(__file__, {**line, "kind": args.kind, "peers": peers}))
        print(lines[-1], flush=True)
    path = args.output or RESULTS / f"{name}.json"
    save(path, {"kind": args.kind, "n_bins": N_BINS, "lines": lines})


def plan(args: Any) -> list[tuple[str, int, str, str]]:
    """List the measurements: data, rows, method and similarity."""
    most = min(args.up_to, args.exact_up_to)
    peers = {name: args.peers_up_to for name in ("apricot", "submodlib") if args.peers}
    both = ("cosine", "euclidean")
    if args.kind == "coverage":
        asked = [("Alpaca", n, "ours", "cosine") for n in SIZES["coverage"]]
        classes = [("made up, 10 classes", 50_000, "ours", "cosine")]
        limits = peers
    else:
        asked = [("Alpaca", n, "ours", kind) for n in SIZES["bins"] for kind in both]
        limits = {**dict.fromkeys(EXTRAPOLATED, args.matrix_up_to), **peers}
        limits["closed form"] = args.closed_up_to
        mixed = [(REAL, "cosine"), (4 * REAL, "cosine"), (4 * REAL, "euclidean")]
        mixed += [(n, "cosine") for n in (1_000_000, 2_000_000)]
        classes = [("mixed Alpaca", n, "ours", kind) for n, kind in mixed if n <= most]
        parted = (4 * REAL, 1_000_000)
        classes += [("mixed Alpaca", n, "ours in parts", "cosine") for n in parted]
        classes += [("made up, 10 classes", 50_000, "ours", kind) for kind in both]
        classes += [("made up, 8 directions", 20_000, "ours", "cosine")]
    for name, limit in limits.items():
        asked += [("Alpaca", n, name, "cosine") for n in SIZES[args.kind] if n <= limit]
    return [one for one in [*asked, *classes] if one[1] <= args.up_to]


def measure(asked: Line) -> Line:
    """Time a method, and compare its picks with ours; "absent" says why there is none to time."""
    if asked["peers"]:
        sys.path.append(asked["peers"])
    work, own = (METHODS[asked["kind"]][name] for name in (asked["method"], "ours"))
    rows, strata = make_rows(asked["kind"], asked["data"], asked["rows"])
    similarity = asked["similarity"]
    try:
        work(rows[:200], None, similarity)  # what compiles or loads on its first call
    except ImportError as error:
        return {"absent": f"not installed: {error}"}
    found, picks = gauge(lambda: work(rows, strata, similarity))
    if asked["method"] not in ("ours", "ours in parts"):
        wanted = own(rows, strata, similarity)
        n = len(picks) if asked["kind"] == "bins" else len(picks) // 10
        same = np.atleast_2d((picks[:n] == wanted[:n]).T).all(axis=0)
        found["as_ours"] = float(same.mean())
    return {**found, "dimension": rows.shape[1]}


def extrapolate(lines: list[Line]) -> list[Line]:
    """Give the n-by-n greedy at sizes where it was not measured: seconds and memory as powers."""
    found = []
    for method in EXTRAPOLATED:
        known = [x for x in lines if x["method"] == method and "seconds" in x]
        if len(known) < 2:
            continue
        sizes = np.log([x["rows"] for x in known])
        of_line = {"seconds": lambda x: x["seconds"]["median"], "memory_bytes": _memory}
        fits = {k: np.polyfit(sizes, np.log([f(x) for x in known]), 1) for k, f in of_line.items()}
        for n in (26_000, REAL):
            far = {key: float(np.exp(np.polyval(fit, np.log(n)))) for key, fit in fits.items()}
            found.append({**known[0], "rows": n, **far})
    return found


def _memory(line: Line) -> int:
    return max(line["memory_bytes"], 1)


# --- rows


def make_rows(kind: str, data: str, n_rows: int) -> tuple[ndarray, ndarray | None]:
    """Give the rows, float32, and their strata: the first of more are the same."""
    rng = np.random.default_rng(SEED)
    if "Alpaca" in data:
        real = np.load(DATA / "alpaca_minilm_f16.npy", mmap_mode="r")
        if data == "Alpaca":
            return real[:n_rows].astype(np.float32), None
        return mix_rows(real.astype(np.float32), n_rows), None
    if data == "made up, 8 directions":
        return (rng.normal(size=(n_rows, 8)) @ rng.normal(size=(8, 256))).astype(np.float32), None
    if kind == "coverage":  # 20 clouds a class
        strata = np.arange(n_rows) // 5_000
        centres = rng.normal(size=(10, 20, 512))[strata, rng.integers(0, 20, size=n_rows)]
        return (centres + 1.5 * rng.normal(size=centres.shape)).astype(np.float32), strata
    # like pooled features: a centre a class, 32 common directions, noise, none below 0
    strata = np.arange(n_rows) % 10
    centres = rng.standard_normal((10, 512), dtype=np.float32)
    directions = rng.standard_normal((32, 512), dtype=np.float32) / 32**0.5
    rows = centres[strata] + rng.standard_normal((n_rows, 32), dtype=np.float32) @ directions
    rows += 0.3 * rng.standard_normal(rows.shape, dtype=np.float32)
    return np.maximum(rows, 0), strata


def mix_rows(source: ndarray, n_rows: int, block: int = 65_536) -> ndarray:
    """Mix pairs of real rows at random shares, add noise of norm about 0.1, scale to length 1."""
    found = np.empty((n_rows, source.shape[1]), dtype=np.float32)
    for start in range(0, n_rows, block):
        rng = np.random.default_rng([SEED, start])
        pairs = rng.integers(len(source), size=(2, block))
        share = rng.random((block, 1), dtype=np.float32)
        rows = share * source[pairs[0]] + (1 - share) * source[pairs[1]]
        rows += rng.standard_normal(rows.shape, dtype=np.float32) * (0.1 / rows.shape[1] ** 0.5)
        rows /= np.linalg.norm(rows, axis=1, keepdims=True)
        found[start : start + block] = rows[: n_rows - start]
    return found


# --- methods


def ours(rows: ndarray, strata: ndarray | None, similarity: Any) -> ndarray:
    """Make the bins by the package."""
    from dq_multimodal.core import make_bins

    bins = make_bins(rows, N_BINS, similarity, strata)
    return np.stack([bins.bin, bins.rank], axis=1)


def ours_in_parts(rows: ndarray, strata: ndarray | None, similarity: Any) -> ndarray:
    """Make the bins of parts by k-means, as `--partition kmeans`."""
    from dq_multimodal.config import count_parts
    from dq_multimodal.core import partition_rows

    n_parts = count_parts("kmeans", len(rows))
    return ours(rows, partition_rows(rows, n_parts, similarity), similarity)


def plain_greedy(
    rows: ndarray, strata: ndarray | None, similarity: str, *, pick: Any, dtype: Any = np.float64
) -> ndarray:
    """Make the bins one greedy run after the other, each on the rows that are left."""
    rows = np.array(rows, dtype=np.float64)
    norms = np.linalg.norm(rows, axis=1, keepdims=True)
    rows = (rows / np.where(norms > 0, norms, 1)).astype(dtype)
    found, left = np.zeros((len(rows), 2), dtype=np.int64), np.arange(len(rows))
    for b in range(N_BINS):
        size = -(-len(left) // (N_BINS - b))
        picks = np.asarray(pick(rows[left], size))
        found[left[picks]] = np.stack([np.full(size, b), np.arange(size)], axis=1)
        left = np.delete(left, picks)
    return found


def pick_by_matrix(rows: ndarray, n_picks: int) -> ndarray:
    r"""Pick as published: a matrix of all pairs, and every gain from its definition at each pick.

    gain(x) = sum over the pool of <p, x> - 2 sum over the picked of <p, x>. The first sum is
    made once; the second anew for all candidates from the rows of the picked, so a bin of k rows
    from a pool of r costs about k^2 r / 2 additions: n^3 in all.
    """
    matrix = rows @ rows.T
    pool_sums = matrix.sum(axis=0)
    return _pick_greedily(n_picks, lambda picks: pool_sums - 2 * matrix[picks].sum(axis=0))


def pick_closed_form(rows: ndarray, n_picks: int) -> ndarray:
    """Pick by running sums: one product of the rows with a vector at each pick, no matrix."""
    left = rows.sum(axis=0)

    def gains(picks: ndarray) -> ndarray:
        nonlocal left
        left = left - 2 * rows[picks[-1:]].sum(axis=0)
        return rows @ left

    return _pick_greedily(n_picks, gains)


def _pick_greedily(n_picks: int, gains_of: Callable[[ndarray], ndarray]) -> ndarray:
    """Pick rows of largest gain, given those picked so far; the first of those that tie."""
    picks = np.empty(n_picks, dtype=np.int64)
    for done in range(n_picks):
        gains = gains_of(picks[:done])
        gains[picks[:done]] = -np.inf
        picks[done] = np.argmax(gains >= gains.max() - TIE_WIDTH * len(gains))
    return picks


def similarities(rows: ndarray) -> ndarray:
    """Give (1 + cosine) / 2 of all pairs, which apricot and submodlib can take.

    Lazy greedy needs similarities that are not negative. With these the gain of a unit row is half
    of ours plus what is the same for all rows, so the picks of a bin are the same.
    """
    return np.maximum((rows @ rows.T + 1) / 2, 0)


def pick_by_apricot(rows: ndarray, n_picks: int) -> ndarray:
    """Pick with apricot's lazy greedy graph cut: alpha 1 is the lambda of ours."""
    from apricot import GraphCutSelection

    cut = GraphCutSelection(n_picks, metric="precomputed", alpha=1, optimizer="lazy")
    return cut.fit(similarities(rows)).ranking


def pick_by_submodlib(rows: ndarray, n_picks: int) -> ndarray:
    """Pick with submodlib's lazy greedy graph cut, which never picks its last row: we do."""
    from submodlib import GraphCutFunction

    if len(rows) == 1:
        return np.zeros(1, dtype=np.int64)
    cut = GraphCutFunction(len(rows), "dense", 1.0, ggsijs=similarities(rows))
    found = cut.maximize(min(n_picks, len(rows) - 1), "LazyGreedy", show_progress=False)
    picks = np.array([row for row, _ in found], dtype=np.int64)
    rest = np.setdiff1d(np.arange(len(rows)), picks) if len(picks) < n_picks else picks[:0]
    return np.concatenate([picks, rest])


def cover(rows: ndarray, strata: ndarray | None, similarity: str) -> ndarray:
    """Order the rows by our coverage; only without strata is this one order."""
    from dq_multimodal.core.coverage import cover_rows

    return np.argsort(cover_rows(rows, strata).rank, kind="stable")


def cosines(rows: ndarray) -> ndarray:
    """Give the cosines of all pairs, in float64, negative ones as 0."""
    rows = rows.astype(np.float64)
    rows /= np.linalg.norm(rows, axis=1, keepdims=True)
    return np.maximum(rows @ rows.T, 0)


def cover_by_apricot(rows: ndarray, strata: ndarray | None, similarity: str) -> ndarray:
    """Order the rows by apricot; the functions that it compiles for each object are kept."""
    from apricot import FacilityLocationSelection
    from apricot.functions import facilityLocation

    for name in ("calculate_gains", "calculate_gains_sieve"):
        if not hasattr(getattr(facilityLocation, name), "cache_info"):
            setattr(facilityLocation, name, cache(getattr(facilityLocation, name)))
    found = FacilityLocationSelection(len(rows), metric="precomputed", optimizer="lazy")
    return found.fit(cosines(rows)).ranking


def cover_by_submodlib(rows: ndarray, strata: ndarray | None, similarity: str) -> ndarray:
    """Order all rows but the last by submodlib, stopping neither at gains of 0."""
    from submodlib import FacilityLocationFunction

    function = FacilityLocationFunction(
        n=len(rows), mode="dense", sijs=cosines(rows), separate_rep=False
    )
    never = {"stopIfZeroGain": False, "stopIfNegativeGain": False}
    return np.array([row for row, _ in function.maximize(len(rows) - 1, "LazyGreedy", **never)])


METHODS: dict[str, dict[str, Work]] = {
    "bins": {
        "ours": ours,
        "ours in parts": ours_in_parts,
        "n-by-n": partial(plain_greedy, pick=pick_by_matrix),
        "n-by-n, float32": partial(plain_greedy, pick=pick_by_matrix, dtype=np.float32),
        "closed form": partial(plain_greedy, pick=pick_closed_form),
        "apricot": partial(plain_greedy, pick=pick_by_apricot),
        "submodlib": partial(plain_greedy, pick=pick_by_submodlib),
    },
    "coverage": {"ours": cover, "apricot": cover_by_apricot, "submodlib": cover_by_submodlib},
}

if __name__ == "__main__":
    main()
