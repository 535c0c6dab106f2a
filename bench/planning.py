"""How well `fedfuse plan` predicts: its assumptions measured, and its ranking against whole simulated runs.

    .venv/bin/python bench/planning.py measure digits    cosines over the first rounds of training; or stamps
    .venv/bin/python bench/planning.py validate          runs of `fedfuse simulate`; a minute or two each
    .venv/bin/python bench/planning.py leave-out         the same schedule without the modality that drowns
    .venv/bin/python bench/planning.py table             prediction beside outcome, rank correlation

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
DATA = Path(os.environ.get("FEDFUSE_DATA", HERE.parents[1] / "shared" / "data"))
ROUNDS_MEASURED = 10
CLIPS = (0.25, 0.5, 1.0, 2.0, 4.0)
SETTINGS = (
    # epsilon, rounds, sampling rate, clip
    (1.0, 5, 1.0, 1.0),
    (1.0, 2, 1.0, 1.0),
    (3.0, 2, 1.0, 1.0),
    (1.0, 10, 1.0, 1.0),
    (1.0, 40, 0.5, 1.0),
    (1.0, 10, 0.1, 1.0),
    (1.0, 40, 0.5, 4.0),
    (1.0, 40, 0.1, 1.0),
    (1.0, 10, 0.5, 1.0),
    (3.0, 10, 0.1, 1.0),
    (3.0, 40, 0.1, 1.0),
    (3.0, 40, 0.5, 1.0),
    (3.0, 10, 1.0, 1.0),
    (8.0, 40, 0.5, 1.0),
    (1.0, 160, 0.1, 1.0),
    (1.0, 160, 0.5, 1.0),
)


def validation_folder(name: str, folder: Path) -> Path:
    """Write a data folder of the training rows, every fifth of a site and class held out as its test rows."""
    with (DATA / name / "manifest.csv").open(newline="", encoding="utf-8") as file:
        rows = [row for row in csv.DictReader(file) if row["split"] == "train"]
    seen: Counter[tuple[str, str, bool, bool, bool]] = Counter()
    for row in rows:
        kind = (row["site"], row["label"], *(bool(row[m]) for m in ("text", "image", "audio")))
        row["split"] = "test" if seen[kind] % 5 == 4 else "train"
        seen[kind] += 1
    folder.mkdir(parents=True)
    (folder / "dataset.toml").write_bytes((DATA / name / "dataset.toml").read_bytes())
    for kind in ("images", "audio"):  # links would lead out of the folder, which is refused
        subprocess.run(["cp", "-r", str(DATA / name / kind), str(folder / kind)], check=True)
    with (folder / "manifest.csv").open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, rows[0].keys())
        writer.writeheader()
        writer.writerows(rows)
    return folder


def measure(name: str) -> None:
    """Print, per modality, the cosine between a record's clipped gradient and the mean over complete rows.

    The rows are all training rows that have every modality; between two looks the model goes through a real round.
    """
    import numpy as np
    import torch

    from fedfuse_client.data.manifest import load_dataset
    from fedfuse_client.data.tensors import RecordTensors
    from fedfuse_client.gradient_choice import choice_for
    from fedfuse_client.training import PrivateOptimizer, accumulate, train_round
    from fedfuse_server.optimiser import GlobalModel
    from fedfuse_server.plan import resolve, round_privacy
    from fedfuse_shared.models import build_model, flatten, layout, load_flat
    from fedfuse_shared.privacy.noise import NoiseSource
    from fedfuse_simulations.plan_population import Holding, population
    from fedfuse_simulations.settings import complete

    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as place:
        dataset = load_dataset(validation_folder(name, Path(place) / name))
        config = resolve(complete({"privacy": {"epsilon": 3.0}}, dataset.info))
        records = dataset.select(split="train")
        whole = [r for r in records if all(getattr(r, m.value) is not None for m in dataset.info.modalities)]
        everything = RecordTensors(dataset.folder, whole, config.model)
        sites = [
            RecordTensors(dataset.folder, dataset.select(s, "train"), config.model) for s in dataset.sites()
        ]
        model = build_model(config.model, 0)
        server, segments = GlobalModel(flatten(model)), layout(model)
        parts = population(Holding(len(sites), (1,), {}), config, len(sites)).parts
        share = {part.name: part.clip_share for part in parts}
        for number in range(ROUNDS_MEASURED):
            load_flat(model, server.weights)
            row: dict[str, object] = {"kind": "cosine", "data": name, "round": number + 1}
            for clip in (1.0, 4.0):
                trained = build_model(config.model, 0).train()
                load_flat(trained, server.weights)
                choice = choice_for(trained, 128, "layers")
                sgd = torch.optim.SGD(trained.parameters(), lr=1.0)
                optimizer = PrivateOptimizer(
                    sgd, clip=clip, multiplier=1.0, batch=1, noise=NoiseSource.fresh()
                )
                rows = everything.usable(range(len(everything)))
                accumulate(choice.mode(trained), optimizer, everything, rows, 128, choice.shapes)
                total = torch.cat([p.summed_grad.flatten() for p in optimizer.params]).numpy()
                start, found = 0, {}
                for segment in segments:
                    part, start = total[start : start + segment.size], start + segment.size
                    if segment.modality is not None:
                        norm = float(np.linalg.norm(part)) / (clip * len(whole))
                        found[segment.modality.value] = norm / share[segment.modality.value]
                row["cosine" if clip == 1 else "of clip 4"] = found
            keep(row)
            print(json.dumps(row), flush=True)
            updates = [
                train_round(
                    model,
                    data,
                    privacy=round_privacy(config, len(sites)),
                    training=config.training,
                    noise=NoiseSource.fresh(),
                    microbatch=128,
                )
                for data in sites
            ]
            server.apply(np.mean(updates, axis=0).astype(np.float32), config.aggregation)


def planned(epsilon: float, rounds: int, q: float, clip: float) -> dict[str, float]:
    """Return what `fedfuse plan` says of a schedule: its learning rate, divisor, and predicted signal."""
    from fedfuse_server.plan import cohort
    from fedfuse_shared.config.base import Modality
    from fedfuse_shared.privacy.calibration import noise_multiplier
    from fedfuse_shared.privacy.planning import Schedule, forecast
    from fedfuse_simulations.plan_forecast import logit_noise, planned_rate
    from fedfuse_simulations.plan_population import Holding, population
    from fedfuse_simulations.settings import complete

    shares = {Modality.TEXT: 0.75, Modality.IMAGE: 0.875, Modality.AUDIO: 0.625}
    config = complete({"privacy": {"epsilon": epsilon}}, None)
    names = tuple(map(str, range(10)))
    config = config.model_copy(update={"model": config.model.model_copy(update={"classes": names})})
    people = population(Holding(6, (512,), shares), config, cohort(config, 6))
    schedule = Schedule(rounds, 1, q, max(1, round(256 * q)), clip)
    found = forecast(schedule, noise_multiplier(epsilon, 1e-5, q, rounds), people)
    rate = planned_rate(config, people, found)
    assert rate is not None
    text = found.total(found.parts[0])
    travel = found.budget * (logit_noise(config, people, found, rate) or 0.0)
    return {
        "learning_rate": rate,
        "batch": schedule.expected_batch_size,
        "signal": found.budget,
        "text": text,
        "travel": travel,
    }


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
        data = validation_folder("digits", Path(place) / "digits")
        for seed in range(seeds):
            for number, (epsilon, rounds, q, clip) in enumerate(SETTINGS):
                if (epsilon, rounds, q, clip, seed) in done:
                    continue
                said = planned(epsilon, rounds, q, clip)
                batch, rate = int(said["batch"]), said["learning_rate"]
                privacy = {"sampling_rate": q, "expected_batch_size": batch, "clip": clip}
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


def leave_out(seeds: int) -> None:
    """Run the default schedule at epsilon 1 with text and without it, which is predicted to drown."""
    fedfuse = Path(sys.executable).with_name("fedfuse")
    encoders = {"image": {"name": "oriented-gradients"}, "audio": {"name": "spectral-shape"}}
    with tempfile.TemporaryDirectory() as place:
        data = validation_folder("digits", Path(place) / "digits")
        file = Path(place) / "settings.toml"
        file.write_text(tomli_w.dumps({"model": {"encoders": encoders}}))
        for seed in range(seeds):
            for name, more in (("with", []), ("without", ["--config", str(file)])):
                command = ["simulate", "--data", str(data), *more, "--epsilon", "1", "--seed", str(seed)]
                command += ["--json", "--out", str(Path(place) / f"{name}-{seed}")]
                ended = subprocess.run([str(fedfuse), *command], capture_output=True, text=True, check=False)
                if ended.returncode:
                    sys.exit(ended.stderr)
                found = json.loads(ended.stdout)
                row = {"kind": f"{name} text", "epsilon": 1.0, "seed": seed, "accuracy": found["accuracy"]}
                row["image_audio"] = found["subsets"]["image+audio" if name == "with" else "all"]
                row["complete"] = found["accuracy_complete"]
                keep(row)
                print(json.dumps(row), flush=True)


def table() -> None:
    """Print each planned run beside its prediction, and the rank correlation over settings at one epsilon."""
    from scipy.stats import spearmanr

    from fedfuse_shared.privacy.planning import NOISE_OF_A_LOGIT

    rows = [r for r in known() if r["kind"] == "planned"]
    for epsilon in sorted({r["epsilon"] for r in rows}):
        chosen: dict[tuple[int, float, float], list[dict[str, object]]] = {}
        for r in rows:
            if r["epsilon"] == epsilon:
                chosen.setdefault((r["rounds"], r["q"], r["clip"]), []).append(r)
        found = []
        for (rounds, q, clip), runs in chosen.items():
            said = planned(epsilon, rounds, q, clip)
            accuracy = sum(float(str(r["accuracy"])) for r in runs) / len(runs)
            text = sum(float(str(r["subsets"]["text"])) for r in runs) / len(runs)
            figures = (
                said["signal"],
                accuracy,
                rounds,
                q,
                clip,
                len(runs),
                said["text"],
                text,
                said["travel"],
            )
            found.append(figures)
        names = (
            "rounds",
            "q",
            "clip",
            "runs",
            "signal",
            "travel",
            "accuracy",
            "text signal",
            "text accuracy",
        )
        print(f"\nepsilon {epsilon:g}: " + ", ".join(names))
        for signal, accuracy, rounds, q, clip, seeds, felt, text, travel in sorted(found, reverse=True):
            print(
                f"{rounds:3d} {q:<4g} {clip:<4g} {seeds} {signal:6.2f} {travel:5.2f} {accuracy:.3f} "
                f"{felt:5.2f} {text:.3f}"
            )
        # A schedule whose step is at its largest trains less far; the signal alone does not know (see `recommended`).
        far = [f for f in found if f[8] >= 0.9 * NOISE_OF_A_LOGIT * f[0]]
        for kind, kept in (("all", found), ("whose noise moves a logit as planned", far)):
            if len(kept) > 3:
                rho = spearmanr([f[0] for f in kept], [f[1] for f in kept]).statistic
                print(f"epsilon {epsilon:g}, {kind}: rank correlation {rho:.2f} over {len(kept)} settings")


def main() -> None:
    """Do what the first argument says."""
    what, *rest = sys.argv[1:] or ["table"]
    if what == "measure":
        measure(*rest)
    elif what == "validate":
        validate(int(rest[0]) if rest else 1)
    elif what == "leave-out":
        leave_out(int(rest[0]) if rest else 1)
    else:
        table()


if __name__ == "__main__":
    main()
