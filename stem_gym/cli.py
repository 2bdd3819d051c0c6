"""The `stem-gym` command: list, show, check, train, bench, deploy, search, explain, value, fit-rates,
identify, demo.

Exit codes: 0 done; 1 a check or a demanded figure failed; 2 bad input; 130 stopped by Ctrl-C, 143 by
SIGTERM, what was done is kept.
An error is one message that says what was wrong, what was given and what would be right; `--debug` adds the traceback.
Nothing heavy is imported before a command needs it.

This file is longer than 400 lines because all words of the command line stand in one place.
"""

from __future__ import annotations

import json as jsonlib
import os
import signal
import sys
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import tyro
from rich.console import Console
from rich.markup import escape
from tyro.conf import FlagCreatePairsOff, Positional, UseAppendAction

from stem_gym.core.errors import ConfigError, StemGymError
from stem_gym.jobs.overrides import parse_overrides

OK, FAILED, BAD_INPUT, STOPPED, TERMINATED = 0, 1, 2, 130, 143
Texts = UseAppendAction[tuple[str, ...]]


@dataclass(frozen=True)
class Common:
    """What every command takes."""

    json: bool = False
    """Print JSON on standard output, for scripts."""
    debug: bool = False
    """Show the traceback of an error."""


@dataclass(frozen=True)
class List(Common):
    """List environments, agents, instruments and shipped policies."""

    def run(self, screen: Console) -> int:
        from stem_gym.jobs import catalogue

        if self.json:
            _print_json(catalogue.as_data())
        else:
            for table in catalogue.tables():
                screen.print(table, "")
        catalogue.check_files()  # after the list of those that are well
        return OK


@dataclass(frozen=True)
class Show(Common):
    """Show one environment: manual, spaces, budget and configuration with units."""

    id: Positional[str] = tyro.MISSING
    """Environment id, such as stem_gym/AtomTargeting-v0."""
    set: Texts = ()
    """Change a value of the configuration: KEY.PATH=VALUE, such as budget.steps=50."""

    def run(self, screen: Console) -> int:
        from stem_gym.jobs import catalogue

        described = catalogue.describe(self.id, parse_overrides(self.set))
        if self.json:
            _print_json(described.as_data())
        else:
            for part in described.parts():
                screen.print(part, "")
        return OK


@dataclass(frozen=True)
class Check(Common):
    """Run the conformance checks on one environment, or on all."""

    id: Positional[str | None] = None
    """Environment id; all, if not given."""
    set: Texts = ()
    """Change a value of the configuration: KEY.PATH=VALUE."""

    def run(self, screen: Console) -> int:
        from stem_gym.jobs import check

        with screen.status("checking"):
            findings = check.check(self.id, parse_overrides(self.set), lambda found: _tell_finding(screen, found))
        if self.json:
            _print_json([found.as_data() for found in findings])
        bad = [found for found in findings if found.problem]
        screen.print(f"{len(findings) - len(bad)} of {len(findings)} checks passed.", style="red" if bad else "green")
        return FAILED if bad else OK


@dataclass(frozen=True)
class Train(Common):
    """Train an agent; a run that was stopped or killed goes on with --resume."""

    agent: Positional[str] = tyro.MISSING
    """Agent that learns, such as ppo."""
    id: Positional[str] = tyro.MISSING
    """Environment id."""
    out: Path | None = None
    """Folder for checkpoints, learning curve, TensorBoard and the policy; runs/AGENT/NAME, if not given."""
    resume: bool = False
    """Go on from the last checkpoint in the folder."""
    using: Annotated[Texts, tyro.conf.arg(name="with")] = ()
    """Change a setting of the training: NAME=VALUE, such as steps=200000."""
    set: Texts = ()
    """Change a value of the environment's configuration: KEY.PATH=VALUE."""

    def run(self, screen: Console) -> int:
        from stem_gym.jobs import train

        folder = self.out or Path("runs") / self.agent / self.id.rpartition("/")[2]
        settings, overrides = parse_overrides(self.using), parse_overrides(self.set)
        job = train.Training(self.agent, self.id, folder, self.resume, settings, overrides, quiet=self.json)
        try:
            train.train(job)
        except KeyboardInterrupt:
            return _stopped(screen, train.kept(folder))
        if self.json:
            _print_json({"policy": str(folder), "curve": train.curve_of(folder)})
        else:
            train.tell(screen, folder)
        return OK


