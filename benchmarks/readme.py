"""Puts the stored figures of the benchmarks into the README, between its two result marks.

    python benchmarks/leaderboard.py && python benchmarks/throughput.py && python benchmarks/fidelity.py
    python benchmarks/start_up.py && python benchmarks/readme.py

What the README says was therefore printed and stored by a command; a test compares the two.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from benchmarks import fabrication, hypotheses, spectrum_search
from benchmarks.leaderboard import markdown

HERE = Path(__file__).resolve().parent
README = HERE.parent / "README.md"
BEGIN, END = "<!-- results -->\n", "<!-- end -->"
_FEW = 0.8  # of the 90 % intervals


def main() -> None:
    """Write the README."""
    text = README.read_text()
    README.write_text(with_results(text, results()))
    print(f"{README}: {', '.join(sorted(results())) or 'no stored results'}")


def results() -> dict[str, Any]:
    """Stored results by benchmark."""
    return {
        name: json.loads((HERE / "results" / f"{name}.json").read_text())
        for name in _SECTIONS
        if (HERE / "results" / f"{name}.json").exists()
    }


def with_results(text: str, stored: Mapping[str, Any]) -> str:
    """The README's text with the sections of what is stored."""
    before, _, rest = text.partition(BEGIN)
    after = rest.partition(END)[2]
    sections = "\n\n".join(_SECTIONS[name](stored[name]) for name in _SECTIONS if name in stored)
    return f"{before}{BEGIN}{sections}\n{END}{after}"


def _leaderboard(stored: Mapping[str, Any]) -> str:
    episodes = max(row["episodes"] for row in stored["summary"])
    return (
        f"Agents in the same {episodes} worlds of each id (`python benchmarks/leaderboard.py`; mean ± standard "
        f"error; seconds are microscope time):\n\n{markdown(stored)}"
    )


def _throughput(stored: Mapping[str, Any]) -> str:
    machine = stored["machine"]
    lines = [
        f"Speed on one core of {machine['cpu']} (`python benchmarks/throughput.py`; random actions, AtomTargeting-v0 "
        "where no other is named, CPU time, the fastest of fifteen parts):",
        "",
        "| what | steps a second |",
        "|---|---|",
    ]
    lines += [_speed_line(entry, "core") for entry in stored["ours"]]
    lines += [_speed_line(entry, "core") for entry in stored.get("beside", [])]
    lines += [_speed_line(entry, "core", ' `instrument={"compiled": True}`,') for entry in stored.get("compiled", [])]
    lines += [_speed_line(entry, machine["gpu"]) for entry in stored.get("gpu", [])]
    lines += [f"| {entry['name']} | {entry['steps_per_s']:,.0f} |" for entry in stored["others"]]
    kept = stored["memory"]
    lines += [
        "",
        f"Peak memory: {kept['after_a_tenth_mib']:,.0f} MiB after {kept['steps'] / 10:,.0f} steps, "
        f"{kept['at_the_end_mib']:,.0f} MiB after {kept['steps']:,.0f}.",
    ]
    if long := stored.get("search"):
        held = [f"{long[key]:,.0f} MiB" for key in ("after_a_tenth_mib", "at_the_end_mib")]
        lines[-1] += (
            f" A specimen of SpectrumSearch-v0 takes {long['specimen_ms']:.1f} ms; a search of {long['points']:,.0f} "
            f"points holds {held[0]} after a tenth of them and {held[1]} at its end."
        )
    return "\n".join(lines)


def _speed_line(entry: Mapping[str, Any], where: str, how: str = "") -> str:
    parts = ", ".join(f"{name} {share:.0%}" for name, share in entry["share_of_time"].items() if share >= 0.005)
    rows = f"{entry['rows']:,} row" + ("s" if entry["rows"] > 1 else "")
    place = "" if where == "core" else f" on {where}"
    name = entry.get("id", "").removeprefix("stem_gym/")
    which = "" if name in ("", "AtomTargeting-v0") else f" {name},"
    return f"| **stem_gym**,{which}{how} {rows}{place} ({parts}) | {entry['steps_per_s']:,.0f} |"


