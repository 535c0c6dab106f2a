"""A plan's findings as tables for people and as one object for programs."""

from __future__ import annotations

from typing import Any, Final

from rich.console import Console
from rich.table import Table

from fedfuse_shared.privacy.planning import (
    NOISE_OF_A_LOGIT,
    TOLERANCE,
    Forecast,
    noise_of_site,
    noise_of_sum,
)
from fedfuse_simulations.plan_forecast import Choice, Found

ROWS: Final = 12
"""Alternatives that are printed; --json has them all."""
DROWNS: Final = 1.0
"""Signal over noise that a record feels over all steps, below which a modality is taken to drown."""


def drowning(forecast: Forecast) -> list[str]:
    """Return the modalities whose signal is smaller than the noise over a whole schedule."""
    return [p.part.name for p in forecast.parts if forecast.total(p) < DROWNS]


def as_json(found: Found) -> dict[str, Any]:
    """Return everything a plan says as plain values."""
    privacy = found.config.privacy
    return {
        "adjacency": "add-or-remove-one-record",
        "unit": "one record of one site",
        "against": "everybody",
        "trust": privacy.trust.value,
        "epsilon": privacy.epsilon,
        "delta": privacy.delta,
        "sites": found.holding.sites,
        "sites_per_round": found.people.sites,
        "records": list(found.holding.records),
        "classes": len(found.config.model.classes),
        "epsilon_pld": found.epsilon_pld,
        "epsilon_rdp": found.epsilon_rdp,
        "bytes_up": found.bytes_up,
        "given": _choice_json(found, found.given),
        "given_logit_noise": found.given_logit_noise,
        "best": _choice_json(found, found.best),
        "alternatives": [_choice_json(found, choice) for choice in found.choices],
        "refused": found.refused,
        "assumptions": {
            "gradient_norm": found.people.gradient_norm,
            "feature_norm": found.people.feature_norm,
            "logit_noise": NOISE_OF_A_LOGIT,
            "tolerance": TOLERANCE,
            "parts": {
                part.name: {"cosine": part.cosine, "clip_share": part.clip_share, "record_share": part.share}
                for part in found.people.parts
            },
            "unmeasured": list(found.unmeasured),
        },
    }


def _choice_json(found: Found, choice: Choice) -> dict[str, Any]:
    forecast, schedule = choice.found, choice.found.schedule
    return {
        "rounds": schedule.rounds,
        "steps_per_round": schedule.steps_per_round,
        "sampling_rate": schedule.sampling_rate,
        "expected_batch_size": schedule.expected_batch_size,
        "clip": schedule.clip,
        "learning_rate": choice.learning_rate,
        "noise_multiplier": forecast.sigma,
        "noise_of_site": noise_of_site(forecast.sigma, schedule.clip),
        "noise_of_sum": noise_of_sum(forecast.sigma, schedule.clip, found.people.sites),
        "felt_per_step": forecast.felt,
        "budget": forecast.budget,
        "bytes_up_all_rounds": found.bytes_up * schedule.rounds,
        "drawn_all_steps": found.people.records * schedule.sampling_rate * schedule.steps,
        "drowns": drowning(forecast),
        "modalities": {
            p.part.name: {
                "coordinates": p.part.size,
                "signal": p.signal,
                "noise": p.noise,
                "ratio_per_step": p.ratio,
                "felt_per_step": p.felt,
                "felt": forecast.total(p),
            }
            for p in forecast.parts
        },
    }


def print_plan(found: Found) -> None:
    """Print a plan: the guarantee, the noise, the modalities, the alternatives, and what to make of them."""
    console = Console(highlight=False)
    _print_guarantee(console, found)
    console.print(_modality_table(found))
    _print_warnings(console, found)
    console.print(_alternative_table(found))
    _print_advice(console, found)
    _print_assumptions(console, found)