@dataclass(frozen=True)
class Bench(Common):
    """Compare agents on environments, in the same worlds; a table on the screen, JSON and CSV in a folder."""

    ids: Positional[tuple[str, ...]] = tyro.MISSING
    """Environment ids."""
    agents: str = "uniform,raster,lock_on"
    """Agents, shipped policies or folders of saved policies, separated by commas."""
    episodes: int = 20
    """Episodes of each agent on each environment."""
    seed: int = 0
    """Seed of the worlds; every agent meets the same ones."""
    out: Path | None = None
    """Folder for bench.json, summary.csv and episodes.csv."""
    require: Texts = ()
    """Fail (exit code 1) unless a mean reaches a number: AGENT.FIGURE>=NUMBER, such as lock_on.success>=0.9."""
    set: Texts = ()
    """Change a value of the configuration: KEY.PATH=VALUE."""

    def run(self, screen: Console) -> int:
        from stem_gym.jobs import bench, outcome
        from stem_gym.jobs.progress import Progress

        agents = [name.strip() for name in self.agents.split(",") if name.strip()]
        demands = [bench.demand_of(text) for text in self.require]
        plan = bench.Plan(self.ids, agents, self.episodes, self.seed, parse_overrides(self.set), demands)
        outcomes: list[outcome.Outcome] = []
        stopped = False
        try:
            with Progress(screen) as progress:
                bench.bench(plan, self.out, progress.episodes, outcomes)
        except KeyboardInterrupt:
            stopped = True
        if self.json:
            _print_json(outcome.document(outcomes, self.seed))
        else:
            for id in dict.fromkeys(found.id for found in outcomes):
                screen.print(outcome.table([found for found in outcomes if found.id == id]), "")
        if self.out is not None and outcomes:
            screen.print(f"Written to {self.out}: bench.json, summary.csv, episodes.csv")
        if stopped:
            finished = sum(found.complete for found in outcomes)
            return _stopped(screen, f"{finished} of {len(self.ids) * len(agents)} comparisons are finished.")
        missed = bench.unmet(outcomes, demands)
        for sentence in missed:
            screen.print(escape(sentence), style="red")
        return FAILED if missed else OK


@dataclass(frozen=True)
class Deploy(Common):
    """Run a saved policy on an instrument and record every instruction and answer."""

    policy: Positional[str] = tyro.MISSING
    """Folder of a saved policy, name of a shipped one (ppo), or an agent that needs no training (lock_on)."""
    id: Positional[str] = tyro.MISSING
    """Environment id."""
    instrument: str = "simulated"
    """Instrument that executes: simulated, nion, …"""
    record: Path | None = None
    """Folder for the recordings, one HDF5 file per episode."""
    episodes: int = 1
    """Episodes to run."""
    seed: int = 0
    """Seed of the worlds, where the instrument is simulated."""
    set: Texts = ()
    """Change a value of the configuration: KEY.PATH=VALUE."""

    def run(self, screen: Console) -> int:
        from stem_gym.jobs import deploy, outcome
        from stem_gym.jobs.progress import Progress

        job = deploy.Deployment(
            self.policy, self.id, self.instrument, self.episodes, self.seed, self.record, parse_overrides(self.set)
        )
        outcomes: list[outcome.Outcome] = []
        stopped = False
        try:
            with Progress(screen) as progress:
                deploy.deploy(job, progress.steps, outcomes)
        except KeyboardInterrupt:
            stopped = True
        if self.json:
            _print_json(outcome.document(outcomes, self.seed))
        for done in () if self.json else outcomes:
            screen.print(outcome.episode_table(done))
        if stopped:
            kept = f"What was recorded is in {self.record}." if self.record else "Nothing was recorded (--record)."
            played = sum(len(done.episodes) for done in outcomes)
            return _stopped(screen, f"{played} of {self.episodes} episodes are finished. {kept}")
        if self.record is not None:
            screen.print(f"Recorded in {self.record}")
        return OK


