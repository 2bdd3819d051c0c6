"""A person at a terminal supervises a search: one question before every measurement."""

from __future__ import annotations

from collections.abc import Callable

from agents.engine.supervision import Moment, check_verdict
from agents.engine.verdicts import Approve, Pin, Prefer, Verdict, Veto, Want, acquisition_named, acquisition_names
from stem_gym.core.errors import ActionError, StemGymError

_HELP = """\
  enter          measure there
  v              never measure there; another place is chosen
  v X Y          never measure the cell X Y
  p X Y          measure the cell X Y next
  s NAME         want another scalarizer: {scalarizers}
  a NAME [K=V]   decide with another acquisition function: {acquisitions}
  ?              this help
  Ctrl-C         stop; what was recorded is kept"""


def console_hook(moment: Moment, read: Callable[[str], str] = input, write: Callable[[str], None] = print) -> Verdict:
    """Ask at the terminal; what can not be is told and asked again. The end of the input stops like Ctrl-C."""
    write(sentence_of(moment))
    while True:
        try:
            words = read("[enter, v, p, s, a, ?] ").split()
        except EOFError:
            raise KeyboardInterrupt from None
        if words == ["?"]:
            write(_HELP.format(scalarizers=", ".join(moment.scalarizers), acquisitions=", ".join(acquisition_names())))
            continue
        try:
            verdict = _verdict_of(words, moment)
            check_verdict(verdict, moment)
        except StemGymError as error:
            write(f"  {error}")
            continue
        return verdict


def sentence_of(moment: Moment) -> str:
    """What would be measured, and what is expected there."""
    decision, (y, x) = moment.decision, divmod(moment.chosen, moment.shape[1])
    place = f"Step {moment.step}: measure x {x}, y {y}"
    if decision.seeding[0]:
        return f"{place}, drawn at random (first places)."
    mean, deviation, score = (
        float(part[0, y, x]) for part in (decision.mean, decision.deviation, decision.acquisition)
    )
    return (
        f"{place}, where {moment.wanted} is expected to be {mean:.4g} ± {deviation:.2g} "
        f"({moment.acquisition.kind} {score:.3g})."
    )


def _verdict_of(words: list[str], moment: Moment) -> Verdict:
    """The verdict that was typed. Raises StemGymError for what is none."""
    match words:
        case []:
            return Approve()
        case ["v"]:
            return Veto((moment.chosen,))
        case ["v", x, y]:
            return Veto((_cell(x, y, moment),))
        case ["p", x, y]:
            return Pin(_cell(x, y, moment))
        case ["s", name]:
            return Want(name)
        case ["a", name, *settings]:
            return Prefer(acquisition_named(name, **dict(_setting(text) for text in settings)))
    raise ActionError(f"Not understood: {' '.join(words)!r}. Type ? for help.")


def _cell(x: str, y: str, moment: Moment) -> int:
    height, width = moment.shape
    if not (x.isdecimal() and y.isdecimal() and int(x) < width and int(y) < height):
        raise ActionError(f"x is a whole number from 0 to {width - 1}, y from 0 to {height - 1}; given {x} {y}.")
    return int(y) * width + int(x)


def _setting(text: str) -> tuple[str, float]:
    name, _, value = text.partition("=")
    try:
        return name, float(value)
    except ValueError:
        raise ActionError(f"A setting reads NAME=NUMBER, such as deviations=3; given {text!r}.") from None
