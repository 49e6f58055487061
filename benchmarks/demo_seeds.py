"""Train the demo's recipe with several seeds: python -m benchmarks.demo_seeds --workdir=DIR

Each result is a line of --results (docs/demo.jsonl); seeds that have one are skipped, and a stopped run resumes from
its checkpoint. Prints the mean and the standard deviation over seeds of the zero-shot accuracy on all 1,890 classes.
"""

import argparse
import pathlib

from benchmarks import emoji_runs, pages
from configs import flip_emoji
from flip_jax import inference


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workdir", type=pathlib.Path, required=True, help="folder for the runs and the data set")
    parser.add_argument("--results", type=pathlib.Path, default="docs/demo.jsonl", help="one line per seed")
    parser.add_argument("--seeds", type=int, default=3, help="number of runs")
    arguments = parser.parse_args()
    samples, workdir = flip_emoji.get_config().total_samples, arguments.workdir.absolute()
    for seed in range(arguments.seeds):
        if any(line["seed"] == seed for line in pages.read(arguments.results)):
            continue
        config, path = emoji_runs.settings(samples, "", seed, workdir), workdir / str(seed)
        emoji_runs.fit(config, path)
        found = emoji_runs.score(inference.load(path), config)
        pages.append(arguments.results, [{"seed": seed, "samples": samples} | found])
    lines = pages.read(arguments.results)
    for key in ("top1", "top5"):
        print(f"{key}: {pages.mean_and_spread([line[key] for line in lines])} % over {len(lines)} seeds")


if __name__ == "__main__":
    main()