def _print_guarantee(console: Console, found: Found) -> None:
    privacy, schedule, sigma = found.config.privacy, found.given.found.schedule, found.given.found.sigma
    records = found.holding.records
    low, high = min(records), max(records)
    size = f"{low}" if low == high else f"{low} to {high}"
    console.print(
        f"[bold]{found.holding.sites} sites of {size} training records, {schedule.rounds} rounds: "
        f"noise multiplier {sigma:g} for epsilon {privacy.epsilon:g}[/bold]"
    )
    if found.holding.dataset is not None:
        console.print(
            "Counted in the manifest, exactly: this is for whoever holds the data. Nothing of it left this machine; "
            "settings copied from here into an offer tell others as much as was read off it.",
            style="yellow",
        )
    console.print(
        f"Epsilon {found.epsilon_pld:.4g} (PLD, the number enforced), {found.epsilon_rdp:.4g} (Renyi), at delta "
        f"{privacy.delta:g}: per record of each site, adding or removing one record, over all "
        f"{schedule.steps} steps, against everybody (trust = site): the server, other sites, readers of the model."
    )
    if found.pinned:
        console.print("The settings' own noise_multiplier was left out: a plan chooses it.", style="yellow")
    site, total = noise_of_site(sigma, schedule.clip), noise_of_sum(sigma, schedule.clip, found.people.sites)
    console.print(
        f"Noise on every coordinate: {site:.3g} from each site, {total:.3g} in the sum of {found.people.sites}; "
        f"clip {schedule.clip:g}, sampling rate {schedule.sampling_rate:g}.\n"
    )


def _modality_table(found: Found) -> Table:
    forecast = found.given.found
    table = Table(title="Summed update of one step, this schedule", title_justify="left")
    for heading in ("modality", "coordinates", "signal", "noise", "ratio", "felt", "felt, total"):
        table.add_column(heading, justify="left" if heading == "modality" else "right")
    for p in forecast.parts:
        total = forecast.total(p)
        figures = (p.signal, p.noise, p.ratio, p.felt)
        shown = f"{total:.2f}" if total >= DROWNS else f"[bold red]{total:.2f}[/]"
        table.add_row(p.part.name, f"{p.part.size:,}", *(f"{x:.3g}" for x in figures), shown)
    table.caption = "signal, noise: norms; felt: signal over noise along one record's own gradient"
    table.caption_justify = "left"
    return table


def _print_warnings(console: Console, found: Found) -> None:
    names = drowning(found.given.found)
    for name in names:
        console.print(
            f"{name} drowns: over all steps a record feels less of its signal than of its noise. Leave it out (name "
            f"only the others under model.encoders) or weigh it down (model.encoders.{name}.weight).",
            style="bold red",
        )
    if names and len(names) == len(found.given.found.parts):
        console.print("Nothing is learned: more records or sites, or a larger epsilon.", style="bold red")


def _alternative_table(found: Found) -> Table:
    table = Table(
        title=f"\nThe same epsilon {found.config.privacy.epsilon:g}, best first", title_justify="left"
    )
    for heading in ("", "rounds", "q", "batch", "clip", "rate", "sigma", "felt", "total", "MB up"):
        table.add_column(heading, justify="right")
    for choice in _shown(found):
        forecast, schedule = choice.found, choice.found.schedule
        table.add_row(
            _mark(found, choice),
            str(schedule.rounds),
            f"{schedule.sampling_rate:g}",
            str(schedule.expected_batch_size),
            f"{schedule.clip:g}",
            "-" if choice.learning_rate is None else f"{choice.learning_rate:.3g}",
            f"{forecast.sigma:.4g}",
            f"{forecast.felt:.3g}",
            f"{forecast.budget:.3g}",
            f"{found.bytes_up * schedule.rounds / 1e6:.2f}",
            style="bold" if choice is found.best else None,
        )
    table.caption = (
        "q: sampling rate; rate: training.learning_rate that belongs to it; felt, total: signal over noise for a "
        "complete record, in one step and over all; MB up: masked vectors of one site, all rounds\n"
        "* recommended  > as asked"
    )
    table.caption_justify = "left"
    return table