def _fabrication(stored: Mapping[str, Any]) -> str:
    return f"Agents that move atoms (`python benchmarks/fabrication.py`):\n\n{fabrication.markdown(stored)}"


def _start_up(stored: Mapping[str, Any]) -> str:
    parts = [f"{name} {spent['wall_s']:.2f} s" for name, spent in stored["seconds"].items()]
    return f"Start-up (`python benchmarks/start_up.py`, median of fresh processes): {', '.join(parts)}."


def _fidelity(stored: Mapping[str, Any]) -> str:
    lines = [
        "Expected images against abTEM multislice with frozen phonons, on specimens held out from training "
        "(`python benchmarks/fidelity.py`):",
        "",
        "| held-out specimens | R² physics | R² sum over atoms | R² surrogate | inside the 90 % interval |",
        "|---|---|---|---|---|",
    ]
    for name, row in stored["summary"].items():
        figures = (row[f"r2_{model}"] for model in ("physics", "sum_over_atoms", "surrogate"))
        lines.append(f"| {name} | {' | '.join(f'{r2:.5f}' for r2 in figures)} | {row['coverage_90']:.1%} |")
    ratios = [entry["ratio"] for entry in stored["speed"] if "ratio" in entry]
    if ratios:
        lines += [
            "",
            f"The surrogate is {min(ratios):,.0f} to {max(ratios):,.0f} times faster than abTEM on the same pictures, "
            "one core each; abTEM was timed on a share of the places and phonon configurations of a picture and scaled "
            "up.",
        ]
    return "\n".join(lines)


def _spectrum_search(stored: Mapping[str, Any]) -> str:
    counts = [row["episodes"] for row in stored["rows"]]
    return (
        f"Agents that search for spectra, {min(counts)} episodes each, {max(counts)} of `uniform` "
        "(`python benchmarks/spectrum_search.py`): how many "
        "measurements took the best so far to a share of the noise-free map's range, median with its 95 % interval; "
        "what was found at the end; what the agent predicts of the map at the last look (they are after 20, 40 and 60 "
        "measurements, of `edges` after 20 and 40); and how many of its 90 % intervals hold, the least and the most of "
        "all looks, and over the brightest tenth at the last one. `v0` is "
        "SpectrumSearch-v0 on unseen worlds. The others are measured: the Cu-L and Zn-L edges of an oxide on carbon "
        "nanotubes by EELS (I. Hjorth 2017, hyperspy/exspy-demos), and Pt-L of Fe–Pt particles by EDS (Rossouw et al., "
        "Nano Lett. 2015). There `ppo` is the policy that was trained on v0, taken over as it is.\n\n"
        f"{spectrum_search.markdown(stored)}\n\n"
        "Where all places above a level are wanted (`flakes`, `xrays`: which share of them was found), or the map "
        "itself (`edges`: also as the measured values alone tell it):\n\n"
        f"{spectrum_search.markdown_of_maps(stored)}\n\n"
        "On `xrays` an agent also chooses how long it measures: `uniform` draws one of three times evenly, the others "
        "take the middle one, so it spends more time and electrons on as many measurements. Thinking is wall time a "
        "measurement, of an episode among others side by side; agents were timed in runs of their own, so that only "
        f"large differences between them tell. {_few_bright(stored)}\n\n{_ppo_and_dkl(stored)}"
    )


def _few_bright(stored: Mapping[str, Any]) -> str:
    """Whose intervals do not hold where most is expected, though they may hold over the whole map."""
    told = []
    for row in stored["rows"]:
        last = list(row["map"].values())[-1:]
        told += [
            f"`{row['agent']}` on {row['field']} ({look['covered_bright'][0]:.0%})"
            for look in last
            if look["covered_bright"][0] < _FEW
        ]
    return (
        f"Intervals that hold over a map need not hold over its brightest tenth: less than {_FEW:.0%} of them do for "
        f"{', '.join(told) or 'none of these'}."
    )