@dataclass(frozen=True)
class Search(Common):
    """Search a field with an agent that explains itself; record every decision, and ask before each if you like."""

    agent: Positional[str] = tyro.MISSING
    """Agent that searches, such as dkl."""
    id: Positional[str] = tyro.MISSING
    """Environment id of a spectrum search."""
    record: Path | None = None
    """Folder for the log of decisions; `stem-gym explain` reads it."""
    ask: bool = False
    """Ask before every measurement: approve, veto, pin a place, change what is wanted or how it decides."""
    seed: int = 0
    """Seed of the world."""
    using: Annotated[Texts, tyro.conf.arg(name="with")] = ()
    """Change a setting of the agent: NAME=VALUE, such as first_places=5."""
    set: Texts = ()
    """Change a value of the environment's configuration: KEY.PATH=VALUE."""

    def run(self, screen: Console) -> int:
        from stem_gym.jobs import outcome, search
        from stem_gym.jobs.progress import Progress

        settings, overrides = parse_overrides(self.using), parse_overrides(self.set)
        job = search.Search(self.agent, self.id, self.record, self.ask, self.seed, settings, overrides)
        try:
            with Progress(screen) as progress:
                watch = None if self.ask else lambda step, info: progress.steps(0, info)
                done = search.search(job, watch, lambda text: screen.print(escape(text)))
        except KeyboardInterrupt:
            return _stopped(screen, f"What was recorded is in {self.record}." if self.record else "")
        if self.json:
            _print_json(outcome.document([done], self.seed))
        else:
            screen.print(outcome.episode_table(done))
        if self.record is not None:
            screen.print(f"Recorded in {self.record}")
        return OK


@dataclass(frozen=True)
class Explain(Common):
    """Say and draw why a recorded decision was made, and what it would have been if."""

    folder: Positional[Path] = tyro.MISSING
    """Folder that `stem-gym search --record` wrote."""
    step: int | None = None
    """Step of the episode, from 0; the last one, if not given."""
    row: int = 0
    """Row, where several were recorded."""
    out: Path | None = None
    """PNG, PDF or SVG to draw."""
    acquisition: str | None = None
    """What if this had been the acquisition function, such as thompson?"""
    scalarizer: str | None = None
    """What if this had been wanted, by its name in the task?"""
    measured: tuple[float, ...] = ()
    """What if the cell X Y had been measured at that step, with this VALUE?"""

    def run(self, screen: Console) -> int:
        from stem_gym.jobs import search

        told = search.explain(
            search.Question(
                self.folder, self.step, self.row, self.out, self.acquisition, self.scalarizer, self.measured
            )
        )
        if self.json:
            _print_json(told)
        for line in () if self.json else search.sentences(told):
            screen.print(escape(line))
        if self.out is not None:
            screen.print(f"Drawn to {self.out}")
        return OK


