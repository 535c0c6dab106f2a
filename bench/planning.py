"""How well `fedfuse plan` predicts: its assumptions measured, and its ranking against whole simulated runs.

    .venv/bin/python bench/planning.py measure     alignment and gradient norms over the first rounds of training
    .venv/bin/python bench/planning.py validate    runs of `fedfuse simulate`; a minute or two each
    .venv/bin/python bench/planning.py table       rank correlation of what has been run

Both use training rows alone: a fifth of them, by site and class, stands in for the test rows, which are left out, so
that no default is chosen on what the README's figures are scored with. Results: bench/results/planning.jsonl.
"""

from __future__ import annotations

import csv
import json
import os
import subprocess
import sys
import tempfile
from collections import Counter
from pathlib import Path

import tomli_w

HERE = Path(__file__).parent
RESULTS = HERE / "results" / "planning.jsonl"
DATA = Path(os.environ.get("FEDFUSE_DATA", HERE.parents[1] / "shared" / "data")) / "digits"
ROUNDS_MEASURED = 10
CLIPS = (0.25, 0.5, 1.0, 2.0, 4.0)
SETTINGS = (
    # epsilon, rounds, sampling rate, clip
    (1.0, 10, 1.0, 1.0),
    (1.0, 40, 0.5, 1.0),
    (1.0, 160, 0.1, 1.0),
    (1.0, 10, 0.1, 1.0),
    (1.0, 40, 0.5, 4.0),
    (1.0, 40, 0.1, 1.0),
    (1.0, 160, 0.5, 1.0),
    (1.0, 10, 0.5, 1.0),
    (3.0, 10, 0.1, 1.0),
    (3.0, 40, 0.1, 1.0),
    (3.0, 40, 0.5, 1.0),
    (3.0, 10, 1.0, 1.0),
    (8.0, 40, 0.5, 1.0),
)


def validation_folder(folder: Path) -> Path:
    """Write a data folder of the training rows, every fifth of a site and class held out as its test rows."""
    with (DATA / "manifest.csv").open(newline="", encoding="utf-8") as file:
        rows = [row for row in csv.DictReader(file) if row["split"] == "train"]
    seen: Counter[tuple[str, str, bool, bool, bool]] = Counter()
    for row in rows:
        kind = (row["site"], row["label"], *(bool(row[m]) for m in ("text", "image", "audio")))
        row["split"] = "test" if seen[kind] % 5 == 4 else "train"
        seen[kind] += 1
    folder.mkdir(parents=True)
    (folder / "dataset.toml").write_bytes((DATA / "dataset.toml").read_bytes())
    for kind in ("images", "audio"):  # links would lead out of the folder, which is refused
        subprocess.run(["cp", "-r", str(DATA / kind), str(folder / kind)], check=True)
    with (folder / "manifest.csv").open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, rows[0].keys())
        writer.writeheader()
        writer.writerows(rows)
    return folder


def measure() -> None:
    """Print, per segment, the norm of the mean clipped gradient over the clip, on rows that have the modality."""
    import numpy as np
    import torch

    from fedfuse_client.data.manifest import load_dataset
    from fedfuse_client.data.tensors import RecordTensors
    from fedfuse_client.gradients import RecordGradients
    from fedfuse_client.training import PrivateOptimizer, accumulate, train_round
    from fedfuse_server.optimiser import GlobalModel
    from fedfuse_server.plan import resolve, round_privacy
    from fedfuse_shared.models import MODALITIES, build_model, flatten, layout, load_flat
    from fedfuse_shared.privacy.noise import NoiseSource
    from fedfuse_simulations.settings import complete

    class Norms(PrivateOptimizer):
        """Remembers each record's unclipped norm."""

        seen: list[torch.Tensor]

        def clip_and_accumulate(self, gradients, counted):  # type: ignore[no-untyped-def]
            norms = torch.stack([g.squared_norms() for g in gradients]).sum(dim=0).sqrt()
            self.seen.append(norms[counted])
            super().clip_and_accumulate(gradients, counted)

    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as place:
        dataset = load_dataset(validation_folder(Path(place) / "digits"))
        config = resolve(complete({"privacy": {"epsilon": 3.0}}, dataset.info))
        sites = {s: dataset.select(s, "train") for s in dataset.sites()}
        tensors = {s: RecordTensors(dataset.folder, rows, config.model) for s, rows in sites.items()}
        everything = RecordTensors(dataset.folder, dataset.select(split="train"), config.model)
        model = build_model(config.model, 0)
        server = GlobalModel(flatten(model))
        segments = layout(model)
        records = dataset.select(split="train")
        share = {m: sum(getattr(r, m) is not None for r in records) / len(records) for m in MODALITIES}
        for number in range(ROUNDS_MEASURED):
            load_flat(model, server.weights)
            row: dict[str, object] = {"kind": "alignment", "round": number + 1, "epsilon": 3.0}
            for clip in CLIPS:
                wrapped = RecordGradients(build_model(config.model, 0).train())
                load_flat(wrapped._module, server.weights)
                sgd = torch.optim.SGD(wrapped.parameters(), lr=1.0)
                optimizer = Norms(sgd, clip=clip, multiplier=1.0, batch=1, noise=NoiseSource.fresh())
                optimizer.seen = []
                accumulate(wrapped, optimizer, everything, everything.usable(range(len(everything))), 128)
                total = torch.cat([p.summed_grad.flatten() for p in optimizer.params]).numpy()
                start, found = 0, {}
                for segment in segments:
                    part = total[start : start + segment.size]
                    start += segment.size
                    present = share[segment.modality] if segment.modality else 1.0
                    found[segment.name] = float(np.linalg.norm(part)) / (clip * len(records) * present)
                norms = torch.cat(optimizer.seen).numpy()
                row[f"clip {clip:g}"] = found
                row["norms"] = [float(x) for x in np.quantile(norms, (0.1, 0.5, 0.9))]
            print(json.dumps(row), flush=True)
            keep(row)
            updates = [
                train_round(
                    model,
                    data,
                    privacy=round_privacy(config.privacy),
                    training=config.training,
                    noise=NoiseSource.fresh(),
                    microbatch=128,
                )
                for data in tensors.values()
            ]
            server.apply(np.mean(updates, axis=0).astype(np.float32), config.aggregation)