def _mark(found: Found, choice: Choice) -> str:
    return ("*" if choice is found.best else "") + (">" if choice is found.given else "")


def _shown(found: Found) -> list[Choice]:
    """Return the rows to print: of schedules that differ in the clip alone the best, then the given and the best."""
    firsts: dict[tuple[int, float], Choice] = {}
    for choice in found.choices:
        firsts.setdefault((choice.found.schedule.rounds, choice.found.schedule.sampling_rate), choice)
    kept = list(firsts.values())[:ROWS]
    return [c for c in found.choices if c in kept or c is found.given or c is found.best]


def _print_advice(console: Console, found: Found) -> None:
    best, given = found.best, found.given
    schedule, top = best.found.schedule, found.choices[0].found.budget
    if best is given:
        console.print(
            "[bold]Keep the schedule.[/bold] No shorter one has about the best total and trains as far."
        )
    else:
        gain = best.found.budget / given.found.budget - 1
        console.print(
            f"[bold]Recommended: {schedule.rounds} rounds, q {schedule.sampling_rate:g}, batch "
            f"{schedule.expected_batch_size}, clip {schedule.clip:g}.[/bold] Fewest rounds within {TOLERANCE:.0%} of "
            f"the best total ({best.found.budget:.3g} of {top:.3g}) that train as far; {gain:+.1%} against the "
            f"schedule asked for, {found.bytes_up * schedule.rounds / 1e6:.2f} instead of "
            f"{found.bytes_up * given.found.schedule.rounds / 1e6:.2f} MB up."
        )
        console.print(_settings_text(found, best), markup=False)
    console.print(_clip_text(found))
    console.print(_cost_text(found))
    if found.refused:
        console.print(f"{found.refused} alternatives were left out: the ring cannot carry their updates.")


def _settings_text(found: Found, best: Choice) -> str:
    schedule = best.found.schedule
    lines = [
        f"  rounds = {schedule.rounds}",
        "  [privacy]",
        f"  epsilon = {found.config.privacy.epsilon:g}",
        f"  sampling_rate = {schedule.sampling_rate:g}",
        f"  expected_batch_size = {schedule.expected_batch_size}",
        f"  clip = {schedule.clip:g}",
    ]
    if best.learning_rate is not None:
        lines += ["  [training]", f"  learning_rate = {best.learning_rate:g}"]
    return "\n".join(lines)


def _clip_text(found: Found) -> str:
    clip, norm = found.config.privacy.clip, found.people.gradient_norm
    if clip > norm:
        return f"Clip {clip:g} is above a gradient's norm, about {norm:.2g}: it adds noise and no signal."
    return f"Any clip up to a gradient's norm, about {norm:.2g}, leaves the same total; more only adds noise."


def _cost_text(found: Found) -> str:
    schedule = found.given.found.schedule
    drawn = found.people.records * schedule.sampling_rate * schedule.steps_per_round
    return (
        f"A round as asked: {found.bytes_up:,} bytes of masked vector up from each site, {drawn:,.0f} gradients "
        "there on average."
    )


def _print_assumptions(console: Console, found: Found) -> None:
    cosines = ", ".join(f"{part.name} {part.cosine:.2g}" for part in found.people.parts)
    logit = found.given_logit_noise
    console.print(
        "\nAssumed, not measured on these records (that would spend privacy): a record's gradient and the mean one "
        f"have the cosine {cosines} (from digits; --alignment scales it); a gradient's norm before clipping is "
        f"{found.people.gradient_norm:.2g}; neither changes while the model learns; classes are balanced. The plan "
        "compares schedules and promises no accuracy."
    )
    if logit is None:
        console.print("No learning rate is predicted for an adaptive server optimiser.")
    else:
        console.print(
            f"Rates let the whole noise move one logit by {NOISE_OF_A_LOGIT:g} at most; the learning rate of these "
            f"settings lets it move by {logit:.2g}."
        )
    for name in found.unmeasured:
        console.print(f"Encoder {name} was not measured: its cosine is a guess.", style="yellow")