@dataclass(frozen=True)
class Value(Common):
    """Say and draw what each step of an episode between laws was worth: one that is played, or a recorded one."""

    agent: Positional[str] = tyro.MISSING
    """Agent, or the folder of a saved policy; or a recording (HDF5) of `deploy --record`."""
    id: Positional[str] = ""
    """Environment id of a hypothesis discrimination; none for a recording."""
    out: Path = tyro.MISSING
    """Folder for values.jsonl and values.png."""
    seed: int = 0
    """Seed of the world."""
    using: Annotated[Texts, tyro.conf.arg(name="with")] = ()
    """Change a setting of the agent: NAME=VALUE, such as claim=0.99."""
    set: Texts = ()
    """Change a value of the environment's configuration: KEY.PATH=VALUE."""

    def run(self, screen: Console) -> int:
        from stem_gym.jobs import value

        settings, overrides = parse_overrides(self.using), parse_overrides(self.set)
        if self.id:
            told = value.value(value.ValueJob(self.agent, self.id, self.out, self.seed, settings, overrides))
        elif settings or overrides:
            raise ConfigError("--with and --set are for an episode that is played: name an environment id after it.")
        elif not Path(self.agent).is_file():
            raise ConfigError(f"There is no recording {self.agent!r}; for an episode of an agent, name an id after it.")
        else:
            told = value.value_of_recording(Path(self.agent), self.out)
        if self.json:
            _print_json(told)
        for line in () if self.json else value.sentences(told):
            screen.print(escape(line))
        return OK


@dataclass(frozen=True)
class FitRates(Common):
    """Learn the jump-rate map of a doped sheet from recorded episodes, and write it as a configuration."""

    recordings: Positional[tuple[Path, ...]] = tyro.MISSING
    """Recordings (HDF5), or folders of them."""
    out: Path | None = None
    """YAML file for the rates; what the simulator loads as overrides."""
    sds: float = 0.0
    """Half the width of the ranges that are written, in standard deviations; 0 writes the estimates alone."""
    reference_pa: float = 100.0
    """Beam current that the rates are for."""
    energy_kev: float | None = None
    """Beam energy of the recordings: the map then says that it holds there, and is refused elsewhere."""
    level: float = 0.9
    """Level of the intervals that are told."""
    fix: Texts = ()
    """Give a parameter instead of fitting it: NAME=VALUE, such as anisotropy=1."""

    def run(self, screen: Console) -> int:
        from stem_gym.jobs import fit_rates
        from stem_gym.jobs.progress import Progress

        fixed = parse_overrides(self.fix)
        job = fit_rates.FitJob(self.recordings, self.sds, self.reference_pa, self.level, fixed, self.energy_kev)
        with Progress(screen) as progress:
            rates = fit_rates.fit_rates(job, progress.update)
        if self.out is not None:
            fit_rates.write_rates(rates, self.out)
        if self.json:
            _print_json(rates.as_data())
        else:
            screen.print(rates.table())
        if self.out is not None:
            screen.print(f"Written to {self.out}")
        return OK


@dataclass(frozen=True)
class Identify(Common):
    """Say which laws of a set can be told apart by experiments that are spread evenly over the design space."""

    laws: Positional[str] = tyro.MISSING
    """Name of a set of laws such as domain_growth, a YAML file, or an environment id."""
    experiments: int | None = None
    """How many experiments; those of the environment that uses the set, if not given."""
    noise_absolute: float | None = None
    """Noise of a measurement in the unit of the quantity; that of the environment, if not given."""
    noise_relative: float | None = None
    """Noise as a part of the value."""
    worlds: int = 32
    """Worlds of each law."""
    seed: int = 0
    """Seed of the worlds."""

    def run(self, screen: Console) -> int:
        from stem_gym.jobs import identify
        from stem_gym.jobs.progress import Progress

        job = identify.IdentifyJob(
            self.laws, self.experiments, self.noise_absolute, self.noise_relative, self.worlds, self.seed
        )
        with Progress(screen) as progress:
            found = identify.identify(job, progress.update)
        if self.json:
            _print_json(found.as_data())
            return OK
        screen.print(found.table())
        for sentence in found.sentences():
            screen.print(escape(sentence))
        return OK