def planned_rate(epsilon, rounds, q, clip, batch):
    from fedfuse_shared.privacy.calibration import noise_multiplier

    sigma = noise_multiplier(epsilon, 1e-5, q, rounds)
    one = sigma * clip * rounds**0.5 / (batch * 6**0.5) * 2 * 10**0.5
    return min(4.0 / clip, 1.0 / one) / min(1.0, 2.0 / sigma)


def keep(row: dict[str, object]) -> None:
    """Append a row to the results."""
    RESULTS.parent.mkdir(exist_ok=True)
    with RESULTS.open("a") as file:
        file.write(json.dumps(row) + "\n")


def known() -> list[dict[str, object]]:
    """Return the rows kept so far."""
    return [json.loads(line) for line in RESULTS.read_text().splitlines()] if RESULTS.exists() else []


def validate(seeds: int) -> None:
    """Run what is missing of the settings; the public divisor goes with q, so that a record's step stays as long."""
    done = {
        (r["epsilon"], r["rounds"], r["q"], r["clip"], r["seed"]) for r in known() if r["kind"] == "planned"
    }
    fedfuse = Path(sys.executable).with_name("fedfuse")
    with tempfile.TemporaryDirectory() as place:
        data = validation_folder(Path(place) / "digits")
        for seed in range(seeds):
            for number, (epsilon, rounds, q, clip) in enumerate(SETTINGS):
                if (epsilon, rounds, q, clip, seed) in done:
                    continue
                batch = max(1, round(256 * q))
                privacy = {"sampling_rate": q, "expected_batch_size": batch, "clip": clip}
                rate = planned_rate(epsilon, rounds, q, clip, batch)
                training = {"learning_rate": rate}
                file = Path(place) / "settings.toml"
                file.write_text(tomli_w.dumps({"privacy": privacy, "training": training}))
                out = Path(place) / f"{seed}-{number}"
                command = ["simulate", "--data", str(data), "--config", str(file), "--epsilon", str(epsilon)]
                command += ["--rounds", str(rounds), "--seed", str(seed), "--json", "--out", str(out)]
                ended = subprocess.run([str(fedfuse), *command], capture_output=True, text=True, check=False)
                if ended.returncode:
                    sys.exit(ended.stderr)
                found = json.loads(ended.stdout)
                row = {
                    "kind": "planned",
                    "learning_rate": rate,
                    "epsilon": epsilon,
                    "rounds": rounds,
                    "q": q,
                    "clip": clip,
                    "seed": seed,
                    "batch": batch,
                    "accuracy": found["accuracy"],
                    "complete": found["accuracy_complete"],
                    "subsets": found["subsets"],
                    "seconds": found["seconds"],
                }
                keep(row)
                print(json.dumps(row), flush=True)


if __name__ == "__main__":
    {"measure": measure, "validate": lambda: validate(int(sys.argv[2]) if len(sys.argv) > 2 else 1)}[
        sys.argv[1]
    ]()