def _ppo_and_dkl(stored: Mapping[str, Any]) -> str:
    """Where the trained policy needs fewer measurements than the model, and where more."""
    rows = {(row["field"], row["agent"]): row for row in stored["rows"]}
    fewer: list[str] = []
    more: list[str] = []
    for name in dict.fromkeys(field for field, agent in rows if agent == "ppo"):
        for share in (90, 99):
            ppo, dkl = (rows[name, agent][f"to_{share}"]["median"] for agent in ("ppo", "dkl"))
            told = f"{name} to {share} % ({ppo:.0f} against {dkl:.0f})"
            if ppo != dkl:
                (fewer if ppo < dkl else more).append(told)
    return (
        f"`ppo`, which learned from simulated fields alone, needs fewer measurements than `dkl` on "
        f"{', '.join(fewer) or 'none of these'}, and more on {', '.join(more) or 'none of these'}."
    )


def _surrogate_fits(stored: Mapping[str, Any]) -> str:
    lines = ["| measured | decision | fresh fit | BoTorch SingleTaskGP | GPyTorch deep kernel |", "|---" * 5 + "|"]
    for count, row in stored["one_field"].items():
        cells = (row[key] for key in ("decision_s", "fresh_fit_s", "botorch_single_task_s", "gpytorch_deep_kernel_s"))
        lines.append(f"| {count} | {' | '.join(f'{cell:.2f} s' for cell in cells)} |")
    many = stored["whole_episodes"]
    ratio, seconds = many["ratio"], f"{many['together_s']:.1f} s side by side and {many['one_by_one_s']:.1f} s"
    told = "\n".join(lines)
    return (
        "What a decision of `dkl` costs on one core, with 4,096 candidates (`python benchmarks/surrogate_fits.py`):"
        f"\n\n{told}\n\n"
        f"{many['episodes']} whole episodes of {many['measurements']} measurements take {seconds} one after the other "
        f"({many['one_by_one_timed']} of them were timed and scaled up): {ratio:.1f} times as long. A single decision "
        f"gains {_ratios(stored['side_by_side'])} measured."
    )


def _ratios(side_by_side: Mapping[str, Any]) -> str:
    return ", ".join(f"{row['ratio']:.1f} times at {count}" for count, row in side_by_side.items())


def _hypotheses(stored: Mapping[str, Any]) -> str:
    return (
        "Agents that tell laws apart (`python benchmarks/hypotheses.py`; mean ± standard error; a referee of 4,096 "
        "particles a law; `random_designs` is chance with the same belief, `uniform` declares at random): the median "
        "number of experiments to a right claim of at least 95 %, with its 95 % interval, where an episode without "
        "one counts as the longest; how many episodes end in a claim, and how many claims are right; the share of "
        "right answers at the end; that share less half a point for the whole of the time; and by how much the best "
        f"of {', '.join(f'`{rule}`' for rule in hypotheses.SIMPLE_RULES)}, where it was run, earns more (regret).\n\n"
        f"{hypotheses.markdown(stored)}\n\n{_ppo_and_others(stored)}"
    )


def _ppo_and_others(stored: Mapping[str, Any]) -> str:
    """Where the trained policy earns more than the rules beside it, and where not."""
    score = {(row["level"], row["agent"]): row["score"] for row in stored["summary"]}
    levels = [level for level, agent in score if agent == "ppo"]
    sentences = []
    for agent in ("eig_per_cost", "tuning_rules"):
        ahead: list[str] = []
        behind: list[str] = []
        for level in levels:
            same = hypotheses.same_worlds(level)
            if (same, agent) in score:
                ppo, other = score[level, "ppo"], score[same, agent]
                (ahead if ppo > other else behind).append(f"{level} ({ppo:.2f} against {other:.2f})")
        sentences.append(
            f"more than `{agent}` on {', '.join(ahead) or 'no level'}, and less on {', '.join(behind) or 'none'}"
        )
    return f"In score with costs the trained `ppo` earns {'; it earns '.join(sentences)}."


_SECTIONS: dict[str, Callable[[Mapping[str, Any]], str]] = {
    "leaderboard": _leaderboard,
    "fabrication": _fabrication,
    "spectrum_search": _spectrum_search,
    "surrogate_fits": _surrogate_fits,
    "hypotheses": _hypotheses,
    "throughput": _throughput,
    "fidelity": _fidelity,
    "start_up": _start_up,
}

if __name__ == "__main__":
    main()