@dataclass(frozen=True)
class Demo(Common):
    """Benchmark, train, deploy to Nion Swift and draw it all, in under ten minutes on two cores."""

    out: Path = Path("demo")
    """Folder for pictures, video, tables and recordings."""
    minutes: float = 2.0
    """How long PPO trains."""
    episodes: int = 24
    """Episodes of each agent in the benchmark."""

    def run(self, screen: Console) -> int:
        from stem_gym.jobs import demo

        result = demo.demo(demo.Settings(self.out, self.minutes, self.episodes), screen)
        if self.json:
            _print_json({"made": result.made, "skipped": result.skipped, "seconds": result.seconds})
        return FAILED if result.skipped else OK


_COMMANDS = {
    "list": List,
    "show": Show,
    "check": Check,
    "train": Train,
    "bench": Bench,
    "deploy": Deploy,
    "search": Search,
    "explain": Explain,
    "value": Value,
    "fit-rates": FitRates,
    "identify": Identify,
    "demo": Demo,
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; gives the exit code. `argv` is that of the process, if not given."""
    words = list(sys.argv[1:] if argv is None else argv)
    os.environ.setdefault("OMP_NUM_THREADS", "1")  # two threads on a busy machine wait for one another
    try:
        command = tyro.extras.subcommand_cli_from_dict(
            dict(_COMMANDS),
            args=words or ["--help"],
            prog="stem-gym",
            description="Environments, simulated microscopes and agents for autonomous electron microscopy.",
            config=(FlagCreatePairsOff,),
        )
    except SystemExit as stop:
        return stop.code if isinstance(stop.code, int) else BAD_INPUT
    # Where JSON goes to standard output, everything meant for people goes to the other stream.
    with _terminated_like_ctrl_c() as signals:
        code = _guarded(command, Console(stderr=command.json, highlight=False, soft_wrap=False))
    return TERMINATED if signals and code == STOPPED else code


@contextmanager
def _terminated_like_ctrl_c() -> Iterator[list[int]]:
    """SIGTERM, which schedulers send before they kill, becomes a KeyboardInterrupt; gives the signals that came."""
    signals: list[int] = []

    def stop(number: int, _: object) -> None:
        signals.append(number)
        raise KeyboardInterrupt

    if threading.current_thread() is not threading.main_thread():  # only there a signal can be handled
        yield signals
        return
    before = signal.signal(signal.SIGTERM, stop)
    try:
        yield signals
    finally:
        signal.signal(signal.SIGTERM, before)


def _guarded(command: Any, screen: Console) -> int:
    """Run a command; what goes wrong becomes one message and an exit code."""
    try:
        return int(command.run(screen))
    except KeyboardInterrupt:
        return _stopped(screen, "")
    except BrokenPipeError:  # the reader of a pipe has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return OK
    except Exception as error:
        if command.debug:
            raise
        return _explain(error)


def _explain(error: Exception) -> int:
    from gymnasium.error import Error as GymnasiumError

    trouble = Console(stderr=True, highlight=False, soft_wrap=True)
    if isinstance(error, StemGymError | GymnasiumError):
        trouble.print(f"[bold red]error:[/] {escape(str(error))}")
        return BAD_INPUT
    if isinstance(error, OSError):
        trouble.print(f"[bold red]error:[/] {escape(str(error))}")
        return BAD_INPUT
    trouble.print(f"[bold red]unexpected {type(error).__name__}:[/] {escape(str(error))}")
    trouble.print("This should not happen. Run it again with --debug to see where, and report it please.")
    return FAILED


def _stopped(screen: Console, kept: str) -> int:
    screen.print(f"\nStopped. {escape(kept)}", style="yellow")
    return STOPPED


def _tell_finding(screen: Console, found: Any) -> None:
    mark = "[red]failed [/]" if found.problem else "[yellow]skipped[/]" if found.skipped else "[green]ok     [/]"
    screen.print(f"{mark} {found.id}: {found.check}")
    if found.problem or found.skipped:
        screen.print(escape(f"        {found.problem or found.skipped}"))


def _print_json(data: Any) -> None:
    print(jsonlib.dumps(data, indent=1, ensure_ascii=False))


if __name__ == "__main__":
    sys.exit(main())
