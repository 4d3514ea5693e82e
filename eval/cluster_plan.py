"""What a billion rows will take on a cluster, from the rates of this machine.

    python eval/cluster_plan.py [--rows 1000000000] [--nodes 32] [--parts 20000 2000]

Runs `dq-multimodal plan --engine ray` on the rows of Alpaca (DQ_TEST_DATA, default ../shared/data)
with the default encoder, for each number of parts by k-means. `load` is the number of processes at
work on this machine, on the average of a minute, before and after.
"""

import os

from measure import DATA, dq, flags, need, save


def main() -> None:
    """Plan, and write the results file."""
    parser = flags(__doc__, "cluster_plan")
    parser.add_argument("--rows", type=int, default=10**9)
    parser.add_argument("--nodes", type=int, default=32)
    parser.add_argument("--gpus_per_node", type=int, default=8)
    parser.add_argument("--cores_per_node", type=int, default=96)
    parser.add_argument("--parts", type=int, nargs="+", default=[20_000, 2000])
    args = parser.parse_args()
    need("alpaca.parquet")
    lines = []
    for n_parts in args.parts:
        asked = ["--method", "dq", "--partition", f"kmeans:{n_parts}", "--engine", "ray"]
        for name in ("rows", "nodes", "gpus_per_node", "cores_per_node"):
            asked += [f"--{name.replace('_', '-')}", str(getattr(args, name))]
        load = os.getloadavg()[0]
        found = dq("plan", DATA / "alpaca.parquet", *asked).found["cluster"]
        loads = [round(value, 1) for value in (load, os.getloadavg()[0])]
        lines.append({"flags": asked, "load": loads, **found})
    save(args.output, {"lines": lines})


if __name__ == "__main__":
    main()
